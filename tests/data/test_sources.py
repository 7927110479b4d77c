"""Own images from folders, zips and npz files, against pictures whose pixels are known."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion.data import pictures, sources
from diffusion.data.pictures import Form
from diffusion.errors import UserError

RNG = np.random.default_rng(0)


def pixels(count: int, size: int = 16, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, kind)
    return buffer.getvalue()


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opened(path: Path, size: int | None = 16, channels: int = 3, **options: Any) -> sources.Source:
    form = {key: options.pop(key) for key in ("fit", "max_pixels") if key in options}
    return sources.open_source(path, Form(size, channels, **form), **options)


def images_of(source: sources.Source, step: int = 3) -> np.ndarray:
    return np.concatenate([source.images[i : i + step] for i in range(0, len(source.images), step)])


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        images_of(opened(path, **options))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_folder_zip_and_npz_hold_the_same(tmp_path: Path) -> None:
    images, labels = pixels(7), np.array([0, 0, 1, 1, 1, 2, 2], np.uint8)
    names = ["cat/1.png", "cat/b/2.PNG", "dog/0.png", "dog/1.png", "dog/2.png", "owl/a.png", "owl/b.png"]
    files = {name: encoded(image) for name, image in zip(names, images, strict=True)}
    clutter = {"cat/notes.txt": b"x", ".git/a.png": b"x", "dog/.hidden.png": b"x", "__MACOSX/cat/1.png": b"x"}
    np.savez_compressed(tmp_path / "own.npz", images=images, labels=labels)
    shuffled = dict(reversed({**files, **clutter}.items()))
    found = [
        folder_of(tmp_path / "own", shuffled),
        zip_of(tmp_path / "own.zip", shuffled),
        zip_of(tmp_path / "top.zip", {f"my/photos/{name}": content for name, content in files.items()}),
        tmp_path / "own.npz",
    ]
    for path in found:
        source = opened(path, 16, 3)
        assert source.images.shape == (7, 16, 16, 3)
        np.testing.assert_array_equal(source.labelled.labels, labels)
        np.testing.assert_array_equal(images_of(source), images)
        np.testing.assert_array_equal(images_of(source), images)  # a second pass
        assert source.test is None


def test_pictures_without_class_folders_have_one_label(tmp_path: Path) -> None:
    files = {"a.png": encoded(pixels(1)[0]), "b/c.png": encoded(pixels(1)[0])}
    assert opened(folder_of(tmp_path / "x", files), 16, 3).labelled.labels.tolist() == [0, 0]


def test_a_folder_like_the_download_stages_brings_its_test_images(tmp_path: Path) -> None:
    train, test = pixels(5), pixels(3)
    np.savez(tmp_path / "train.npz", images=train, labels=np.arange(5))
    assert opened(tmp_path, 16, 3).test is None
    np.savez(tmp_path / "test.npz", images=test)
    source = opened(tmp_path, 16, 3)
    assert source.labelled.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.test is not None
    np.testing.assert_array_equal(images_of(source.test), test)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_have_the_channels_that_are_asked_for(tmp_path: Path, channels: int) -> None:
    images = pixels(3, channels=channels)
    path = folder_of(tmp_path / "x", {f"{i}.png": encoded(image) for i, image in enumerate(images)})
    np.testing.assert_array_equal(images_of(opened(path, 16, channels)), images)


def test_colours_become_grey_by_the_weights_of_rec_601(tmp_path: Path) -> None:
    image = pixels(1)[0]
    path = folder_of(tmp_path / "x", {"0.png": encoded(image)})
    grey = images_of(opened(path, 16, 1))[0, :, :, 0]
    np.testing.assert_allclose(grey, image @ np.array([0.299, 0.587, 0.114]), atol=0.6)


def test_what_is_transparent_is_shown_on_white(tmp_path: Path) -> None:
    image = pixels(1, channels=4)[0]
    image[:8, :, 3], image[8:, :, 3] = 0, 255
    path = folder_of(tmp_path / "x", {"0.png": encoded(image)})
    shown = images_of(opened(path, 16, 3))[0]
    assert (shown[:8] == 255).all()
    np.testing.assert_array_equal(shown[8:], image[8:, :, :3])


def test_larger_pictures_are_resized_and_said_to_be(tmp_path: Path) -> None:
    flat = np.full((48, 48, 3), (10, 200, 90), np.uint8)
    path = folder_of(tmp_path / "x", {"0.png": encoded(flat), "1.png": encoded(flat[:16, :16])})
    source = opened(path, 16, 3)
    assert (images_of(source) == flat[:16, :16]).all()
    images_of(source)  # a second pass counts nothing again
    assert source.report.converted == {"resized to 16 x 16 pixels": (1, "0.png")}


def test_photos_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the white top becomes the right side
    tmp_path.joinpath("x").mkdir()
    image.save(tmp_path / "x/0.png", exif=exif)
    turned = images_of(opened(tmp_path / "x", 16, 3))[0]
    assert (turned[:, 8:] == 255).all()
    assert (turned[:, :8] == 0).all()


def test_what_cannot_be_used_is_one_line_that_names_it(tmp_path: Path) -> None:
    good = encoded(pixels(1)[0])
    wide = encoded(RNG.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    deep = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(deep, "png")
    assert "not there" in refused(tmp_path / "nowhere")
    assert "no pictures" in refused(folder_of(tmp_path / "empty", {"a.txt": b""}))
    for name, content, reason in (
        ("torn", good[:-40], "b.png is damaged"),
        ("text", b"hello", "b.png is damaged"),
        ("wide", wide, "b.png has 20 x 16 pixels: crop"),
        ("deep", deep.getvalue(), "b.png does not have 8 bits"),
    ):
        assert reason in refused(folder_of(tmp_path / name, {"a.png": good, "b.png": content}))
        assert reason in refused(zip_of(tmp_path / f"{name}.zip", {"a.png": good, "b.png": content}))
    tmp_path.joinpath("torn2.zip").write_bytes(tmp_path.joinpath("torn.zip").read_bytes()[:-30])
    assert "cannot be used" in refused(tmp_path / "torn2.zip")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_too_large_says_the_limit_and_how_to_raise_it(tmp_path: Path, kind: str) -> None:
    """The same in a folder and a zip; a file without end is not unpacked."""
    wide = encoded(np.zeros((64, 64, 3), np.uint8))
    files = {"a.png": wide, "b.png": b"\0" * (4 * 1000 + 2**20 + 1)}
    path = folder_of(tmp_path / "x", files) if kind == "folder" else zip_of(tmp_path / "x.zip", files)
    said = refused(path, max_pixels=1000)
    assert "2 of 2 pictures cannot be used: a.png has 64 x 64 pixels, more than data.max_pixels = 1,000 allows" in said
    assert "b.png takes 1,052,577 bytes, more than data.max_pixels = 1,000 allows: raise it (--max-pixels)" in said
    assert "b.png is damaged" in refused(path, max_pixels=64 * 64)


def test_arrays_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, images=pixels(4).astype(np.float32))
    assert "not uint8" in refused(path)
    np.savez(path, images=pixels(4), labels=np.arange(3))
    assert "not integers (4,)" in refused(path)
    np.savez(path, images=pixels(4).transpose(0, 3, 1, 2))
    assert "(N, H, W, C): transpose(0, 2, 3, 1)" in refused(path)
    np.savez(path, images=pixels(4))
    path.write_bytes(path.read_bytes()[:-500])
    assert "cannot be used" in refused(path)


def test_a_zip_with_a_password_is_one_line(tmp_path: Path) -> None:
    """Zipfile writes none: the flag is set in a plain one, in both of its headers."""
    path = zip_of(tmp_path / "own.zip", {"a.png": encoded(pixels(1)[0])})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    assert "a.png is encrypted: unpack the zip with its password first" in refused(path)


def test_all_unusable_pictures_are_named_in_one_go(tmp_path: Path) -> None:
    good = encoded(pixels(1)[0])
    files = {f"{i:02d}.png": good if i % 2 else b"torn" for i in range(30)} | {"05.png": good[:-40]}
    said = refused(folder_of(tmp_path / "x", files))
    assert "16 of 30 pictures cannot be used: 00.png is damaged (no picture): repair or remove it; 02.png is" in said
    assert said.count(" is damaged") == 10
    assert said.endswith("; and 6 more")
    with pytest.raises(UserError, match="16 of 30 pictures cannot be used: 00"):
        opened(tmp_path / "x", None)


def deep_png(array: np.ndarray) -> bytes:
    """PNG of uint16 (H, W, 3), which Pillow reads and cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    buffer.seek(8)
    for name, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        PngImagePlugin.putchunk(buffer, name, content)
    return buffer.getvalue()


def test_what_is_converted_is_counted(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in pixels(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "png", save_all=True, append_images=frames[1:])
    deep = RNG.integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    files = {"a.png": animated.getvalue(), "d.png": deep_png(deep), "g.png": encoded(pixels(1, channels=1)[0])}
    source = opened(folder_of(tmp_path / "x", files))
    found = images_of(source)
    np.testing.assert_array_equal(found[0], np.asarray(frames[0]))
    np.testing.assert_array_equal(found[1], deep >> 8)
    assert source.report.converted == {
        "with several frames or pages, of which the first is taken": (1, "a.png"),
        "of 16 bits a channel, of which the upper 8 are taken": (1, "d.png"),
        "of mode L, converted to RGB": (1, "g.png"),
    }
    assert source.report.conversions()[0].startswith("converted: 1 with several frames")


def test_a_large_picture_is_read_from_a_zip_as_from_a_folder(tmp_path: Path) -> None:
    """Larger than what is read at once: one at a time."""
    flat = np.full((4900, 4900, 3), (10, 200, 90), np.uint8)
    files = {"a.bmp": encoded(flat, "bmp"), "b.bmp": encoded(flat[:16, :16], "bmp")}
    assert len(files["a.bmp"]) > pictures.LARGE
    for path in (folder_of(tmp_path / "x", files), zip_of(tmp_path / "x.zip", files)):
        assert (images_of(opened(path)) == flat[:16, :16]).all()


def test_an_archive_of_edms(tmp_path: Path) -> None:
    """dataset_tool.py's: folders of 1,000, and the classes in dataset.json."""
    images = pixels(4)
    names = [f"0000{i // 2}/img0000000{i}.png" for i in range(4)]
    labels = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}).encode()
    files = {name: encoded(image) for name, image in zip(names, images, strict=True)}
    source = opened(zip_of(tmp_path / "edm.zip", {"dataset.json": labels, **files}))
    np.testing.assert_array_equal(images_of(source), images)
    assert source.labelled.labels.tolist() == [0, 1, 2, 0]
    assert source.labelled.counts() == {"0": 2, "1": 1, "2": 1}
    assert source.report.left_out == {}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": pixels(3), "b": pixels(3)}, "a uint8 (3, 16, 16, 3), b uint8 (3, 16, 16, 3): several arrays may be"),
        ({"pictures": np.zeros((3, 16, 16, 3))}, "pictures float64 (3, 16, 16, 3): none is uint8"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 4))}, "holds statistics of features (mu, sigma), not images"),
        ({"x": pixels(3), "y": np.eye(3)}, "y is float64 (3, 3), not integers (3,): give one label an image, or no y"),
    ],
    ids=["two", "none", "statistics", "one-hot"],
)
def test_an_npz_file_that_is_not_understood_names_its_arrays(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    assert words in refused(tmp_path / "own.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_header_that_promises_more_than_there_is_costs_no_memory(tmp_path: Path, save: Any) -> None:
    """10 TB."""
    save(tmp_path / "own.npz", images=pixels(4), labels=np.arange(4))
    with zipfile.ZipFile(tmp_path / "own.npz") as archive:
        kind = archive.infolist()[0].compress_type
        members = {name: archive.read(name) for name in archive.namelist()}
    members["images.npy"] = members["images.npy"].replace(
        b"(4, 16, 16, 3), }" + 10 * b" ", b"(13020833333, 16, 16, 3), }"
    )
    with zipfile.ZipFile(tmp_path / "own.npz", "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "which is 9,999,999,999,872 bytes, and has 3,200" in refused(tmp_path / "own.npz")
