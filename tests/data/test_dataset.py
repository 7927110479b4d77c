import dataclasses
import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import paths
from diffusion.data import dataset, pixels
from diffusion.errors import UserError

CPU = torch.device("cpu")


def test_to_uint8_inverts_to_tensor_for_all_256_values() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    tensor = pixels.to_tensor(values)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(pixels.to_uint8(tensor).numpy(), values)


def test_to_tensor_is_affine_and_keeps_places() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    expected = images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1.0
    np.testing.assert_allclose(pixels.to_tensor(images).numpy(), expected, atol=1e-7)


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-7.0, -1.0, -1.0 + 0.9 / 255, -1.0 + 1.1 / 255, 0.0, 1.0, 3.0]).view(1, 1, 1, 7)
    assert pixels.to_uint8(values).flatten().tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_split_is_stratified_disjoint_and_always_the_same() -> None:
    labels = np.repeat(np.arange(10, dtype=np.uint8), [50, 150, 100, 100, 100, 100, 100, 100, 100, 100])
    train, val = dataset.split(labels, 200)
    assert sorted([*train, *val]) == list(range(1000))
    assert np.bincount(labels[val]).tolist() == [10, 30, 20, 20, 20, 20, 20, 20, 20, 20]
    np.testing.assert_array_equal(val, dataset.split(labels, 200)[1])
    assert (val != np.arange(200)).any()


def test_split_takes_exactly_what_is_asked_when_classes_do_not_divide() -> None:
    labels = np.arange(103, dtype=np.uint8) % 10
    for count in (10, 17, 33):
        train, val = dataset.split(labels, count)
        assert len(val) == count
        assert len(train) == 103 - count
        share = np.bincount(labels[val], minlength=10) - np.bincount(labels) * count / 103
        assert np.abs(share).max() < 1


def test_the_split_stays_what_it_was() -> None:
    """Else no validation loss compares with an older one. The digest is that of the first split, with seed 0."""
    train, val = dataset.split(np.arange(50_000) % 10, 2000)
    assert hashlib.sha256(train.tobytes() + val.tobytes()).hexdigest()[:16] == "10bcdbe1b9e15c1f"


@pytest.mark.parametrize(
    ("labels", "val_images"), [([0] + 99 * [1], 50), ([0, 0] + 98 * [1], 90), ([0, 1, 2] + 97 * [3], 96)]
)
def test_rare_classes_stay_in_training(labels: list[int], val_images: int) -> None:
    train, val = dataset.split(np.array(labels), val_images)
    assert set(np.array(labels)[train]) == set(labels)
    assert len(val) == val_images
    assert sorted([*train, *val]) == list(range(100))


@pytest.mark.parametrize("count", [0, 91, 100])
def test_split_refuses_impossible_counts(count: int) -> None:
    with pytest.raises(UserError, match=r"data\.val_images"):
        dataset.split(np.arange(100, dtype=np.uint8) % 10, count)


def test_what_was_prepared_is_loaded_and_must_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is missing: run `dvc repro prepare`"):
        dataset.Dataset.load()
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    for folder in (paths.IMAGES, paths.PREPARED):
        folder.mkdir(parents=True)
    np.save(paths.TRAIN_IMAGES, images)
    with pytest.raises(UserError, match="data/prepared is not usable"):
        dataset.Dataset.load()
    np.save(paths.TRAIN_LABELS, np.arange(7, dtype=np.uint8))
    np.savez(paths.SPLIT, train=np.array([0, 1, 3, 6]), val=np.array([2, 4, 5]))
    paths.DATA_CARD.write_text('{"digest": "abc"}')
    found = dataset.Dataset.load()
    assert found.images.numpy().tolist() == images.tolist()
    assert (found.train.tolist(), found.val.tolist()) == ([0, 1, 3, 6], [2, 4, 5])
    assert (found.digest, found.labels.tolist(), found.labels.dtype) == ("abc", list(range(7)), torch.int64)
    assert found.image_shape == (3, 4, 5)
    others = [dataclasses.replace(found, **{name: torch.tensor([1])}) for name in ("train", "val")]
    others.append(dataclasses.replace(found, digest="abd"))
    assert len({data.identity for data in [found, *others, dataset.Dataset.load()]}) == 4
    for place, array in ((paths.TRAIN_LABELS, np.arange(6, dtype=np.uint8)), (paths.TRAIN_IMAGES, images[:6])):
        before = place.read_bytes()
        np.save(place, array)
        with pytest.raises(UserError, match="does not belong to"):
            dataset.Dataset.load()
        place.write_bytes(before)


def numbered(count: int) -> dataset.Dataset:
    """Image i is filled with i on its left half and 255 - i on its right; the last five are for validation."""
    column = torch.arange(count + 5, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = torch.cat([column.expand(-1, 4, 2, 3), 255 - column.expand(-1, 4, 2, 3)], dim=2).contiguous()
    return dataset.Dataset(
        images, torch.arange(count), torch.arange(count, count + 5), "numbered", torch.arange(count + 5)
    )


def test_an_epoch_shows_every_image_once_whatever_the_batch_size() -> None:
    images = numbered(30)
    for batch_size in (1, 4, 7, 30, 45):
        batches = dataset.Batches(images, batch_size, seed=3, flip=False, device=CPU)
        steps = -(-90 // batch_size)
        order = torch.cat([batches.indices(step) for step in range(steps)])[:90]
        epochs = [epoch.tolist() for epoch in order.split(30)]
        assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3, "each in an order of its own"
        np.testing.assert_array_equal(
            order, torch.cat([dataset.Batches(images, 10, 3, flip=False, device=CPU).indices(s) for s in range(9)])
        )


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    images = numbered(30)
    one = dataset.Batches(images, 8, seed=3, flip=True, device=CPU)
    other = dataset.Batches(images, 8, seed=3, flip=True, device=CPU)
    forwards = [one(step) for step in range(12)]
    backwards = [other(step) for step in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (dataset.Batches(images, 8, seed=4, flip=True, device=CPU)(0) != forwards[0]).any()


def test_flips_mirror_half_of_the_images_left_to_right() -> None:
    images = numbered(100)
    batches = dataset.Batches(images, 100, seed=0, flip=True, device=CPU)
    flipped = 0
    for step in range(20):
        plain = pixels.to_tensor(images.images[batches.indices(step)])
        for image, original in zip(batches(step), plain, strict=True):
            mirrored = original.flip(-1)
            assert image.equal(original) != image.equal(mirrored)
            flipped += int(image.equal(mirrored))
    assert 900 < flipped < 1100  # 2,000 fair coins: 4.5 standard deviations


def test_shares_of_a_batch_are_parts_of_the_whole() -> None:
    images = numbered(30)
    whole = dataset.Batches(images, 7, seed=3, flip=True, device=CPU)
    parts = [dataset.Batches(images, 7, seed=3, flip=True, device=CPU, share=s) for s in (range(3), range(3, 7))]
    for step in range(10):
        assert torch.cat([part(step) for part in parts]).equal(whole(step))
        assert torch.cat([part.labels(step) for part in parts]).equal(whole.labels(step))
        assert whole.labels(step).equal(whole.indices(step)), "image i of `numbered` has the label i"


def test_images_live_on_a_gpu_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.empty((100, 4, 4, 3), dtype=torch.uint8)
    for free, fits in ((12_000, True), (11_999, False)):  # 4,800 bytes are 0.4 of 12,000
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**9))
        assert dataset.fits(images, torch.device("cuda")) == fits
    monkeypatch.setattr(dataset, "MPS_BYTES", 4800)
    assert dataset.fits(images, torch.device("mps"))
    monkeypatch.setattr(dataset, "MPS_BYTES", 4799)
    assert not dataset.fits(images, torch.device("mps"))
    assert not dataset.fits(images, CPU), "on a CPU they may stay mapped"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_images_do_not_stay_in_memory(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)  # 15 MB
    np.save(tmp_path / "mapped.npy", images)
    mapped = np.load(tmp_path / "mapped.npy", mmap_mode="c")
    mapped_data = dataset.Dataset(
        torch.from_numpy(mapped),
        torch.arange(5000),
        torch.arange(5),
        "",
        torch.arange(5000),
        dataset.releases(mapped),
    )
    batches = dataset.Batches(mapped_data, 100, seed=0, flip=False, device=CPU)
    for step in range(8):
        torch.testing.assert_close(batches(step), pixels.to_tensor(images[batches.indices(step)]), rtol=0, atol=0)
        assert resident_kib("mapped.npy") == 0
    assert int(mapped.astype(np.int64).sum()) == int(images.astype(np.int64).sum())
    assert resident_kib("mapped.npy") > 14_000  # so the measure sees what is read
    mapped_data.read(torch.arange(5))
    assert resident_kib("mapped.npy") == 0


def resident_kib(name: str) -> int:
    """Memory of this process that holds pages of the file `name`."""
    smaps = Path("/proc/self/smaps").read_text()
    return sum(int(kib) for kib in re.findall(rf"{name}\n(?:.*\n)*?Rss:\s+(\d+) kB", smaps))
