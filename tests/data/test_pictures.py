"""Images that are read by parts: equal to what they are as a whole, damage found, memory small."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import Colours, pictures

from diffusion.data import grids
from diffusion.data.npz import Stream
from diffusion.data.pictures import Form
from diffusion.data.sources import open_source
from diffusion.errors import UserError
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.reference import pixels_sha256


def open_images(name: str, count: int | None = None) -> np.ndarray | Stream:
    """As compare opens them."""
    return open_source(Path(name), Form(None, 3), labels=None, count=count).images


def written(kind: str, place: Path, array: np.ndarray) -> str:
    if kind == "folder":
        grids.save_all(array, place / "folder/deeper")
        return str(place / "folder")
    np.savez_compressed(place / "images.npz", labels=np.arange(3), images=array)
    return str(place / "images.npz")


@pytest.mark.parametrize("kind", ["folder", "compressed"])
def test_parts_in_any_order_are_those_of_the_whole(tmp_path: Path, kind: str) -> None:
    array = pictures(30)
    found = open_images(written(kind, tmp_path, array))
    assert isinstance(found, Stream)
    assert (found.shape, len(found)) == (array.shape, 30)
    for rows in (slice(0, 7), slice(20, 30), slice(3, 4), slice(25, 99), slice(0, 30)):
        np.testing.assert_array_equal(found[rows], array[rows])
    assert pixels_sha256(found) == pixels_sha256(array)
    first = open_images(written(kind, tmp_path, array), 11)
    assert len(first) == 11
    np.testing.assert_array_equal(first[5:30], array[5:11])


@pytest.mark.parametrize("kind", ["folder", "compressed"])
def test_only_a_part_is_in_memory(tmp_path: Path, kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (1000, 64, 64, 3), dtype=np.uint8)  # 12 MB
    name = written(kind, tmp_path, array)
    moments_of(array[:2], Colours(), 10, torch.device("cpu"), "test")  # imports what it needs
    tracemalloc.start()
    try:
        moments_of(open_images(name), Colours(), 10, torch.device("cpu"), "test")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 3


def test_a_picture_that_is_cut_is_one_line_when_it_is_read(tmp_path: Path) -> None:
    name = written("folder", tmp_path, pictures(5))
    last = sorted(Path(name).rglob("*.png"))[-1]
    last.write_bytes(last.read_bytes()[:-40])
    found = open_images(name)
    with pytest.raises(UserError, match=r"00004\.png is damaged .*: repair or remove it") as caught:
        pixels_sha256(found)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["float", "cut", "flipped", "fortran"])
def test_other_compressed_files_are_one_line_or_read_whole(tmp_path: Path, damage: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    if damage == "fortran":
        np.testing.assert_array_equal(open_images(written("npz", tmp_path, np.asfortranarray(array)))[:], array)
        return
    name = written("npz", tmp_path, array / 255 if damage == "float" else array)
    content = bytearray(Path(name).read_bytes())
    if damage == "cut":
        Path(name).write_bytes(content[:-100])
    elif damage == "flipped":
        content[1500] ^= 255
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match="from 0 to 1" if damage == "float" else "cannot be used"):
        open_images(name)
