"""Sets of uint8 images in files: the sample stage's npz, any npz, a folder of pictures, CIFAR-10."""

import os
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffusion import paths
from diffusion.data import SUFFIXES, UNREADABLE, read_npz
from diffusion.errors import UserError

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of Pillow: 8 bits a channel; it clips the others
NAMED = {"cifar10:train": paths.CIFAR10_TRAIN, "cifar10:test": paths.CIFAR10_TEST}


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


def open_images(name: str) -> np.ndarray:
    """uint8 (N, H, W, C), N >= 2, of `name`: cifar10:train, cifar10:test, an npz file with `images`, or a folder.

    Raises:
        UserError: nothing is there, or something else than uint8 images of one size.
    """
    path = NAMED.get(name, Path(name))
    if path.is_dir():
        return checked(_pictures(path), path)
    try:
        return checked(_mapped(path), path)
    except FileNotFoundError:
        hint = "run `dvc repro download`" if name in NAMED else f"give {', '.join(NAMED)}, an npz file or a folder"
        raise UserError(f"{path} is missing: {hint}") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images ({error}): give uint8 (N, H, W, C)") from None


def checked(images: np.ndarray, where: object) -> np.ndarray:
    """`images`, which `where` holds.

    Raises:
        UserError: they are not two or more uint8 images (N, H, W, C) with 1 to 4 channels; the line says what to do.
    """
    if images.dtype.kind == "f" and images.size:
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


def _pictures(folder: Path) -> np.ndarray:
    """The pictures anywhere in `folder`, in the order of their paths, as RGB."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pictures = list(pool.map(_picture, found))
    for path, picture in zip(found, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = f"{picture.shape[:2]} pixels and {found[0].name} {pictures[0].shape[:2]}"
            raise UserError(f"{folder}: {path.name} has {sizes}: bring all to one size first")
    return np.stack(pictures)


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise UserError(f"{path} has pixels of mode {image.mode}, not 8 bits a channel: scale it to 0..255")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise UserError(f"{path} is damaged (no picture): repair or remove it") from None
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged ({error}): repair or remove it") from None
