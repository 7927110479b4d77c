from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.data import grids


def filled(*values: int, channels: int = 3) -> np.ndarray:
    """2x2 pictures of one value each."""
    return np.array(values, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(2, 1).repeat(2, 2).repeat(channels, 3)


def test_a_grid_is_row_by_row_with_white_between_and_behind() -> None:
    expected = [
        [1, 1, 255, 2, 2],
        [1, 1, 255, 2, 2],
        [255, 255, 255, 255, 255],
        [3, 3, 255, 255, 255],
        [3, 3, 255, 255, 255],
    ]
    made = grids.grid(filled(1, 2, 3), columns=2, gap=1)
    for channel in range(3):
        assert made[:, :, channel].tolist() == expected


def test_a_grid_scales_pixels_not_gaps() -> None:
    picture = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    assert grids.grid(picture, columns=1, scale=2)[:, :, 0].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert grids.grid(filled(1, 2), columns=2, gap=3, scale=4).shape == (8, 19, 3)


def test_a_strip_has_a_row_an_image_and_a_column_a_stage() -> None:
    frames = np.stack([filled(10, 20), filled(11, 21), filled(12, 22)])  # 3 stages of 2 images
    made = grids.strip(frames, gap=0)[::2, ::2, 0]
    assert made.tolist() == [[10, 11, 12], [20, 21, 22]]


@pytest.mark.parametrize(("height", "times"), [(2, 32), (32, 2), (33, 1), (64, 1), (100, 1)])
def test_images_are_enlarged_to_at_most_64_pixels(height: int, times: int) -> None:
    assert grids.zoom(np.empty((5, 1, height, 7, 3), np.uint8)) == times


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_saved_file_decodes_to_its_image(tmp_path: Path, channels: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (30, 8, 6, channels), dtype=np.uint8)
    written = grids.save_all(pictures, tmp_path / "png", workers=4)
    assert [p.name for p in written] == [f"{i:05d}.png" for i in range(30)]
    for path, picture in zip(written, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(8, 6, channels), picture)


def test_a_later_batch_has_later_numbers_and_only_numbered_files_are_removed(tmp_path: Path) -> None:
    grids.save_all(filled(1, 2), tmp_path)
    grids.save_all(filled(3, 4), tmp_path, first=99_999)
    (tmp_path / "mine.png").touch()
    assert np.asarray(Image.open(tmp_path / "100000.png"))[0, 0, 0] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000.png",
        "00001.png",
        "100000.png",
        "99999.png",
        "mine.png",
    ]
    grids.remove_numbered(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.png"]
    grids.remove_numbered(tmp_path / "none")


def test_equal_pixels_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        grids.save_png(filled(7)[0], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids.save_png(filled(7)[0], tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        grids.save_png(filled(8)[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)], ids=str)
def test_what_is_no_picture_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a picture is uint8"):
        grids.save_png(array, tmp_path / "a.png")
