"""Noise for sampling: image i's numbers are a function of (seed, i) alone, for any batch, rank or device."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from diffusion.runtime import generator

AHEAD = 8  # on CUDA: steps whose noise one call draws for an image
MOST = 2**27  # numbers (0.5 GiB) of all images that are drawn ahead, unless one step has more
BLOCK = (
    16  # torch fills this many normals at a time; in rows of whole blocks, n calls draw what one call of n rows does
)


def standard_normals(
    seed: int,
    indices: Sequence[int],  # of the images
    shape: tuple[int, ...],  # (C, H, W) of one image
    device: torch.device,
    *,
    ahead: int | None = None,  # steps a call, by threads; None = AHEAD or fewer on CUDA, one by one elsewhere
) -> Iterator[Tensor]:
    """Endless float32 (B, C, H, W), channels-last on `device`: x_T first, then the noise of one step after another.

    The CPU's generators draw for every device, so that all devices see the same numbers. Once a step's noise is asked
    for, which deterministic samplers never do, threads draw that of `ahead` steps while the GPU works on those before.
    """
    sources = [generator(seed, "sample", i) for i in indices]
    row = math.ceil(math.prod(shape) / BLOCK) * BLOCK
    threads = min(8, os.cpu_count() or 1, len(sources)) if ahead or device.type == "cuda" else 0
    ahead = ahead or max(1, min(AHEAD, MOST // (len(sources) * row)))

    @torch.inference_mode()  # a mode of the caller's thread alone
    def fill(buffer: Tensor, images: range) -> None:
        for i in images:
            torch.randn(buffer.shape[1:], generator=sources[i], out=buffer[i])

    def buffer_of(steps: int) -> Tensor:
        return torch.empty(len(sources), steps, row, pin_memory=device.type == "cuda")

    def steps_of(buffer: Tensor) -> Iterator[Tensor]:
        rows = buffer.to(device, non_blocking=True)[:, :, : math.prod(shape)]
        for step in rows.unbind(1):
            yield step.reshape(len(sources), *shape).contiguous(memory_format=torch.channels_last)

    while not threads:
        buffer = buffer_of(1)
        fill(buffer, range(len(sources)))
        yield from steps_of(buffer)
    with ThreadPoolExecutor(threads) as pool:

        def start(steps: int) -> tuple[Tensor, list[Future[None]]]:
            buffer = buffer_of(steps)
            return buffer, [pool.submit(fill, buffer, range(k, len(sources), threads)) for k in range(threads)]

        def finish(buffer: Tensor, jobs: list[Future[None]]) -> Tensor:
            for job in jobs:
                job.result()
            return buffer

        yield from steps_of(finish(*start(1)))
        begun = start(ahead)
        while True:
            ready = finish(*begun)  # before the next is begun: an image's generator is one thread's at a time
            begun = start(ahead)
            yield from steps_of(ready)
