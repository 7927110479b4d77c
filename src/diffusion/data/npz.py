"""Arrays in npz files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from diffusion.errors import UserError

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
