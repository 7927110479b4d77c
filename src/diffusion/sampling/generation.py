"""Images from noise: image i has random numbers of its own, whatever the batch it is made in."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.config import SampleConfig
from diffusion.data.pixels import to_uint8
from diffusion.errors import UserError
from diffusion.model.denoiser import Denoiser
from diffusion.sampling.noise import standard_normals
from diffusion.sampling.samplers import configured, evaluations
from diffusion.sampling.spacings import sampling_timesteps

CPU_BATCH = 256
CUDA_BATCH = 4096  # tried first; from there on only the memory grows, and what a stop loses
COMPILE_FROM = 5_000_000  # network evaluations of one image: fewer are done before the compiler is


def trajectory(
    denoiser: Denoiser,
    config: SampleConfig,
    seed: int,
    indices: Sequence[int],
    device: torch.device,
) -> Iterator[Tensor]:
    """X after each step for the images `indices`, (B, C, H, W) float32; the start x_T comes first, x0 last.

    Raises:
        UserError: the model has fewer steps than `sample.steps`, or see `labels_of`.
    """
    if config.steps > (known := denoiser.schedule.num_steps):
        raise UserError(f"sample.steps = {config.steps}: this model has {known} steps, so give at most that")
    noise = standard_normals(seed, indices, denoiser.image_shape, device)
    timesteps = sampling_timesteps(config.spacing, denoiser.schedule, config.steps)
    labels = labels_of(config, denoiser.num_classes, indices)
    if labels is not None:
        denoiser = denoiser.of(labels.to(device), config.guidance)
    x_T = next(noise)
    yield x_T
    yield from configured(config)(denoiser, denoiser.schedule, x_T, timesteps, noise=noise.__next__)


def labels_of(config: SampleConfig, num_classes: int | None, indices: Sequence[int]) -> Tensor | None:
    """int64 (B,): the classes of the images `indices`; image i's is a function of i. None for unconditional networks.

    Raises:
        UserError: the network does not know one of `sample.labels`, or knows no classes to guide by.
    """
    wanted = range(num_classes or 0) if config.labels == "balanced" else config.labels
    if num_classes is None:
        if wanted or config.guidance != 1.0:
            raise UserError("the model knows no classes: set sample.labels: balanced and sample.guidance: 1.0")
        return None
    if not wanted or max(wanted) >= num_classes:
        raise UserError(f"sample.labels: give balanced, or classes from 0 to {num_classes - 1}")
    return torch.tensor([wanted[i % len(wanted)] for i in indices])


def generate(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: range, device: torch.device
) -> Iterator[Tensor]:
    """uint8 (B, H, W, C) on the CPU, batch after batch as `sample.batch_size` says, in the order of `indices`."""
    size = batch_size(denoiser, config, len(indices), device)
    generator = ImageGenerator(denoiser, config, seed, device, size=size, images=len(indices))
    for _, images in generator.batches(cut(indices, size)):
        yield images()


def batch_size(denoiser: Denoiser, config: SampleConfig, images: int, device: torch.device) -> int:
    """`sample.batch_size`; if null the largest that fits, tried on CUDA, so that `images` make batches of equal size.

    Raises:
        UserError: not even one image fits into the device's memory.
    """
    if config.batch_size:
        return min(config.batch_size, images)
    size = min(CUDA_BATCH if device.type == "cuda" else CPU_BATCH, images)
    if device.type == "cuda":
        while not _fits(_with_labels(denoiser, config, size, device), size, device):
            size = _halved(size, device)
    return math.ceil(images / math.ceil(images / size))


def cut(indices: range, size: int) -> list[range]:
    """`indices` in batches of at most `size`, cut at multiples of it: what remains of a set has the same batches."""
    ends = [*range(indices.start - indices.start % size + size, indices.stop, size), indices.stop]
    return [range(a, b) for a, b in zip([indices.start, *ends], ends, strict=False) if a < b]


class ImageGenerator:
    """Images in batches of `size`, or of half of it, and half again, when the memory of the device is too small."""

    def __init__(
        self,
        denoiser: Denoiser,
        config: SampleConfig,
        seed: int,
        device: torch.device,
        *,
        size: int,  # images of a batch
        images: int,  # that will be generated: whether compiling pays
        advanced: Callable[[float], object] = float,  # told after each step how much it was, in whole images
    ) -> None:
        self.config, self.seed, self.device, self.size, self.advanced = config, seed, device, size, advanced
        wanted = device.type == "cuda" and images * evaluations(config, denoiser.schedule) >= COMPILE_FROM
        if config.compile == "on" or (config.compile == "auto" and wanted):
            compiled = _compiled(denoiser, config, size, device, must=config.compile == "on")
        else:
            compiled = None
        self.denoiser = compiled or denoiser
        self.fixed_shape = compiled is not None  # each shape costs a compilation

    def batches(self, ranges: Iterable[range]) -> Iterator[tuple[range, Callable[[], Tensor]]]:
        """(indices, images) of all of `ranges` in order; images() waits for the device: uint8 (B, H, W, C) on the CPU.

        A batch may still be in the works when the next one is asked for, so that the device never waits.

        Raises:
            UserError: not even one image fits into the device's memory.
        """
        todo = deque(ranges)
        while todo:
            indices = todo.popleft()
            images = None if len(indices) > self.size else self._generate(indices)
            if images is not None:
                yield indices, _to_host(images)
                continue
            if len(indices) <= self.size:
                self.size = _halved(self.size, self.device)
            todo.extendleft(reversed([indices[i : i + self.size] for i in range(0, len(indices), self.size)]))

    @torch.inference_mode()
    def _generate(self, indices: range) -> Tensor | None:
        """uint8 (B, H, W, C) on the device; None if its memory was too small."""
        padding = [indices[-1]] * (self.size - len(indices)) if self.fixed_shape else []
        step, told = len(indices) / self.config.steps, 0.0
        try:
            chain = trajectory(self.denoiser, self.config, self.seed, [*indices, *padding], self.device)
            x0 = next(chain)  # the noise
            for x in chain:
                self.advanced(step)
                x0, told = x, told + step
            return to_uint8(x0[: len(indices)])
        except torch.OutOfMemoryError:
            self.advanced(-told)
            return None


def _with_labels(denoiser: Denoiser, config: SampleConfig, size: int, device: torch.device) -> Denoiser:
    """With labels and guidance, which may double the batch that the network sees."""
    labels = labels_of(config, denoiser.num_classes, range(size))
    return denoiser if labels is None else denoiser.of(labels.to(device), config.guidance)


@torch.inference_mode()
def _fits(denoiser: Denoiser, size: int, device: torch.device) -> bool:
    x = torch.zeros((size, *denoiser.image_shape), device=device).contiguous(memory_format=torch.channels_last)
    try:
        denoiser(x, torch.zeros(size, dtype=torch.long, device=device))
    except torch.OutOfMemoryError:
        return False
    return True


def _halved(size: int, device: torch.device) -> int:
    if size == 1:
        raise UserError(f"one image does not fit into the memory of {device}: free some of it, or use another device")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the larger shape are of no use to the smaller one
    return math.ceil(size / 2)


def _compiled(
    denoiser: Denoiser, config: SampleConfig, size: int, device: torch.device, *, must: bool
) -> Denoiser | None:
    """`denoiser`, compiled for batches of `size`; None if that cannot be done here, unless it `must`."""
    compiled = denoiser.compiled()
    try:
        _fits(_with_labels(compiled, config, size, device), size, device)  # the first call compiles
    except Exception as error:  # torch's compiler raises many kinds: no C compiler, no Triton, an unknown GPU
        reason = " ".join(str(error).split())[:160]
        if must:
            raise UserError(f"sample.compile is on and compiling fails here ({reason}): set it to off") from None
        tqdm.write(f"sample: not compiled ({reason})", file=sys.stderr)
        return None
    return compiled


def _to_host(images: Tensor) -> Callable[[], Tensor]:
    """Start the transfer to the CPU; the result waits for it."""
    if images.device.type != "cuda":
        return images.cpu
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True).copy_(images, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def arrived() -> Tensor:
        done.synchronize()
        return host

    return arrived
