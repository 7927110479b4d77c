"""Grids, strips and PNG files of uint8 images, with Pillow and NumPy alone."""

import io
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

WHITE = 255
COMPRESS_LEVEL = 6  # level 1 would save 0.05 ms a 32x32 image, of the 0.2 to 0.9 ms that writing its file takes


def grid(images: np.ndarray, columns: int, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Lay out uint8 (N, H, W, C) row by row -> uint8 (H', W', C), `columns` wide, the last row padded with white.

    Each pixel becomes scale x scale; `gap` white pixels (of the result) lie between images, none around them.

    Raises:
        ValueError: images of another shape or type, none at all, or a layout without columns.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (N, H, W, C)")
    if columns < 1 or gap < 0 or scale < 1:
        raise ValueError(f"no grid with columns={columns}, gap={gap}, scale={scale}")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height * scale + gap, width * scale + gap, channels), WHITE, dtype=np.uint8)
    cells[:count, : height * scale, : width * scale] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    canvas = cells.reshape(rows * cells.shape[1], columns * cells.shape[3], channels)
    return np.ascontiguousarray(canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap])


def zoom(images: np.ndarray, pixels: int = 64) -> int:
    """How many times images uint8 (..., H, W, C) can be enlarged without being higher than `pixels`; at least 1."""
    return max(1, pixels // images.shape[-3])


def strip(frames: np.ndarray, gap: int = 2, scale: int = 1) -> np.ndarray:
    """uint8 (S, N, H, W, C): S stages of N images -> uint8 (H', W', C), one row an image, one column a stage.

    Raises:
        ValueError: as `grid`.
    """
    if frames.ndim != 5:
        raise ValueError(f"frames are {frames.shape}, not (S, N, H, W, C)")
    stages, count, *shape = frames.shape
    return grid(frames.swapaxes(0, 1).reshape(count * stages, *shape), columns=stages, gap=gap, scale=scale)


def save_png(array: np.ndarray, path: Path) -> None:
    """Write uint8 (H, W) or (H, W, C), C = 1 to 4, to `path`: equal pixels, equal bytes; whole, or not at all.

    Raises:
        ValueError: another shape or type.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(array, path)


def save_all(images: np.ndarray, folder: Path, *, first: int = 0, workers: int | None = None) -> list[Path]:
    """Write uint8 (N, H, W, C), C = 1 to 4, as folder/00000.png ... from number `first`; the paths in that order.

    Raises:
        ValueError: as `save_png`.
    """
    written = [folder / f"{i:05d}.png" for i in range(first, first + len(images))]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(_write, images, written))
    return written


def remove_numbered(folder: Path) -> None:
    """Delete what `save_all` wrote into `folder`, and nothing else; there may be no such folder."""
    if folder.is_dir():
        for path in [p for p in folder.iterdir() if re.fullmatch(r"\d{5,}\.png", p.name)]:
            path.unlink()


def png(array: np.ndarray) -> bytes:
    """A PNG file of uint8 (H, W) or (H, W, C), C = 1 to 4."""
    file = io.BytesIO()
    _picture(array).save(file, format="PNG", compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def _picture(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (2,), (3,), (4,)) or array.ndim < 2:
        raise ValueError(f"a picture is uint8 (H, W) or (H, W, C), C = 1 to 4, not {array.dtype} {array.shape}")
    return Image.fromarray(array)


def _write(array: np.ndarray, path: Path) -> None:
    picture = _picture(array)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        picture.save(temporary, format="PNG", compress_level=COMPRESS_LEVEL)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
