"""Noise for sampling: image i's numbers are a function of (seed, i) alone, for any batch, rank or device."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
    sources = generators(seed, indices)
    numbers = math.prod(shape)
    row = math.ceil(numbers / BLOCK) * BLOCK
    threads = min(8, os.cpu_count() or 1, len(sources)) if ahead or device.type == "cuda" else 0
    steps = ahead or (max(1, min(AHEAD, MOST // (len(sources) * row))) if threads else 1)

    def steps_of(buffer: Tensor) -> Iterator[Tensor]:
        rows = buffer.to(device, non_blocking=True)[:, :, :numbers]
        for step in rows.unbind(1):
            yield step.reshape(len(sources), *shape).contiguous(memory_format=torch.channels_last)

    with ThreadPoolExecutor(threads) if threads else contextlib.nullcontext() as pool:
        begin = partial(_begin, sources, row, pool, threads, pin=device.type == "cuda")
        yield from steps_of(begin(1)())
        begun = begin(steps)
        while True:
            ready = begun()  # before the next is begun: an image's generator is one thread's at a time
            begun = begin(steps)
            yield from steps_of(ready)


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for each image: of a seed, those of the CPU keep 32 bits, of which hashes would repeat some."""
    first = generator(seed, "sample").initial_seed()
    return [torch.Generator().manual_seed((first + i) % 2**32) for i in indices]


def _begin(
    sources: Sequence[torch.Generator],
    row: int,
    pool: ThreadPoolExecutor | None,
    threads: int,
    steps: int,
    *,
    pin: bool,
) -> Callable[[], Tensor]:
    """Begin to draw (B, steps, row) numbers, each image's with its own generator; the result waits for them."""
    buffer = torch.empty(len(sources), steps, row, pin_memory=pin)

    @torch.inference_mode()  # a mode of the caller's thread alone
    def fill(images: range) -> None:
        for i in images:
            torch.randn((steps, row), generator=sources[i], out=buffer[i])

    if pool is None:
        fill(range(len(sources)))
        return lambda: buffer
    jobs = [pool.submit(fill, range(k, len(sources), threads)) for k in range(threads)]

    def wait() -> Tensor:
        for job in jobs:
            job.result()
        return buffer

    return wait
