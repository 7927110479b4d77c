"""From images to features: batches through an extractor, shared by processes, with their moments and some kept rows."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.data.dataset import releases
from diffusion.data.pixels import rgb
from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.metrics.features import Extractor

if TYPE_CHECKING:
    from diffusion.metrics.moments import Moments


class Images(Protocol):
    """uint8 (N, H, W, C) that are read by slices: an array, mapped or not, or npz.Stream."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Extracted:
    """What is left of the features of N images."""

    moments: "Moments"  # of all
    blocks: list["Moments"]  # of equal blocks of them in order, without what remains of N
    kept: Tensor  # float32 (n, d): the features of the first n


def features_of(
    images: Images,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    what: str,
    world: World = SINGLE_PROCESS,
    *,
    keep: int = 0,  # features of at most so many images stay in memory
    blocks: int = 1,
) -> Extracted:
    """Features of uint8 (N, H, W, C) images (on white), with a progress bar called `what`.

    The ranks of `world` share the batches; each returns the result of all of them, equal to a single process's but for
    float64 rounding, because every image is in the same batch.

    Raises:
        UserError: a feature is not finite.
    """
    from diffusion.metrics.moments import Moments

    extractor.to(device)
    found, kept = world.together(lambda: _share(images, extractor, batch_size, device, what, world, keep, blocks))
    total = Moments(extractor.dim)
    for block in found:
        block.sync(should_sync=world.size > 1)
        total.merge_state(block)
    if world.size > 1:
        parts = world.gather(kept)
        kept = world.broadcast(parts and np.concatenate(parts))
    return Extracted(total, found[:blocks], torch.from_numpy(kept))


def moments_of(
    images: Images,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    what: str,
    world: World = SINGLE_PROCESS,
) -> "Moments":
    """Moments alone, of `features_of`."""
    return features_of(images, extractor, batch_size, device, what, world).moments


def features_of_batch(images: np.ndarray, extractor: Extractor, device: torch.device) -> Tensor:
    """Features (N, d) on `device`, where the extractor is, of uint8 (N, H, W, C) images (on white)."""
    return extractor(torch.from_numpy(rgb(images).copy()).to(device).permute(0, 3, 1, 2))


def released(images: Images) -> Callable[[], None] | None:
    """What forgets the part of `images` that was read; None if nothing is mapped."""
    return releases(images) if isinstance(images, np.ndarray) else None


def batches(count: int, batch_size: int, blocks: int) -> list[tuple[int, range]]:
    """(block, images): range(count) in batches that end where a block ends; block `blocks` is what remains."""
    size, found = count // blocks, []
    for block in range(blocks + 1):
        end = count if block == blocks else (block + 1) * size
        for start in range(block * size, end, batch_size):
            found.append((block, range(start, min(start + batch_size, end))))
    return found


def _share(
    images: Images,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    what: str,
    world: World,
    keep: int = 0,
    blocks: int = 1,
) -> tuple[list["Moments"], np.ndarray]:
    """Of this rank's share of the batches: moments of each block and of what remains, and the rows to keep."""
    from diffusion.metrics.moments import Moments

    found = [Moments(extractor.dim) for _ in range(blocks + 1)]
    todo, release = batches(len(images), batch_size, blocks), released(images)
    mine = [todo[k] for k in world.share(len(todo))]
    total = sum(len(rows) for _, rows in mine)
    kept = np.empty((sum(max(0, min(rows.stop, keep) - rows.start) for _, rows in mine), extractor.dim), np.float32)
    filled = 0
    pace = 0.5 if sys.stderr.isatty() else 30
    name = what if world.size == 1 else f"{what} (1 of {world.size} processes)"
    with tqdm(total=total, unit=" images", desc=name, mininterval=pace, disable=not world.is_main) as bar:
        for block, rows in mine:
            features = features_of_batch(images[rows.start : rows.stop], extractor, device).float().cpu().numpy()
            found[block].update(features)
            if filled < len(kept):
                part = features[: len(kept) - filled]
                kept[filled : filled + len(part)] = part
                filled += len(part)
            if release:
                release()
            bar.update(len(rows))
    return found, kept
