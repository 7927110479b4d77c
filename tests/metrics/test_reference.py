"""Features of many images become moments and references."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import Colours, pictures

from diffusion.distributed import World
from diffusion.errors import UserError
from diffusion.metrics import extraction
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.reference import Reference, make_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_moments_are_those_of_all_images(batch_size: int) -> None:
    images = pictures(30)
    found = moments_of(images, Colours(), batch_size, CPU, "test")
    rows = images.reshape(30, -1, 3).mean(axis=1)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.cov, np.cov(rows, rowvar=False), rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_moments_of_shares_are_those_of_one_process(size: int) -> None:
    """A share is made of whole batches: the features are the same bits, only float64 sums are in another order."""

    class OfBatch(Colours):
        """As a network's last bits may: a row depends on the batch that it is in."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = super().forward(images)
            return found + found.mean(dim=0)

    images, extractor = pictures(45), OfBatch()
    whole = moments_of(images[:45], extractor, 7, CPU, "test")
    shares = []
    for rank in range(size):
        (share, _), _ = extraction._share(images, extractor, 7, CPU, "test", World(rank, size, rank))
        shares.append(share)
    assert sum(share.count for share in shares) == 45
    for other in shares[1:]:
        shares[0].merge_state(other)
    np.testing.assert_allclose(shares[0].mean, whole.mean, rtol=1e-10, atol=1e-12)
    assert np.abs(shares[0].cov - whole.cov).max() <= 1e-10 * np.abs(whole.cov).max()


def test_a_reference_comes_back_and_knows_its_extractor(tmp_path: Path) -> None:
    images = pictures(10)
    reference = make_reference(images, "train", Colours(), 4, CPU)
    reference.save(tmp_path / "r.npz")
    loaded = Reference.load(tmp_path / "r.npz", Colours().describe())
    np.testing.assert_array_equal(loaded.cov, reference.cov)
    assert (loaded.key["split"], loaded.key["images"]) == ("train", 10)
    assert make_reference(pictures(10, 1), "train", Colours(), 4, CPU).key != loaded.key
    with pytest.raises(UserError, match="another extractor"):
        Reference.load(tmp_path / "r.npz", {"extractor": "colours", "resize": "none"})
    (tmp_path / "r.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="repro"):
        Reference.load(tmp_path / "r.npz", Colours().describe())


def test_a_reference_takes_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that cannot be written leaves the one before as it was."""
    path, synced, fsync = tmp_path / "r.npz", {}, os.fsync

    def noting(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    reference = make_reference(pictures(10), "train", Colours(), 4, CPU)
    reference.save(path)
    reference.save(path)
    assert synced[path.stat().st_ino] == path.stat().st_size
    assert len({*synced} - {tmp_path.stat().st_ino}) == 2, "a file of its own each time"
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.save(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]
