"""The prepare stage against numpy over the whole arrays."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import paths
from diffusion.data.dataset import Dataset, real_images, split
from diffusion.errors import UserError
from diffusion.pipeline import prepare as stage
from diffusion.pipeline.prepare import prepare


def test_arrays_split_and_card_are_those_of_the_downloaded_images(
    tiny, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHUNK", 7)
    prepare(tiny())
    with np.load(paths.CIFAR10_TRAIN) as archive:
        images, labels = archive["images"], archive["labels"]
    np.testing.assert_array_equal(real_images("train"), images)
    np.testing.assert_array_equal(np.load(paths.TRAIN_LABELS), labels)
    with np.load(paths.CIFAR10_TEST) as archive:
        np.testing.assert_array_equal(real_images("test"), archive["images"])
    train, val = split(labels, 20)
    card = json.loads(paths.DATA_CARD.read_text())
    assert (card["train_images"], card["val_images"], card["image_shape"]) == (40, 20, [32, 32, 3])
    np.testing.assert_allclose(card["channel_mean"], (images[train] / 255).mean((0, 1, 2)), atol=6e-7)
    np.testing.assert_allclose(card["channel_std"], (images[train] / 255).std((0, 1, 2)), atol=6e-7)
    content = f"{images.shape} {labels.shape}".encode() + images.tobytes() + labels.tobytes()
    assert card["digest"] == hashlib.sha256(content).hexdigest()
    data = Dataset.load()
    assert data.digest == card["digest"]
    np.testing.assert_array_equal(data.images[data.train].numpy(), images[train])
    np.testing.assert_array_equal(data.images[data.val].numpy(), images[val])


def test_the_images_are_mapped_not_read(tiny, workspace: Path) -> None:
    prepare(tiny())
    data = Dataset.load()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if line.endswith("data/images/train.npy")]
    assert mapped
    first, last = (int(x, 16) for x in mapped[0].split()[0].split("-"))
    assert first <= data.images.data_ptr() < last


def test_another_source_replaces_all_of_the_first(tiny, workspace: Path) -> None:
    prepare(tiny())
    colours = np.random.default_rng(0).integers(0, 256, (30, 3), dtype=np.uint8)
    for i, colour in enumerate(colours):
        Path("own").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), tuple(map(int, colour))).save(f"own/{i:02d}.png")
    shape = {"model.image_size": 16, "model.attention_resolutions": [8]}
    prepare(tiny(**shape, **{"data.source": "own", "data.val_images": 10}))
    data = Dataset.load()
    assert data.image_shape == (3, 16, 16)
    assert data.images[:, 0, 0].equal(torch.from_numpy(colours))
    with pytest.raises(UserError, match=r"evaluate\.reference_split: train"):
        real_images("test")


def test_a_source_that_breaks_half_way_leaves_no_half_of_an_array(
    tiny, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHUNK", 5)
    Path("own").mkdir()
    for i in range(30):
        Image.new("RGB", (32, 32), (i, i, i)).save(f"own/{i:02d}.png")
    Path("own/20.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"20\.png is damaged"):
        prepare(tiny(**{"data.source": "own", "data.val_images": 10}))
    assert not list(paths.IMAGES.iterdir())
    assert not paths.SPLIT.exists()


def test_what_cannot_be_split_or_does_not_fit_is_refused_before_anything_is_written(tiny, workspace: Path) -> None:
    images = np.zeros((4, 24, 24, 1), np.uint8)
    np.savez("grey.npz", images=images)
    np.savez("wide.npz", images=images.repeat(2, axis=2))
    for overrides, words in (
        ({"data.val_images": 60}, r"data\.val_images = 60 cannot be split from 60 images.*: set it from 1 to 59"),
        ({"data.val_images": 55, "model.num_classes": 10}, "each of 10 classes keeps one .*: set it from 1 to 50"),
        ({"data.source": "grey.npz"}, r"set model\.image_size: 24 and model\.image_channels: 1"),
        ({"data.source": "wide.npz"}, "crop them to squares"),
        ({"model.num_classes": 9}, r"10 classes: set model\.num_classes: 10"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(tiny(**overrides))
        assert not paths.IMAGES.exists()
