"""From images to features: by which extractors, in batches that processes share, with moments and some kept rows.

EfficientNet-Lite0 is always one of them, Inception as `evaluate.inception` says.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import paths
from diffusion.config import EvaluateConfig
from diffusion.data.dataset import releases
from diffusion.data.download.inception_weights import answer, at_hand, put, sha256
from diffusion.data.pixels import rgb
from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.errors import UserError
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.rules import INFINITY_ROWS

if TYPE_CHECKING:
    from diffusion.metrics.moments import Moments

AGAIN = "run `dvc repro -sf reference`"  # -s: without it, -f would force the download too
OTHERWISE = "or set evaluate.measures without frechet (KID, kid, is unbiased for few), or evaluate.inception: off"


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


def reference_images(config: EvaluateConfig, extractor: Extractor) -> int:
    """How many real images, the first of the split, `extractor` is given."""
    return config.inception_images if isinstance(extractor, Inception) else config.reference_images


def kept_images(config: EvaluateConfig, available: int) -> int:
    """How many of `available` images keep their features, for the measures that need more than moments."""
    return min(config.kept_features, available) if set(config.measures) - {"frechet"} else 0


def for_reference(config: EvaluateConfig, weights: Path | None, available: int, *, speak: bool) -> list[Extractor]:
    """fd_lite0's always, Inception's if there are weights; for references from `available` images.

    Raises:
        UserError: more images are asked for than there are, or fewer than FID needs.
    """
    extractors: list[Extractor] = [EfficientNetLite0(precision=config.precision)]
    if weights:
        inception = Inception(weights, config.precision)
        if speak and not inception.published:
            mine = (
                f"evaluate.inception_weights = {config.inception_weights}: not the 2015-12-05 weights, so this `fid` "
            )
            click.secho(mine + "is comparable with no published number", fg="yellow", bold=True, err=True)
        extractors.append(inception)
    for extractor in extractors:
        count = reference_images(config, extractor)
        if count > available:
            raise UserError(f"{count} reference images are asked for and {config.reference_split} has {available}")
        kept = min(config.kept_features, config.repeats * count)
        if isinstance(extractor, Inception) and "infinity" in config.measures and kept < INFINITY_ROWS * extractor.dim:
            raise UserError(
                f"evaluate.measures has infinity, which needs {INFINITY_ROWS * extractor.dim} samples for fid and gets "
                f"{kept}: raise evaluate.inception_images and evaluate.kept_features, or take it out"
            )
        if isinstance(extractor, Inception) and "frechet" in config.measures and count < extractor.dim:
            raise UserError(
                f"evaluate.inception_images = {count}: FID needs at least {extractor.dim} images a side: raise it, "
                f"{OTHERWISE}"
            )
    return extractors


def for_samples(config: EvaluateConfig, count: int, folder: Path) -> list[Extractor]:
    """The same for `count` samples that are compared with the references in `folder`.

    Raises:
        UserError: fewer samples than FID needs, or the weights that the reference was made with are gone.
    """
    extractors: list[Extractor] = [EfficientNetLite0(precision=config.precision)]
    if config.inception == "require" or (config.inception != "off" and (folder / "fid.npz").exists()):
        each = min(count, config.repeats * config.inception_images) // config.repeats
        if "frechet" in config.measures and each < Inception.dim:
            parts = f" in each of evaluate.repeats = {config.repeats} blocks" if config.repeats > 1 else ""
            raise UserError(
                f"FID needs at least {Inception.dim} samples and there are {each}{parts}: raise sample.num_images, "
                f"{OTHERWISE}"
            )
        extractors.append(Inception(_weights_again(config, answer()), config.precision))
    return extractors


def inception_weights(config: EvaluateConfig) -> Path | None:
    """Inception's weights that the weights stage found; None, loudly, if it found none.

    Raises:
        UserError: they are required and not there, or not what the stage found.
    """
    if config.inception == "off":
        return None
    wanted = answer()
    if wanted is not None:
        return _weights_again(config, wanted)
    if config.inception == "require":
        raise UserError(f"evaluate.inception is require and the weights are not at hand: {put()}")
    click.secho(f"FID IS SKIPPED: no Inception weights; {put()}", fg="yellow", bold=True, err=True)
    return None


def _weights_again(config: EvaluateConfig, wanted: str | None) -> Path:
    """The weights whose digest data/weights.json has."""
    found = at_hand(config)
    if found is None:
        raise UserError(f"Inception's weights are gone: {put()}, or set evaluate.inception: off")
    if sha256(found) != wanted:
        raise UserError(f"{found} is not what {paths.WEIGHTS_CARD} says: run `make weights`, then `dvc repro`")
    return found
