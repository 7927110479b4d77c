"""Images from noise: image i has random numbers of its own, whatever the batch it is made in."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.config import SampleConfig
from diffusion.data import to_uint8
from diffusion.errors import UserError
from diffusion.noise import standard_normals
from diffusion.parameterization import Denoiser
from diffusion.samplers import configured
from diffusion.schedules import sampling_timesteps

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
    """X after each step for the images `indices`, (B, C, H, W) float32; the start x_T comes first, x0 last."""
    noise = standard_normals(seed, indices, denoiser.image_shape, device)
    timesteps = sampling_timesteps(config.spacing, denoiser.schedule.num_steps, config.steps)
    x_T = next(noise)
    yield x_T
    yield from configured(config)(denoiser, denoiser.schedule, x_T, timesteps, noise=noise.__next__)


def generate(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: range, device: torch.device
) -> Iterator[Tensor]:
    """uint8 (B, H, W, C) on the CPU, batch after batch as `sample.batch_size` says, in the order of `indices`."""
    size = batch_size(denoiser, config, len(indices), device)
    drawing = Drawing(denoiser, config, seed, device, size=size, images=len(indices))
    for _, images in drawing.batches(cut(indices, size)):
        yield images()


def stages(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: Sequence[int], device: torch.device, columns: int
) -> Tensor:
    """uint8 (columns, B, H, W, C): evenly spaced moments of the denoising, from x_T to the image."""
    picked = torch.linspace(0, config.steps, min(columns, config.steps + 1)).round().long().tolist()
    frames = enumerate(trajectory(denoiser, config, seed, indices, device))
    return torch.stack([to_uint8(x) for step, x in frames if step in picked]).cpu()


def batch_size(denoiser: Denoiser, config: SampleConfig, images: int, device: torch.device) -> int:
    """`sample.batch_size`; if null the largest that fits, tried on CUDA, so that `images` make batches of equal size.

    Raises:
        UserError: not even one image fits into the device's memory.
    """
    if config.batch_size:
        return min(config.batch_size, images)
    size = min(CUDA_BATCH if device.type == "cuda" else CPU_BATCH, images)
    if device.type == "cuda":
        while not _fits(denoiser, size, device):
            size = _halved(size, device)
    return math.ceil(images / math.ceil(images / size))


def cut(indices: range, size: int) -> list[range]:
    """`indices` in batches of at most `size`, cut at multiples of it: what remains of a set has the same batches."""
    ends = [*range(indices.start - indices.start % size + size, indices.stop, size), indices.stop]
    return [range(a, b) for a, b in zip([indices.start, *ends], ends, strict=False) if a < b]


class Drawing:
    """Draws images in batches of `size`, or of half of it, and half again, when the device's memory is too small."""

    def __init__(
        self,
        denoiser: Denoiser,
        config: SampleConfig,
        seed: int,
        device: torch.device,
        *,
        size: int,  # images of a batch
        images: int,  # that will be drawn: whether compiling pays
    ) -> None:
        self.config, self.seed, self.device, self.size = config, seed, device, size
        wanted = device.type == "cuda" and images * config.steps >= COMPILE_FROM
        if config.compile == "on" or (config.compile == "auto" and wanted):
            compiled = _compiled(denoiser, size, device, must=config.compile == "on")
        else:
            compiled = None
        self.denoiser = compiled or denoiser
        self.fixed_shape = compiled is not None  # each shape costs a compilation

    def batches(self, parts: Iterable[range]) -> Iterator[tuple[range, Callable[[], Tensor]]]:
        """(indices, images) of all of `parts` in order; images() waits for the device: uint8 (B, H, W, C) on the CPU.

        A batch may still be in the works when the next one is asked for, so that the device never waits.

        Raises:
            UserError: not even one image fits into the device's memory.
        """
        todo = deque(parts)
        while todo:
            part = todo.popleft()
            images = None if len(part) > self.size else self._draw(part)
            if images is not None:
                yield part, _to_host(images)
                continue
            if len(part) <= self.size:
                self.size = _halved(self.size, self.device)
            todo.extendleft(reversed([part[i : i + self.size] for i in range(0, len(part), self.size)]))

    @torch.inference_mode()
    def _draw(self, part: range) -> Tensor | None:
        """uint8 (B, H, W, C) on the device; None if its memory was too small."""
        padding = [part[-1]] * (self.size - len(part)) if self.fixed_shape else []
        try:
            for x in trajectory(self.denoiser, self.config, self.seed, [*part, *padding], self.device):
                x0 = x
            return to_uint8(x0[: len(part)])
        except torch.OutOfMemoryError:
            return None


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


def _compiled(denoiser: Denoiser, size: int, device: torch.device, *, must: bool) -> Denoiser | None:
    """`denoiser`, compiled for batches of `size`; None if that cannot be done here, unless it `must`."""
    compiled = denoiser.compiled()
    try:
        _fits(compiled, size, device)  # the first call compiles
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
