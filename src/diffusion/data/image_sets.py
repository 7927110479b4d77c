"""Sets of uint8 images in files: the sample stage's npz, any npz, a folder of pictures, CIFAR-10."""

import os
import struct
import zipfile
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffusion import paths
from diffusion.data.image_streams import Pictures, Stream, packed
from diffusion.data.npz import UNREADABLE, read_npz
from diffusion.errors import UserError

NAMED = {"cifar10:train": paths.CIFAR10_TRAIN, "cifar10:test": paths.CIFAR10_TEST}

Images = TypeVar("Images", np.ndarray, np.ndarray | Stream)


def load_samples(path: Path) -> np.ndarray:
    """uint8 (N, H, W, C), N >= 2: `images` of an npz file; mapped if it is not compressed, so that any number fits.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return checked(_mapped(path), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro sample`") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images ({error}): run `dvc repro -sf sample`") from None


def open_images(name: str, count: int | None = None) -> np.ndarray | Stream:
    """uint8 (N, H, W, C), N >= 2, of `name`: cifar10:train, cifar10:test, an npz file with `images`, or a folder.

    The first `count`; None = all. Only what is asked for is in memory.

    Raises:
        UserError: nothing is there, or something else than uint8 images of one size.
    """
    path = NAMED.get(name, Path(name))
    try:
        found = Pictures(path, count) if path.is_dir() else packed(path, count)
        return checked(_mapped(path)[:count] if found is None else found, path)
    except FileNotFoundError:
        hint = "run `dvc repro download`" if name in NAMED else f"give {', '.join(NAMED)}, an npz file or a folder"
        raise UserError(f"{path} is missing: {hint}") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images ({error}): give uint8 (N, H, W, C)") from None


def checked(images: Images, where: object) -> Images:
    """`images`, which `where` holds.

    Raises:
        UserError: they are not two or more uint8 images (N, H, W, C) with 1 to 4 channels; the line says what to do.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.size:
        low, high = float(images.min()), float(images.max())
        seen = "with NaN or infinity" if not np.isfinite(low + high) else f"from {low:g} to {high:g}"
        raise UserError(f"{where} holds {images.dtype} {seen}, not uint8 images: scale to 0..255, round, save as uint8")
    fits = images.dtype == np.uint8 and images.ndim == 4 and all(images.shape)
    if not fits or images.shape[3] > 4 or len(images) < 2:
        raise UserError(f"{where} holds {images.dtype} {images.shape}, not two or more uint8 images (N, H, W, C)")
    return images


def _mapped(path: Path) -> np.ndarray:
    """`images` of an npz file, its checksum verified; raises one of UNREADABLE."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("images.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return read_npz(path, "images")[0]
        with archive.open(member) as content:
            while content.read(2**20):  # to the end, where zipfile compares checksums
                pass
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the member's name and extra field
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            return read_npz(path, "images")[0]
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject or not shape or not all(shape):
            return read_npz(path, "images")[0]
        return np.memmap(path, dtype, "c", file.tell(), shape).view(np.ndarray)  # c: torch wants it writable
