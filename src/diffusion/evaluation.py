"""Judging samples: moments of images, references of real ones, and the distances between them."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from diffusion import paths
from diffusion.config import EvaluateConfig, Params
from diffusion.data import UNREADABLE, read_npz, real_images
from diffusion.distributed import ALONE, World, joined
from diffusion.errors import UserError
from diffusion.features import (
    INCEPTION_FILE,
    EfficientNetLite0,
    Extractor,
    Inception,
    WeightsUnavailableError,
    find_inception_weights,
)
from diffusion.images import rgb
from diffusion.metrics import Moments, frechet_distance
from diffusion.runtime import keep_freed_memory, resolve_device

AGAIN = "run `dvc repro -sf reference`"  # -s: without it, -f would force the download too


@dataclass(frozen=True)
class Reference:
    """Moments of real images, and the key that says of which images and by which extractor."""

    mean: np.ndarray
    cov: np.ndarray
    key: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write an npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, mean=self.mean, cov=self.cov, key=json.dumps(self.key, sort_keys=True))

    @staticmethod
    def load(path: Path, extractor: Mapping[str, str], **expected: object) -> "Reference":
        """Read a reference made by the extractor described by `extractor`, with `expected` (split, images) in its key.

        Raises:
            UserError: the file is missing or damaged, or was made by another extractor or of other images.
        """
        try:
            mean, cov, text = read_npz(path, "mean", "cov", "key")
            reference = Reference(mean, cov, json.loads(str(text)))
            then, now = {**reference.key, **reference.key["extractor"]}, {**extractor, **expected}
        except (*UNREADABLE, TypeError) as error:
            raise UserError(f"{path} cannot be used ({error}): {AGAIN}") from None
        changed = "; ".join(f"{k} was {then.get(k)}, is {v}" for k, v in now.items() if then.get(k) != v)
        if changed:
            raise UserError(f"{path} is by another extractor or of other images ({changed}): {AGAIN}")
        return reference


def moments_of(
    images: np.ndarray,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    what: str,
    world: World = ALONE,
) -> Moments:
    """Moments of the features of uint8 (N, H, W, C) images (alpha is ignored), with a progress bar called `what`.

    The ranks of `world` share the batches; each returns the moments of all of them, equal to a single process's but for
    float64 rounding, because every image is in the same batch.

    Raises:
        UserError: a feature is not finite.
    """
    extractor.to(device)
    parts = world.gather(world.together(lambda: _moments(images, extractor, batch_size, device, what, world)))
    if parts:
        for other in parts[1:]:
            parts[0].merge(other)
    merged: Moments = world.broadcast(parts and parts[0])
    return merged


def _moments(
    images: np.ndarray, extractor: Extractor, batch_size: int, device: torch.device, what: str, world: World
) -> Moments:
    """Moments of this rank's share of the batches."""
    moments = Moments(extractor.dim)
    count = -(-len(images) // batch_size)
    mine = [images[k * batch_size : (k + 1) * batch_size] for k in world.share(count)]
    pace = 0.5 if sys.stderr.isatty() else 30
    name = what if world.size == 1 else f"{what} (1 of {world.size} processes)"
    with tqdm(total=sum(map(len, mine)), unit=" images", desc=name, mininterval=pace, disable=not world.is_main) as bar:
        for batch in mine:
            moments.update(extractor(torch.from_numpy(rgb(batch).copy()).to(device).permute(0, 3, 1, 2)))
            bar.update(len(batch))
    return moments


def make_reference(
    images: np.ndarray,
    split: str,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    world: World = ALONE,
) -> Reference:
    """Reference of all `images`, which are the first of `split`; the ranks of `world` share the work."""
    moments = moments_of(images, extractor, batch_size, device, f"reference {extractor.metric}", world)
    key = {
        "split": split,
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "images_sha256": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "extractor": extractor.describe(),
    }
    return Reference(moments.mean, moments.cov, key)


def write_references(params: Params, folder: Path = paths.REFERENCE) -> None:
    """The reference stage: reference/fd_lite0.npz, and reference/fid.npz if `evaluate.inception` and the weights allow.

    A file of an earlier run that this one does not write is removed.

    Raises:
        UserError: the split has too few images, fewer images than features are asked for, or Inception is required and
            its weights cannot be had.
    """
    config = params.evaluate
    keep_freed_memory()
    with joined(config.device) as (world, device):
        images = world.together(lambda: real_images(config.reference_split))
        weights = world.broadcast(world.together(lambda: _inception_weights(config) if world.is_main else None))
        extractors = world.together(lambda: _extractors(config, weights, len(images), speak=world.is_main))
        if world.is_main:
            (folder / "fid.npz").unlink(missing_ok=True)
        for extractor in extractors:
            chosen = images[: reference_images(config, extractor)]
            reference = make_reference(chosen, config.reference_split, extractor, config.batch_size, device, world)
            if world.is_main:
                reference.save(folder / f"{extractor.metric}.npz")


def reference_images(config: EvaluateConfig, extractor: Extractor) -> int:
    """How many real images, the first of the split, `extractor` is given."""
    return config.inception_images if isinstance(extractor, Inception) else config.reference_images


def evaluate(
    params: Params, samples: Path, about: Mapping[str, Any], folder: Path = paths.REFERENCE, world: World = ALONE
) -> dict[str, Any]:
    """Distances of the images in `samples` (npz) to the references in `folder`; the ranks of `world` share the work.

    {"fd_lite0": value, "fid": value if there is a reference for it, "about": [{"metric": its name, ...}, ...]};
    `about` says how the samples were made and is copied beside each number. No FID with `evaluate.inception: off`.

    Raises:
        UserError: the samples are not uint8 images or too few, or a reference does not fit, in shape for example.
    """
    config = params.evaluate
    device = resolve_device(config.device)  # "cuda" is the GPU of this rank
    keep_freed_memory()
    images, judges = world.together(lambda: _judges(config, samples, folder))
    result: dict[str, Any] = {"about": []}  # a list: `dvc metrics` shows the numbers alone
    for extractor, reference in judges:
        chosen = images[: config.inception_images] if isinstance(extractor, Inception) else images
        moments = moments_of(chosen, extractor, config.batch_size, device, extractor.metric, world)
        if world.is_main:  # the distance is one process's work
            result[extractor.metric] = frechet_distance(moments.mean, moments.cov, reference.mean, reference.cov)
        result["about"].append(
            {"metric": extractor.metric, "samples": len(chosen), "reference": reference.key, **about}
        )
    shared: dict[str, Any] = world.broadcast(result)
    return shared


def load_samples(path: Path) -> np.ndarray:
    """uint8 (N, H, W, C), N >= 2.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        (images,) = read_npz(path, "images")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro sample`") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images ({error}): run `dvc repro -sf sample`") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] > 4 or len(images) < 2:
        raise UserError(f"{path} holds {images.dtype} {images.shape}, not two or more uint8 images (N, H, W, C)")
    return images


def _judges(
    config: EvaluateConfig, samples: Path, folder: Path
) -> tuple[np.ndarray, list[tuple[Extractor, Reference]]]:
    """The samples, and with what they are scored."""
    images = load_samples(samples)
    extractors: list[Extractor] = [EfficientNetLite0()]
    if config.inception == "require" or (config.inception == "auto" and (folder / "fid.npz").exists()):
        if len(images) < Inception.dim:
            raise UserError(
                f"FID needs at least {Inception.dim} samples and there are {len(images)}: raise sample.num_images, or "
                "set evaluate.inception: off"
            )
        extractors.append(Inception(_weights_again(config)))
    references = [
        Reference.load(
            folder / f"{e.metric}.npz",
            e.describe(),
            split=config.reference_split,
            images=reference_images(config, e),
            image_shape=list(images.shape[1:]),
        )
        for e in extractors
    ]
    return images, list(zip(extractors, references, strict=True))


def _inception_weights(config: EvaluateConfig) -> Path | None:
    """Inception's weights as `evaluate.inception` says; None, loudly, if there are none."""
    if config.inception == "off":
        return None
    try:
        return find_inception_weights(config)
    except WeightsUnavailableError as error:
        place = f"put {INCEPTION_FILE} into {paths.WEIGHTS}"
        if config.inception == "require":
            raise UserError(f"evaluate.inception is require and the weights are missing ({error}): {place}") from None
        skipped = f"FID IS SKIPPED: no Inception weights ({error}); {place}, {AGAIN}, then `dvc repro`"
        click.secho(skipped, fg="yellow", bold=True, err=True)
        return None


def _extractors(config: EvaluateConfig, weights: Path | None, available: int, *, speak: bool) -> list[Extractor]:
    """fd_lite0's always, Inception's if there are weights; for references from `available` images."""
    extractors: list[Extractor] = [EfficientNetLite0()]
    if weights:
        inception = Inception(weights)
        if speak and not inception.published:
            mine = (
                f"evaluate.inception_weights = {config.inception_weights}: not the 2015-12-05 weights, so this `fid` "
            )
            click.secho(mine + "is comparable with no published number", fg="yellow", bold=True, err=True)
        extractors.append(inception)
    for extractor in extractors:
        _check_counts(config, extractor, available)
    return extractors


def _check_counts(config: EvaluateConfig, extractor: Extractor, available: int) -> None:
    count = reference_images(config, extractor)
    if count > available:
        raise UserError(f"{count} reference images are asked for and {config.reference_split} has {available}")
    if isinstance(extractor, Inception) and count < extractor.dim:
        raise UserError(
            f"evaluate.inception_images = {count}: FID needs at least {extractor.dim} images a side; raise it, or set "
            "evaluate.inception: off"
        )


def _weights_again(config: EvaluateConfig) -> Path:
    """The weights that the reference was made with."""
    try:
        return find_inception_weights(config)
    except WeightsUnavailableError as error:
        raise UserError(
            f"the reference's Inception weights are gone ({error}): put {INCEPTION_FILE} into "
            f"{paths.WEIGHTS}, or set evaluate.inception: off"
        ) from None
