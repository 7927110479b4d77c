"""Images as tensors: the exact uint8 <-> [-1, 1] map, the train/validation split, and batches by (seed, step)."""

import dataclasses
import hashlib
import json
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion import paths
from diffusion.data.npz import UNREADABLE, read_npz
from diffusion.data.pixels import to_tensor
from diffusion.errors import UserError
from diffusion.runtime import generator

RESIDENT = 0.4  # of a GPU's free memory, at most, for the training images
MPS_BYTES = 2 * 2**30  # the same on MPS, which shares the host's memory
SPLIT_SEED = 0
READ = 64  # images read at once from a map, of which each may bring up to 2 MiB of pages into memory


def digest(shape: tuple[int, ...], chunks: Iterable[np.ndarray], labels: np.ndarray) -> str:
    """sha256 of `shape` (N, H, W, C), of the pixels, which come in `chunks`, and of labels: a data set's identity."""
    sha = hashlib.sha256(f"{shape} {labels.shape}".encode())
    for chunk in chunks:
        sha.update(np.ascontiguousarray(chunk).data)
    sha.update(np.ascontiguousarray(labels).data)
    return sha.hexdigest()


def split(labels: np.ndarray, val_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (train, validation) indices; validation holds each class in proportion to its share of `labels` (N,).

    A function of the labels alone, whatever params.yaml's seed is: validation losses of two seeds are of the same
    images. Each class keeps at least one image for training.

    Raises:
        UserError: there are not so many images, or a class would have none for training.
    """
    classes, counts = np.unique(labels, return_counts=True)
    most = len(labels) - len(classes)
    if not 1 <= val_images <= most:
        each = f", of which each of {len(classes):,} classes keeps one for training" if len(classes) > 1 else ""
        advice = f"set it from 1 to {most:,}" if most else "give more images a class, or set model.num_classes: null"
        raise UserError(f"data.val_images = {val_images:,} cannot be split from {len(labels):,} images{each}: {advice}")
    exact, spare = counts * val_images / len(labels), counts - 1
    quota = np.minimum(np.floor(exact).astype(int), spare)
    while quota.sum() < val_images:  # the largest remainder next
        quota[np.argmax(np.where(quota < spare, exact - quota, -np.inf))] += 1
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, quota, strict=True)]
    val = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), val), val


def real_images(split: str) -> np.ndarray:
    """uint8 (N, H, W, C) of the prepare stage, "train" or "test", mapped: what is read is all that is in memory.

    Raises:
        UserError: they are missing or damaged, or the source has no test images.
    """
    path = {"train": paths.TRAIN_IMAGES, "test": paths.TEST_IMAGES}[split]
    try:
        images: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)  # c: torch wants it writable; none writes
    except FileNotFoundError:
        if split == "test" and paths.TRAIN_IMAGES.exists():
            raise UserError("data.source has no test images: set evaluate.reference_split: train") from None
        raise UserError(f"{path} is missing: run `dvc repro prepare`") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not usable ({error}): run `dvc repro -sf prepare`") from None
    return images


def releases(images: np.ndarray) -> Callable[[], None] | None:
    """What takes the pages read so far of mapped `images` out of this process's memory; they stay in the page cache."""
    pages = images.base
    while isinstance(pages, np.ndarray):  # images may be a part of what is mapped
        pages = pages.base
    if not isinstance(pages, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return lambda: pages.madvise(mmap.MADV_DONTNEED)  # nothing is lost: no page was written to


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, C), perhaps mapped; which of them are for training and validation; digest and labels."""

    images: Tensor
    train: Tensor  # int64 indices
    val: Tensor
    digest: str
    labels: Tensor  # int64 (N,)
    release: Callable[[], None] | None = None  # of mapped pages; None = the images are in memory, or on a GPU

    @staticmethod
    def load() -> "Dataset":
        """What the prepare stage wrote.

        Raises:
            UserError: it is missing or damaged.
        """
        images = real_images("train")
        try:
            train, val = read_npz(paths.SPLIT, "train", "val")
            card = json.loads(paths.DATA_CARD.read_text())
            labels = np.load(paths.TRAIN_LABELS, allow_pickle=False)
        except UNREADABLE as error:
            raise UserError(f"{paths.PREPARED} is not usable ({error}): run `dvc repro prepare`") from None
        if max(train.max(), val.max()) >= len(images) or len(labels) != len(images):
            raise UserError(f"{paths.PREPARED} does not belong to {paths.IMAGES}: run `dvc repro -sf prepare`")
        return Dataset(
            torch.from_numpy(images),
            torch.from_numpy(train),
            torch.from_numpy(val),
            card["digest"],
            torch.from_numpy(labels.astype(np.int64)),
            releases(images),
        )

    @property
    def identity(self) -> str:
        """Hex digits of the images, the labels and how they are split: all that a training can see of them."""
        parts = (np.frombuffer(self.digest.encode(), np.uint8), self.train.numpy(), self.val.numpy())
        return digest(tuple(map(len, parts)), parts, np.empty(0))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), as networks see it."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def read(self, rows: Tensor) -> Tensor:
        """uint8 (len(rows), H, W, C), copied; mapped pages are given back, so that memory does not grow with N."""
        if self.release is None:
            return self.images.index_select(0, rows)
        parts = []
        for some in rows.split(READ):
            parts.append(self.images.index_select(0, some))
            self.release()
        return torch.cat(parts)


class Batches:
    """Training batches as a function of (seed, step): shuffled without replacement epoch by epoch, flipped at random.

    The images stay uint8: on `device` if they fit there, else mapped. One batch is converted at a time. `share` names
    the positions of each batch that are wanted (a rank's part of it): what is at a position does not depend on it.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        seed: int,
        *,
        flip: bool,
        device: torch.device,
        share: range | None = None,  # contiguous; None = all
    ) -> None:
        self.resident = fits(data.images, device)
        self.data = dataclasses.replace(data, images=data.images.to(device), release=None) if self.resident else data
        self.train = data.train.to(self.data.images.device)
        self._labels = data.labels.to(self.data.images.device)
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.device = device
        self.share = slice(share.start, share.stop) if share is not None else slice(None)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """int64 (B,): which images make the batch of `step` (from 0); an epoch ends inside a batch, none is dropped."""
        position, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while position < end:
            epoch, offset = divmod(position, len(self.train))
            parts.append(self._permutation(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return self.train[torch.cat(parts)]

    def __call__(self, step: int) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1] on the device; B = the size of the share."""
        rows = self.indices(step)[self.share]
        batch = self.data.read(rows)
        if not self.resident:
            pinned = batch.pin_memory() if self.device.type == "cuda" else batch
            batch = pinned.to(self.device, non_blocking=True)
        if self.flip:  # drawn where they are used: a copy to the GPU would wait for it
            source = generator(self.seed, "flip", step, self.device)
            coins = torch.rand(self.batch_size, generator=source, device=self.device)[self.share] < 0.5
            batch = torch.where(coins[:, None, None, None], batch.flip(2), batch)
        return to_tensor(batch)

    def labels(self, step: int) -> Tensor:
        """int64 (B,) on the device: the classes of the same images."""
        return self._labels[self.indices(step)[self.share]].to(self.device, non_blocking=True)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            order = torch.randperm(len(self.train), generator=generator(self.seed, "order", epoch))
            self._order = order.to(self.train.device)
        return self._order


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether `images` may live on the GPU `device` for good: if they take less than RESIDENT of what is free."""
    if device.type == "cuda":
        return images.nbytes <= RESIDENT * torch.cuda.mem_get_info(device)[0]
    return device.type == "mps" and images.nbytes <= MPS_BYTES
