"""References: moments and some features of real images, with a key that says of which and made how."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.atomic import replacing
from diffusion.data.npz import UNREADABLE, headers, read_npz
from diffusion.data.sources import STATISTICS, statistics_in
from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.errors import UserError
from diffusion.metrics.extraction import AGAIN, Images, features_of, released
from diffusion.metrics.features import Extractor

CHUNK = 1024  # images hashed at once, at most
CHUNK_BYTES = 2**26  # of these


@dataclass(frozen=True)
class Reference:
    """Moments of real images, the features of the first of them, and the key of what it all depends on."""

    mean: np.ndarray
    cov: np.ndarray
    key: Mapping[str, Any]
    features: Tensor | None = None  # float32 (n, d); None = not kept, or not read

    def save(self, path: Path) -> None:
        """Write an npz file: whole, or not at all."""
        features = np.empty((0, len(self.mean)), np.float32) if self.features is None else self.features.numpy()
        with replacing(path) as file:
            np.savez(file, mean=self.mean, cov=self.cov, key=json.dumps(self.key, sort_keys=True), features=features)

    @staticmethod
    def load(path: Path, extractor: Mapping[str, str], **expected: object) -> "Reference":
        """Read a reference made by the extractor described by `extractor`, with `expected` (split, images) in its key.

        Its features are read if `expected` names their number, kept.

        Raises:
            UserError: the file is missing or damaged, or was made by another extractor or of other images.
        """
        try:
            mean, cov, text = read_npz(path, "mean", "cov", "key")
            key = json.loads(str(text))
            features = torch.from_numpy(read_npz(path, "features")[0]) if expected.get("kept") else None
            then, now = {**key, **key["extractor"]}, {**extractor, **expected}
        except (*UNREADABLE, TypeError) as error:
            raise UserError(f"{path} cannot be used ({error}): {AGAIN}") from None
        changed = "; ".join(f"{k} was {then.get(k)}, is {v}" for k, v in now.items() if then.get(k) != v)
        if changed:
            raise UserError(f"{path} is by another extractor or of other images ({changed}): {AGAIN}")
        return Reference(mean, cov, key, features)


def holds_statistics(path: Path) -> bool:
    """Whether it is an npz file with mean and covariance of features, and no images."""
    try:
        found = headers(path) if path.suffix == ".npz" else {}
    except UNREADABLE:
        return False  # whoever reads it says what is wrong
    return statistics_in(found) is not None and not any(header.are_images for header in found.values())


def read_statistics(path: Path, dim: int, extractor: Mapping[str, str] | None = None) -> Reference:
    """Mean and covariance of `dim` features: a file of pytorch-fid's or EDM's (mu, sigma), or of Reference.save.

    The last says which extractor made it, which has to be the one described by `extractor`.

    Raises:
        UserError: the file is damaged, or of other features.
    """
    try:
        found = headers(path)
        names = statistics_in(found) or STATISTICS[0]
        shapes = [found[name].shape for name in names]
        if shapes != [(dim,), (dim, dim)]:
            raise UserError(
                f"{path} has statistics of shapes {shapes[0]} and {shapes[1]}, and the extractor has {dim} features: "
                "give the --extractor that made them"
            )
        if extractor and "key" in found:
            return Reference.load(path, extractor)
        mean, cov = read_npz(path, *names)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be used ({error}): give an npz file with mu and sigma") from None
    key = {"split": "statistics", "file": path.name, "extractor": dict(extractor or {})}
    return Reference(mean.astype(np.float64), cov.astype(np.float64), key)


def make_reference(
    images: Images,
    split: str,
    extractor: Extractor,
    batch_size: int,
    device: torch.device,
    world: World = SINGLE_PROCESS,
    *,
    keep: int = 0,
) -> Reference:
    """Reference of all `images`, which are the first of `split`; the ranks of `world` share the work.

    The features of the first `keep` stay in it.
    """
    found = features_of(images, extractor, batch_size, device, f"reference {extractor.metric}", world, keep=keep)
    key = {
        "split": split,
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "images_sha256": pixels_sha256(images),
        "kept": len(found.kept),
        "extractor": extractor.describe(),
    }
    return Reference(found.moments.mean, found.moments.cov, key, found.kept)


def pixels_sha256(images: Images) -> str:
    """Hex digest of the pixels of (N, H, W, C) images, read in parts."""
    sha, release = hashlib.sha256(), released(images)
    step = max(1, min(CHUNK, CHUNK_BYTES // math.prod(images.shape[1:])))
    for start in range(0, len(images), step):
        sha.update(np.ascontiguousarray(images[start : start + step]).data)
        if release:
            release()
    return sha.hexdigest()
