from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.worlds import in_world
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion.distributed import World
from diffusion.errors import UserError
from diffusion.metrics import Moments, frechet_distance


def features(count: int, dim: int, seed: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + offset


def moments(rows: np.ndarray, batch: int) -> Moments:
    found = Moments(rows.shape[1])
    for start in range(0, len(rows), batch):
        found.update(rows[start : start + batch])
    return found


@pytest.mark.parametrize("batch", [1, 7, 100, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streamed_moments_are_numpys(batch: int, dtype: type) -> None:
    rows = features(300, 12, 0, 10.0).astype(dtype)
    found = moments(rows, batch)
    assert found.count == 300
    np.testing.assert_allclose(found.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(rows, rowvar=False, dtype=np.float64), rtol=1e-11, atol=1e-12)
    mean, cov = found.compute()
    assert (mean.numpy() == found.mean).all()
    assert (cov.numpy() == found.cov).all()


def test_merging_is_seeing_it_all() -> None:
    rows = features(301, 5, 1, 10.0)
    whole, first, second, empty = moments(rows, 50), moments(rows[:40], 9), moments(rows[40:], 9), Moments(5)
    first.merge_state(second)
    first.merge_state(empty)
    empty.merge_state(first)
    for found in (first, empty):
        assert found.count == 301
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.cov, whole.cov, rtol=1e-12)


def of_ranks(world: World, device: torch.device, rows: np.ndarray) -> tuple[Any, ...]:
    """Mean and covariance of what each rank sees a share of: by `compute`, and by `sync`."""
    found = Moments(rows.shape[1])
    found.update(rows[world.share(len(rows))])
    mine = found.count
    mean, cov = found.compute()
    found.sync()
    return mine, found.count, mean, cov, torch.from_numpy(found.mean), torch.from_numpy(found.cov)


def test_torchmetrics_sums_over_processes(tmp_path: Path) -> None:
    rows = features(7, 4, 10)
    found = in_world(3, tmp_path, of_ranks, rows)
    assert [mine for mine, *_ in found] == [2, 2, 3]
    for _, count, *values in found:
        assert count == 7
        for value, expected in zip(values, [rows.mean(0), np.cov(rows, rowvar=False)] * 2, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


def test_the_sums_stay_in_float64() -> None:
    """As any metric's states, they follow modules that are cast or moved, but for their precision."""
    rows = features(50, 3, 11)
    expected = moments(rows, 10)
    for cast in (Moments.half, Moments.float, lambda found: found.to("cpu")):
        found = cast(moments(rows[:20], 10))
        found.update(rows[20:])
        assert found.total.dtype == found.products.dtype == torch.float64
        np.testing.assert_allclose(found.cov, expected.cov, rtol=1e-12)
    found.reset()
    assert found.count == 0
    found.update(rows)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=1e-12)
    with pytest.raises(RuntimeError, match="dtype"):
        found.to(torch.float16).update(rows)


@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 4)), np.zeros(5), np.full((2, 5), np.nan), np.full((2, 5), np.inf)],
    ids=["width", "1d", "nan", "inf"],
)
def test_bad_features_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(UserError):
        Moments(5).update(rows)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2"):
        _ = moments(np.zeros((1, 3)), 1).cov
    assert moments(np.array([[0.0], [2.0]]), 1).cov.tolist() == [[2.0]]


def test_diagonal_gaussians_have_a_closed_form() -> None:
    """Commuting covariances: sum of (mu1 - mu2)^2 + (s1 - s2)^2 (Dowson & Landau 1982)."""
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=(4, 20))
    expected = ((mu1 - mu2) ** 2 + (abs(s1) - abs(s2)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-10)


def test_one_dimension_by_optimal_transport() -> None:
    """The distance is the squared 2-Wasserstein distance: in 1-D, sorted samples matched in order."""
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.normal(1.0, 2.0, 400_000)), np.sort(rng.normal(-0.5, 0.7, 400_000))
    found = frechet_distance(
        *([m] if m.ndim == 0 else m for m in (np.array(1.0), np.array([[4.0]]), np.array(-0.5), np.array([[0.49]])))
    )
    assert found == pytest.approx(((a - b) ** 2).mean(), rel=0.01)


@pytest.mark.parametrize("dim", [3, 64])
def test_full_covariances_as_scipys_matrix_root(dim: int) -> None:
    a, b = features(500, dim, 2), features(400, dim, 3, 0.5)
    mu1, cov1, mu2, cov2 = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)


def test_it_is_a_distance_that_rotations_do_not_change() -> None:
    a, b = features(100, 30, 4), features(90, 30, 5)
    turn = np.linalg.qr(np.random.default_rng(6).normal(size=(30, 30)))[0]

    def between(x: np.ndarray, y: np.ndarray) -> float:
        return frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))

    assert between(a, a) == pytest.approx(0.0, abs=1e-12 * np.trace(np.cov(a, rowvar=False)))
    assert between(a, b) == pytest.approx(between(b, a), rel=1e-9)
    assert between(a @ turn, b @ turn) == pytest.approx(between(a, b), rel=1e-9)


def test_singular_covariances_are_fine() -> None:
    """Fewer images than features."""
    a, b = features(20, 50, 7), features(15, 50, 8)
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = [scipy.linalg.svd((x - x.mean(0)) / np.sqrt(len(x) - 1))[1:] for x in (a, b)]
    factors = [s[:, None] * v[: len(s)] for s, v in roots]  # cov = f.T @ f
    nuclear = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()  # tr (cov1 cov2)^(1/2)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * nuclear
    assert frechet_distance(a.mean(0), cov1, b.mean(0), cov2) == pytest.approx(expected, rel=1e-12)


def test_equal_singular_covariances_have_no_distance() -> None:
    """Eigenvalues of the product would leave 1e-4 here: the root of rounding errors, once a missing dimension."""
    rows = features(100, 256, 9)
    cov = np.cov(rows, rowvar=False)
    assert frechet_distance(rows.mean(0), cov, rows.mean(0), cov) == pytest.approx(0.0, abs=1e-12 * np.trace(cov))


@pytest.mark.parametrize(
    "change",
    [{0: np.zeros(4)}, {2: np.zeros(4)}, {1: np.eye(4)}, {1: np.eye(3) * np.nan}, {2: np.full(3, np.inf)}],
    ids=str,
)
def test_moments_that_cannot_be_compared_are_refused(change: dict[int, np.ndarray]) -> None:
    arguments = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(UserError):
        frechet_distance(*arguments)


class Projection(torch.nn.Module):
    """A stand-in extractor with features of a sane size."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0)) / 100

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() @ self.matrix.to(images.device)


def test_the_whole_distance_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 200, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    extractor = Projection()
    theirs = FrechetInceptionDistance(feature=extractor, input_img_size=(3, 8, 8))
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = [Moments(16), Moments(16)]
    for found, images in zip(ours, (real, fake), strict=True):
        for batch in images.split(64):
            found.update(extractor(batch))
    expected = float(theirs.compute())
    assert expected > 1
    assert frechet_distance(ours[0].mean, ours[0].cov, ours[1].mean, ours[1].cov) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equal_gaussians_are_no_distance_apart(scale: float) -> None:
    """Without the bound of rounding, values such as -7e-15 and 1.4e-14."""
    rows = np.random.default_rng(0).normal(size=(20, 64)) * scale
    mean, cov = rows.mean(0), np.cov(rows, rowvar=False)
    assert frechet_distance(mean, cov, mean, cov) == 0.0
    assert frechet_distance(mean, cov, mean + 1e-3 * scale, cov) == pytest.approx(64e-6 * scale**2)
