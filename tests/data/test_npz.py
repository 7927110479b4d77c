"""Sets of images in files: read as they were written, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import pictures

from diffusion.data.npz import load_images, load_samples
from diffusion.errors import UserError
from diffusion.metrics import extraction


@pytest.mark.parametrize(
    "array",
    [
        pictures(5).astype(np.float32) / 255,
        np.full((5, 8, 8, 3), np.nan, np.float32),
        np.full((5, 8, 8, 3), 300.0),
        np.array([[0.0, np.inf]] * 96, np.float32).reshape(2, 4, 8, 3),
        pictures(5).transpose(0, 3, 1, 2),
        pictures(5)[..., 0],
        pictures(5)[:1],
        pictures(5).astype(np.int64),
        np.zeros((), np.uint8),
    ],
    ids=["float", "nan", "range", "infinity", "nchw", "gray", "one", "int64", "scalar"],
)
def test_samples_of_another_kind_are_one_line(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "s.npz", images=array)
    with pytest.raises(UserError, match="uint8 images") as caught:
        load_samples(tmp_path / "s.npz")
    assert "\n" not in str(caught.value)
    assert ("with NaN or infinity" in str(caught.value)) == (not np.isfinite(array).all())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_are_read_as_they_were_written(tmp_path: Path, save) -> None:
    save(tmp_path / "s.npz", labels=np.arange(5), images=pictures(5), more=np.zeros(3))
    found = load_samples(tmp_path / "s.npz")
    np.testing.assert_array_equal(found, pictures(5))
    assert (extraction.releases(found) is not None) == (save is np.savez)  # mapped if nothing is compressed
    if release := extraction.releases(found[1:]):
        release()
    np.testing.assert_array_equal(found[1:], pictures(5)[1:])


def test_a_flipped_bit_of_the_samples_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", images=pictures(5))
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        load_samples(tmp_path / "s.npz")


def test_missing_and_broken_sample_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load_samples(tmp_path / "s.npz")
    whole = tmp_path / "whole.npz"
    np.savez_compressed(whole, images=pictures(5))
    flipped = bytearray(whole.read_bytes())
    flipped[100:160] = bytes(60)
    np.save(tmp_path / "array.npy", pictures(5))
    for damaged in (b"PK\x03\x04 torn", b"", b"text", bytes(flipped), (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "s.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="npz"):
            load_samples(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", pictures=pictures(2))
    with pytest.raises(UserError, match="npz"):
        load_samples(tmp_path / "s.npz")


def test_labelled_images_come_back_or_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "l.npz"
    with pytest.raises(UserError, match="is missing: run `dvc repro`"):
        load_images(path)
    np.savez(path, images=pictures(5), labels=np.arange(5))
    images, labels = load_images(path)
    assert (images.tolist(), labels.tolist()) == (pictures(5).tolist(), [0, 1, 2, 3, 4])
    whole = {"images": pictures(5), "labels": np.arange(5)}
    for change in (
        {"images": pictures(5)[..., 0]},
        {"images": pictures(5)[None]},
        {"images": pictures(5).astype(np.float32)},
        {"labels": np.arange(4)},
    ):
        np.savez(path, **{**whole, **change})
        with pytest.raises(UserError, match="with N labels"):
            load_images(path)
    np.savez(path, images=pictures(5))
    with pytest.raises(UserError, match="not an npz file with images and labels"):
        load_images(path)
