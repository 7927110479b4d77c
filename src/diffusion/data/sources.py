"""The training images that `data.source` names, whatever holds them, as one stream of equal uint8 arrays."""

import io
import lzma
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from diffusion import paths
from diffusion.data.image_streams import SUFFIXES
from diffusion.data.npz import UNREADABLE, read_npz
from diffusion.errors import UserError

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by model.image_channels
EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
LARGEST = 64 * 2**20  # bytes of one picture file
CHUNK = 2048  # images
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Picture = tuple[str, Callable[[], bytes]]  # path inside the source, with slashes; how to read it


@dataclass(frozen=True)
class Source:
    """Images with labels, read chunk by chunk, so that a million needs no more memory than a thousand."""

    shape: tuple[int, int, int, int]  # (N, H, W, C)
    labels: np.ndarray  # integers (N,)
    chunks: Callable[[], Iterator[np.ndarray]]  # uint8 (n, H, W, C) each, N images in all
    test: "Source | None" = None


def open_source(path: Path, size: int, channels: int) -> Source:
    """What `path` holds, as images of `size` x `size` pixels with `channels` channels (1 grey, 3 RGB; 2, 4 with alpha).

    A folder with train.npz (and test.npz), as the download stage writes; an npz file with `images` uint8 (N, H, H, C)
    and, if there are any, `labels`; a folder or zip of square pictures in any depth, in the order of their paths, which
    are converted and resized. Their labels number the first folders, if every picture lies in one; else they are 0.

    Raises:
        UserError: nothing usable is there, or a picture is damaged or not square (some while chunks are read).
    """
    with _explained(path):
        if path.is_dir() and (path / "train.npz").exists():
            test = path / "test.npz"
            return _arrays(path / "train.npz", size, channels, test if test.exists() else None)
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file()]
            return _pictures(path, [(p.relative_to(path).as_posix(), p.read_bytes) for p in files], size, channels)
        if path.suffix.lower() == ".npz":
            return _arrays(path, size, channels)
        archive = zipfile.ZipFile(path)  # stays open for its reader
        return _pictures(path, [(i.filename, _member(archive, i)) for i in archive.infolist()], size, channels)


# --- pictures


def _pictures(path: Path, found: Sequence[Picture], size: int, channels: int) -> Source:
    pictures = sorted((p for p in found if _is_picture(p[0])), key=lambda picture: picture[0])
    if not pictures:
        hint = ": run `dvc repro download`" if path == paths.CIFAR10 else ""
        raise UserError(f"data.source = {path} holds no pictures ({' '.join(sorted(SUFFIXES))}){hint}")

    def chunks() -> Iterator[np.ndarray]:
        resized = 0
        with _explained(path), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(pictures), CHUNK):
                decoded = list(pool.map(lambda p: _decode(path, p, size, channels), pictures[start : start + CHUNK]))
                resized += sum(was_resized for _, was_resized in decoded)
                yield np.stack([array for array, _ in decoded])
        if resized:
            tqdm.write(f"{path}: {resized:,} of {len(pictures):,} pictures were resized to {size} x {size} pixels")

    return Source((len(pictures), size, size, channels), _folder_labels([name for name, _ in pictures]), chunks)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _decode(path: Path, picture: Picture, size: int, channels: int) -> tuple[np.ndarray, bool]:
    """uint8 (size, size, channels), and whether it was resized."""
    name, read = picture
    try:
        image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(read())))
    except UnidentifiedImageError:
        raise UserError(f"data.source = {path}: {name} is damaged (no picture): repair or remove it") from None
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on broken PNG files
        raise UserError(f"data.source = {path}: {name} is damaged ({error}): repair or remove it") from None
    if image.mode not in EIGHT_BIT:
        raise UserError(f"data.source = {path}: {name} does not have 8 bits a channel ({image.mode}): convert it")
    if image.width != image.height:
        raise UserError(f"data.source = {path}: {name} has {image.width} x {image.height} pixels: crop it to a square")
    if channels in (1, 3) and image.has_transparency_data:  # what is transparent may have any colour: show it on white
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    resized = image.width != size
    image = image.convert(MODES[channels])
    image = image.resize((size, size), Image.Resampling.LANCZOS) if resized else image
    return np.asarray(image).reshape(size, size, channels), resized


def _folder_labels(names: Sequence[str]) -> np.ndarray:
    """Integers (N,): the number, in alphabetical order, of the first folder below what all paths have in common."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)))
    first = [parts[common] if len(parts) > common else None for parts in folders]
    if None in first:
        return np.zeros(len(names), dtype=np.uint8)
    classes = {name: number for number, name in enumerate(sorted({str(name) for name in first}))}
    return np.array([classes[str(name)] for name in first], dtype=np.min_scalar_type(len(classes) - 1))


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if info.file_size > LARGEST:  # zipfile yields no more than that, whatever the member really holds
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        try:
            return archive.read(info)
        except (RuntimeError, lzma.LZMAError) as error:  # a password, a compression that zipfile lacks
            raise ValueError(str(error)) from None

    return read


# --- arrays


def _arrays(path: Path, size: int, channels: int, test: Path | None = None) -> Source:
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        shape, fortran, dtype = _header(file)
    if dtype != np.uint8 or len(shape) != 4 or not shape[0] or fortran:
        raise ValueError(f"{path.name}: images are {dtype} {shape}, not uint8 (N, H, W, C) in C order")
    if shape[1:] != (size, size, channels):
        usable = shape[1] == shape[2] and shape[3] in MODES
        keys = f"set model.image_size: {shape[1]} and model.image_channels: {shape[3]}"
        advice = keys if usable else "they must be square, with 1 to 4 channels"
        raise UserError(f"{path}: images are {shape[1:]}, not {(size, size, channels)}: {advice}")
    labels = _labels(path, shape[0])

    def chunks() -> Iterator[np.ndarray]:
        with _explained(path), zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            _header(file)
            for start in range(0, shape[0], CHUNK):
                count = min(CHUNK, shape[0] - start)
                content = file.read(count * size * size * channels)
                yield np.frombuffer(content, np.uint8).reshape(count, size, size, channels)

    return Source(shape, labels, chunks, _arrays(test, size, channels) if test else None)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"npy format {version} is unknown")
    return HEADERS[version](file)


def _labels(path: Path, count: int) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        if "labels.npy" not in archive.namelist():
            return np.zeros(count, dtype=np.uint8)
    (labels,) = read_npz(path, "labels")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path.name}: labels are {labels.dtype} {labels.shape}, not integers ({count},)")
    return labels


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        hint = ": run `dvc repro download`" if path.is_relative_to(paths.CIFAR10) else ""
        raise UserError(f"data.source: {error.filename} is not there{hint}") from None
    except UNREADABLE as error:
        raise UserError(f"data.source = {path} cannot be used ({error})") from None
