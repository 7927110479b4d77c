"""Sets of images that do not fit into memory and cannot be mapped: pictures in a folder, a compressed npz file."""

import math
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffusion.data.npz import UNREADABLE
from diffusion.errors import UserError

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of Pillow: 8 bits a channel; it clips the others

Found = TypeVar("Found")


class Stream:
    """uint8 (N, H, W, C): what a slice of it names is read then, and kept by nobody."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        raise NotImplementedError


class Pictures(Stream):
    """The pictures anywhere in a folder, in the order of their paths, as RGB."""

    def __init__(self, folder: Path, count: int | None = None) -> None:
        """The first `count`; None = all.

        Raises:
            UserError: there are none, or one is damaged, of another size, or of more than 8 bits a channel.
        """
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not found:
            raise UserError(f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))})")
        self.files = found[:count]
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        sizes = list(self._pool.map(_size, self.files))
        for path, size in zip(self.files, sizes, strict=True):
            if size != sizes[0]:
                words = f"{size} pixels and {self.files[0].name} {sizes[0]}"
                raise UserError(f"{folder}: {path.name} has {words}: bring all to one size first")
        super().__init__((len(self.files), *sizes[0], 3))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Raises UserError if a picture is damaged."""
        return np.stack(list(self._pool.map(_pixels, self.files[rows])))


class Packed(Stream):
    """`images` of a compressed npz file, unpacked from its beginning on; going back begins anew."""

    def __init__(self, path: Path, begin: int, shape: tuple[int, ...]) -> None:
        """`begin`: of the pixels in images.npy."""
        super().__init__(shape)
        self._archive, self._begin = zipfile.ZipFile(path), begin
        self._content = self._archive.open("images.npy")

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        size = math.prod(self.shape[1:])
        self._content.seek(self._begin + start * size)
        pixels = self._content.read((stop - start) * size)
        return np.frombuffer(pixels, np.uint8).reshape(-1, *self.shape[1:])


def packed(path: Path, count: int | None = None) -> Packed | None:
    """The first `count` images of a compressed npz file, its checksum verified; None = it is not one of uint8 images.

    Raises one of UNREADABLE if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("images.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            return None
        with archive.open(member) as content:
            if np.lib.format.read_magic(content) != (1, 0):
                return None
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
            begin = content.tell()
            if dtype != np.uint8 or fortran or len(shape) != 4 or begin + math.prod(shape) != member.file_size:
                return None
            while content.read(2**20):  # to the end, where zipfile compares checksums
                pass
    return Packed(path, begin, (len(range(shape[0])[:count]), *shape[1:]))


def _size(path: Path) -> tuple[int, int]:
    """(H, W), by the header alone."""

    def size(image: Image.Image) -> tuple[int, int]:
        if image.mode not in MODES:
            raise UserError(f"{path} has pixels of mode {image.mode}, not 8 bits a channel: scale it to 0..255")
        return image.height, image.width

    return _of_picture(path, size)


def _pixels(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return _of_picture(path, lambda image: np.asarray(image.convert("RGB")))


def _of_picture(path: Path, read: Callable[[Image.Image], Found]) -> Found:
    try:
        with Image.open(path) as image:
            return read(image)
    except UnidentifiedImageError:
        raise UserError(f"{path} is damaged (no picture): repair or remove it") from None
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged ({error}): repair or remove it") from None


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})  # of picture files
