"""Images as tensors: the exact uint8 <-> [-1, 1] map, the train/validation split, and batches by (seed, step)."""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import paths
from diffusion.errors import UserError
from diffusion.runtime import generator


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; channels-last in memory, so nothing is transposed."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float (N, C, H, W) -> uint8 (N, H, W, C): clamped to [-1, 1] and rounded; inverts `to_tensor` exactly."""
    scaled = images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an npz file; raises one of UNREADABLE if it is not one or lacks a name."""
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    with archive:
        return [archive[name] for name in names]


def load_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` uint8 (N, H, W, C) and `labels` uint8 (N,) of an npz file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        images, labels = read_npz(path, "images", "labels")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, or the stage that makes it") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images and labels ({error}): run its stage again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise UserError(f"{path}: images are {images.dtype} {images.shape}, not uint8 (N, H, W, C) with N labels")
    return images, labels


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """sha256 of shapes, pixels and labels: the identity of a data set."""
    sha = hashlib.sha256(f"{images.shape} {labels.shape}".encode())
    sha.update(np.ascontiguousarray(images).data)
    sha.update(np.ascontiguousarray(labels).data)
    return sha.hexdigest()


def split(labels: np.ndarray, val_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (train, validation) indices; validation holds each class in proportion to its share of `labels` (N,).

    Raises:
        UserError: `val_images` would leave no image for training, or not one of each class for validation.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= val_images <= len(labels) - len(classes):
        raise UserError(f"data.val_images = {val_images} cannot be split from {len(labels)} images: change it")
    exact = counts * val_images / len(labels)
    quota = np.floor(exact).astype(int)
    largest_remainders = np.argsort(quota - exact, kind="stable")[: val_images - quota.sum()]
    quota[largest_remainders] += 1
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, quota, strict=True)]
    val = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), val), val


def prepare(val_images: int, seed: int) -> None:
    """Write the split and the data card (digest, counts, channel statistics) of the downloaded training set."""
    images, labels = load_images(paths.CIFAR10_TRAIN)
    train, val = split(labels, val_images, seed)
    pixels = images[train].reshape(-1, images.shape[-1]) / 255.0
    card = {
        "digest": digest(images, labels),
        "train_images": len(train),
        "val_images": len(val),
        "image_shape": images.shape[1:],
        "channel_mean": pixels.mean(axis=0).round(6).tolist(),
        "channel_std": pixels.std(axis=0).round(6).tolist(),
    }
    paths.PREPARED.mkdir(parents=True, exist_ok=True)
    np.savez(paths.SPLIT, train=train, val=val)
    paths.DATA_CARD.write_text(json.dumps(card, indent=2) + "\n")


@dataclass(frozen=True)
class Dataset:
    """Training and validation images, uint8 (N, H, W, C), and the digest of the set they were split from."""

    train: Tensor
    val: Tensor
    digest: str

    @staticmethod
    def load() -> "Dataset":
        """The images of the download stage, split as the prepare stage says."""
        images, _ = load_images(paths.CIFAR10_TRAIN)
        try:
            train, val = read_npz(paths.SPLIT, "train", "val")
            card = json.loads(paths.DATA_CARD.read_text())
        except UNREADABLE as error:
            raise UserError(f"{paths.PREPARED} is not usable ({error}): run `dvc repro prepare`") from None
        return Dataset(torch.from_numpy(images[train]), torch.from_numpy(images[val]), card["digest"])


class Batches:
    """Training batches as a function of (seed, step): shuffled without replacement epoch by epoch, flipped at random.

    The images stay uint8 on `device`; one batch is converted at a time. `share` names the positions of each batch that
    are wanted (a rank's part of it): what is at a position does not depend on it.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int,
        *,
        flip: bool,
        device: torch.device,
        share: range | None = None,  # contiguous; None = all
    ) -> None:
        self.images = images.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.share = slice(share.start, share.stop) if share is not None else slice(None)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """int64 (B,): which images make the batch of `step` (from 0); an epoch ends inside a batch, none is dropped."""
        position, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while position < end:
            epoch, offset = divmod(position, len(self.images))
            parts.append(self._permutation(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def __call__(self, step: int) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1]; B = the size of the share."""
        device = self.images.device
        batch = self.images[self.indices(step)[self.share]]
        if self.flip:  # drawn where they are used: a copy to the GPU would wait for it
            source = generator(self.seed, "flip", step, device)
            coins = torch.rand(self.batch_size, generator=source, device=device)[self.share] < 0.5
            batch = torch.where(coins[:, None, None, None], batch.flip(2), batch)
        return to_tensor(batch)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            order = torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))
            self._order = order.to(self.images.device)
        return self._order
