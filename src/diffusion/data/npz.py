"""Arrays in npz and npy files: mapped or unpacked by parts, so that any number of images fits."""

import copy
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from diffusion.errors import UserError

UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
WHOLE = 2**32  # bytes of an array that is read as a whole
LABELS = {"images": "labels", "x": "y", "x_train": "y_train", "arr_0": "arr_1"}  # by the name of the images


class Unusable(Exception):  # noqa: N818
    """Why a source, or one picture of it, cannot be used, and what to do; whoever catches it adds the name."""


class Stream:
    """uint8 (N, H, W, C): what a slice of it names is read then, and kept by nobody."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        raise NotImplementedError

    def first(self, count: int) -> "Stream":
        """The first `count` of them."""
        some = copy.copy(self)
        some.shape = (min(count, len(self)), *self.shape[1:])
        return some


Images = TypeVar("Images", np.ndarray, np.ndarray | Stream)


class Packed(Stream):
    """Images in a compressed npz file, unpacked from its beginning on; going back begins anew."""

    def __init__(self, path: Path, name: str, begin: int, shape: tuple[int, ...]) -> None:
        """`begin`: of the pixels in the member `name`."""
        super().__init__(shape)
        self._archive, self._begin = zipfile.ZipFile(path), begin
        self._content = self._archive.open(f"{name}.npy")

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        size = math.prod(self.shape[1:])
        self._content.seek(self._begin + start * size)
        pixels = self._content.read((stop - start) * size)
        return np.frombuffer(pixels, np.uint8).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class Header:
    """What an npy file says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    begin: int  # of the array's bytes

    @property
    def are_images(self) -> bool:
        """uint8 (N, H, W, C), or (N, H, W) of grey images."""
        grey, coloured = len(self.shape) == 3, len(self.shape) == 4
        few = bool(self.shape) and 1 <= self.shape[-1] <= 4
        return self.dtype == np.uint8 and ((coloured and few) or (grey and not few))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an npz file; raises one of UNREADABLE if it is not one or lacks a name."""
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    with archive:
        return [archive[name] for name in names]


def headers(path: Path) -> dict[str, Header]:
    """Of the arrays in an npz file, by name; raises one of UNREADABLE."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    found[name.removesuffix(".npy")] = _header(file)
    return found


def name_of_images(found: Mapping[str, Header]) -> str:
    """Which array of an npz file holds the images: `images`, `x_train`, or the only one that can.

    Raises:
        Unusable: none can, or several; the message has all their names.
    """
    fitting = [name for name, header in found.items() if header.are_images]
    if "images" in found or "x_train" in fitting:
        return "images" if "images" in found else "x_train"
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {header}" for name, header in found.items()) or "no array"
        problem = "several arrays may be the images" if fitting else "none is uint8 (N, H, W, C) or (N, H, W)"
        raise Unusable(f"it holds {listed}: {problem}; save them as uint8 under the name images")
    return fitting[0]


def open_array(path: Path, name: str) -> np.ndarray | Stream:
    """An array of an npz file, its checksum verified: mapped, or if it is compressed, images that are read by parts.

    What is neither (in Fortran order, of another type and compressed) is read as a whole, if it has less than WHOLE
    bytes. Raises one of UNREADABLE.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            header = _header(file)
            while file.read(2**20):  # to the end, where zipfile compares checksums
                pass
    shape, size = header.shape, header.begin + math.prod(header.shape) * header.dtype.itemsize
    if not header.dtype.hasobject and size != member.file_size:
        raise ValueError(f"{name} is {header}, which is {size:,} bytes, and has {member.file_size:,}")
    if header.fortran or header.dtype.hasobject or not shape or not all(shape):
        return _whole(path, name, size)
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(member.header_offset + 26)  # mapped copy-on-write below: torch wants arrays that are writable
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the member's name and extra field
            return np.memmap(path, header.dtype, "c", file.tell() + header.begin, shape).view(
                np.ndarray
            )  # c: for torch
    if not header.are_images:
        return _whole(path, name, size)
    return Packed(path, name, header.begin, shape if len(shape) == 4 else (*shape, 1))


def _whole(path: Path, name: str, size: int) -> np.ndarray:
    if size > WHOLE:
        raise ValueError(f"{name} has {size:,} bytes and cannot be read by parts: save uint8 images in C order")
    return read_npz(path, name)[0]


def labels_for(
    path: Path, images: str, count: int, found: Mapping[str, Header]
) -> tuple[str, np.ndarray] | tuple[None, None]:
    """Name and integers (count,) of the labels of the array called `images` in an npz file; None if there are none.

    Raises:
        Unusable: there are others; or one of UNREADABLE.
    """
    name = next((name for name in ("labels", "y", LABELS.get(images, "labels")) if name in found), None)
    if name is None:
        return None, None
    header = found[name]
    if header.shape not in ((count,), (count, 1)) or header.dtype.kind not in "iu":
        if name == "arr_1":  # which need not be labels
            return None, None
        raise Unusable(f"{name} is {header}, not integers ({count},): give one label an image, or no {name}")
    return name, read_npz(path, name)[0].reshape(count)


def load_samples(path: Path) -> np.ndarray:
    """uint8 (N, H, W, C), N >= 2: `images` of the sample stage's file, mapped if it is not compressed.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        images = open_array(path, "images")
        return checked(images[:] if isinstance(images, Stream) else images, path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro sample`") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not an npz file with images ({error}): run `dvc repro -sf sample`") from None


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
        channels_first = images.ndim == 4 and images.shape[1] in range(1, 5)
        advice = ": transpose(0, 2, 3, 1)" if channels_first else ""
        found = f"{images.dtype} {images.shape}"
        raise UserError(f"{where} holds {found}, not two or more uint8 images (N, H, W, C){advice}")
    return images


def _header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"npy format {version} is unknown")
    shape, fortran, dtype = HEADERS[version](file)
    return Header(shape, fortran, dtype, file.tell())
