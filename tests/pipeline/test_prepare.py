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


def own_pictures(*names: str) -> None:
    for i, name in enumerate(names):
        Path("own", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(Path("own", name))


OWN = {"data.source": "own", "data.val_images": 10}


def test_many_small_folders_are_split_without_classes_unless_these_are_wanted(
    tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    own_pictures(*(f"{i:02d}/a.png" for i in range(60)))
    prepare(tiny(**OWN))
    assert (
        "validation images are chosen whatever their class: there are too few images a class" in capsys.readouterr().err
    )
    data = Dataset.load()
    assert (len(data.val), len(data.train)) == (10, 50)
    assert len(np.load(paths.TRAIN_LABELS)) == 60
    with pytest.raises(UserError, match="each of 60 classes keeps one for training: give more images a class, or set"):
        prepare(tiny(**OWN, **{"model.num_classes": 60}))


def test_more_classes_than_validation_images(tiny) -> None:
    own_pictures(*(f"{i % 11:02d}/{i}.png" for i in range(33)))
    prepare(tiny(**OWN, **{"model.num_classes": 11}))
    data = Dataset.load()
    assert len(data.val) == 10
    assert set(data.labels[data.train].tolist()) == set(range(11))


def test_classes_that_nobody_named_are_refused_where_they_are_wanted(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    own_pictures(*(f"{('cat', 'dog')[i % 2]}_{i}.png" for i in range(24)))
    with pytest.raises(UserError, match=r"own has no classes, and model\.num_classes = 3: .*data\.labels: prefix"):
        prepare(tiny(**OWN, **{"model.num_classes": 3}))
    prepare(tiny(**OWN, **{"model.num_classes": 3, "data.labels": "prefix"}))
    said = capsys.readouterr().err
    assert "2 classes: cat (12), dog (12)" in said
    assert "warning: model.num_classes = 3, and there are images of 2" in said
    assert json.loads(paths.DATA_CARD.read_text())["classes"] == {"cat": 12, "dog": 12}


def test_what_is_left_out_and_converted_is_said_and_in_the_card(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    own_pictures(*(f"{i}.png" for i in range(12)))
    Path("own/notes.txt").write_text("")
    Image.new("RGB", (64, 64)).save("own/large.png")
    prepare(tiny(**OWN))
    card = json.loads(paths.DATA_CARD.read_text())
    assert card["left_out"] == {".txt files": {"count": 1, "example": "notes.txt"}}
    assert card["converted"] == {"resized to 32 x 32 pixels": {"count": 1, "example": "large.png"}}
    said = capsys.readouterr().err
    assert "data.source = own: 13 images of 32 x 32 pixels" in said
    assert "left out: 1 .txt files (such as notes.txt)" in said
    assert "converted: 1 resized to 32 x 32 pixels (such as large.png)" in said
