"""What the prepare stage makes of a source is what compare sees of it, for every kind of source."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.pictures import SmallLite0
from PIL import Image, ImageOps

from diffusion import paths
from diffusion.data.dataset import real_images
from diffusion.data.pictures import Form
from diffusion.data.pixels import rgb
from diffusion.data.sources import open_source
from diffusion.metrics.__main__ import main
from diffusion.pipeline.prepare import prepare

RNG = np.random.default_rng(0)
COUNT, SIDE = 6, 32
ARRAY = RNG.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = np.concatenate([ARRAY, RNG.integers(0, 256, (COUNT, SIDE, SIDE, 1), dtype=np.uint8)], axis=3)


def saved(image: Image.Image, place: Path, **options: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    image.save(place, **options)


def folder(array: np.ndarray = ARRAY, suffix: str = ".png", **options: Any) -> Path:
    for i, pixels in enumerate(array):
        saved(Image.fromarray(pixels), Path("own", f"{i}{suffix}"), **options)
    return Path("own")


def zipped(place: Path, name: Callable[[str], str] = str) -> Path:
    with zipfile.ZipFile("own.zip", "w") as archive:
        for path in sorted(place.rglob("*.png")):
            archive.write(path, name(path.relative_to(place).as_posix()))
    return Path("own.zip")


def turned_by_exif() -> Path:
    exif = Image.Exif()
    for i, orientation in enumerate((1, 2, 3, 6, 7, 8)):
        exif[0x0112] = orientation
        saved(Image.fromarray(ARRAY[i]), Path(f"own/{i}.png"), exif=exif)
    return Path("own")


def with_clutter() -> Path:
    for clutter in ("own/__MACOSX/0.png", "own/.hidden/0.png", "own/._0.png"):
        saved(Image.fromarray(ARRAY[0]), Path(clutter))
    Path("own/album.png").mkdir()
    saved(Image.fromarray(ARRAY[5]), Path("own/album.png/5.png"))
    return folder(ARRAY[:5])


def npz(save: Callable[..., None] = np.savez, **arrays: np.ndarray) -> Path:
    save("own.npz", **arrays)
    return Path("own.npz")


def npy() -> Path:
    np.save("own.npy", ARRAY)
    return Path("own.npy")


def parquet() -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = []
    for pixels in ARRAY:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        cells.append({"bytes": content.getvalue(), "path": None})
    pq.write_table(pa.table({"img": cells, "label": list(range(COUNT))}), "own.parquet", row_group_size=2)
    return Path("own.parquet")


SOURCES: dict[str, tuple[Callable[[], Path], np.ndarray, int]] = {  # how to make it, the pixels in it, channels
    "folder": (folder, ARRAY, 3),
    "ppm": (lambda: folder(suffix=".ppm"), ARRAY, 3),
    "bmp": (lambda: folder(suffix=".bmp"), ARRAY, 3),
    "tiff": (lambda: folder(suffix=".tif"), ARRAY, 3),
    "upper case": (lambda: folder(suffix=".PNG"), ARRAY, 3),
    "grey": (lambda: folder(ARRAY[..., 0]), ARRAY[..., :1], 1),
    "pgm": (lambda: folder(ARRAY[..., 0], suffix=".pgm"), ARRAY[..., :1], 1),
    "grey as RGB": (lambda: folder(ARRAY[..., 0]), ARRAY[..., :1].repeat(3, axis=3), 3),
    "alpha": (lambda: folder(ALPHA), ALPHA, 4),
    "grey and alpha": (lambda: folder(ALPHA[..., 2:]), ALPHA[..., 2:], 2),
    "clutter": (with_clutter, ARRAY, 3),
    "zip": (lambda: zipped(folder()), ARRAY, 3),
    "zip in a folder": (lambda: zipped(folder(), "./deep/er/{}".format), ARRAY, 3),
    "zip of paths outside": (lambda: zipped(folder(), "/deep/../../{}".format), ARRAY, 3),
    "zip of Windows": (lambda: zipped(folder(), "deep\\{}".format), ARRAY, 3),
    "npz": (lambda: npz(images=ARRAY), ARRAY, 3),
    "compressed": (lambda: npz(np.savez_compressed, images=ARRAY), ARRAY, 3),
    "fortran": (lambda: npz(images=np.asfortranarray(ARRAY)), ARRAY, 3),
    "arr_0": (lambda: npz(arr_0=ARRAY, arr_1=np.arange(COUNT)), ARRAY, 3),
    "x and y": (lambda: npz(np.savez_compressed, x=ARRAY, y=np.arange(COUNT)[:, None]), ARRAY, 3),
    "keras": (lambda: npz(x_train=ARRAY, x_test=ARRAY[:3], y_train=np.arange(COUNT)), ARRAY, 3),
    "npz of grey": (lambda: npz(images=ARRAY[..., 0]), ARRAY[..., :1], 1),
    "compressed grey": (lambda: npz(np.savez_compressed, x_train=ARRAY[..., 0]), ARRAY[..., :1], 1),
    "npz with alpha": (lambda: npz(images=ALPHA), ALPHA, 4),
    "npy": (npy, ARRAY, 3),
    "parquet": (parquet, ARRAY, 3),
}


def prepared(tiny: Any, source: Path, channels: int = 3, **overrides: Any) -> np.ndarray:
    prepare(tiny(**{"data.source": str(source), "data.val_images": 1, "model.image_channels": channels, **overrides}))
    return real_images("train")


@pytest.mark.parametrize("kind", SOURCES)
def test_both_see_the_pixels_that_were_written(tiny, kind: str) -> None:
    make, pixels, channels = SOURCES[kind]
    source = make()
    made = prepared(tiny, source, channels)
    np.testing.assert_array_equal(made, pixels)
    seen = open_source(source, Form(None, 3), labels=None).images
    np.testing.assert_array_equal(rgb(seen[:]), rgb(made))


def test_photos_are_turned_as_their_camera_says_by_both(tiny) -> None:
    source = turned_by_exif()
    truth = np.stack([np.asarray(ImageOps.exif_transpose(Image.open(f"own/{i}.png"))) for i in range(COUNT)])
    assert (truth != ARRAY).any((1, 2, 3)).sum() == COUNT - 1
    made = prepared(tiny, source)
    np.testing.assert_array_equal(made, truth)
    np.testing.assert_array_equal(open_source(source, Form(None, 3)).images[:], truth)


def test_what_is_transparent_is_white_in_pictures_and_arrays(tiny) -> None:
    alpha = ALPHA[..., 3:].astype(float) / 255
    truth = ALPHA[..., :3] * alpha + 255 * (1 - alpha)
    for seen in (prepared(tiny, folder(ALPHA)), rgb(ALPHA)):
        np.testing.assert_allclose(seen, truth, atol=1)


@pytest.mark.parametrize("kind", SOURCES)
def test_their_distance_is_zero(tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.metrics.compare.EfficientNetLite0", SmallLite0)
    make, _, channels = SOURCES[kind]
    source = make()
    prepared(tiny, source, channels)
    arguments = ["compare", str(source), str(paths.TRAIN_IMAGES), "--extractor", "lite0", "--json", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert json.loads(result.stdout.splitlines()[-1])["fd_lite0_6"] == 0.0
    assert f"{source}: 6 images of 32 x 32 pixels" in result.stderr


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_that_are_not_square_become_the_same_for_both(tiny, fit: str) -> None:
    wide = RNG.integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8)
    high = wide.transpose(1, 0, 2).copy()
    source = folder([wide, high, ARRAY[0]])  # type: ignore[arg-type]
    made = prepared(tiny, source, **{"data.fit": fit})
    seen = open_source(source, Form(SIDE, 3, fit)).images[:]  # type: ignore[arg-type]
    np.testing.assert_array_equal(made, seen)
    np.testing.assert_array_equal(made[2], ARRAY[0])
    if fit == "crop":
        np.testing.assert_array_equal(made[0], wide[:, 4:-4])
        np.testing.assert_array_equal(made[1], high[4:-4])
    else:
        square = np.full((SIDE + 8, SIDE + 8, 3), 255, np.uint8)
        square[4:-4] = wide
        image = Image.fromarray(square if fit == "pad" else wide).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(made[0], np.asarray(image))
    card = json.loads(paths.DATA_CARD.read_text())
    words = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}
    assert card["converted"][f"{words[fit]} to a square"] == {"count": 2, "example": "0.png"}
