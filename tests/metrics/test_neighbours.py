"""Names, neighbour measures and the distance at infinity, against other libraries, brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from diffusion.errors import UserError
from diffusion.metrics import frechet_distance, neighbours
from diffusion.metrics.frechet import frechet_at_infinity
from diffusion.metrics.names import metric_name, short, shown
from diffusion.metrics.neighbours import COPY_QUANTILE, KID_SUBSETS, copies, kid, nearest, precision_recall
from diffusion.rules import INFINITY_ROWS


def rows(count: int, dim: int = 8, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(
    ("count", "text"),
    [(2048, "2k"), (2000, "2000"), (50_000, "50k"), (512, "512"), (10_000, "10k"), (10_240, "10240"), (1024, "1k")],
)
def test_counts_in_names(count: int, text: str) -> None:
    assert short(count) == text


def test_different_counts_have_different_names() -> None:
    counts = range(1, 120_000)
    assert len({short(count) for count in counts}) == len(counts)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("frechet", "fid", 50_000, "train"), "fid50k_train"),
        (("frechet", "fd_lite0", 2048, "train"), "fd_lite0_2k"),
        (("kid", "fid", 2048, "test"), "kid2k_test"),
        (("kid", "fd_lite0", 100, "train"), "kd_lite0_100"),
        (("infinity", "fid", 50_000, "train"), "fid_inf50k_train"),
        (("precision", "fid", 2048, "train"), "precision_inception_2k_train"),
        (("copies", "fd_lite0", 2048, "train"), "copies_lite0_2k"),
    ],
)
def test_names_say_measure_space_and_count(arguments: tuple[str, str, int, str], name: str) -> None:
    assert metric_name(*arguments) == name


def test_blocks_and_bf16_are_in_the_name() -> None:
    assert metric_name("frechet", "fid", 50_000, "train", blocks=3) == "fid3x50k_train"
    assert metric_name("frechet", "fd_lite0", 512, "train", precision="bf16", blocks=4) == "fd_lite0_4x512_bf16"
    assert (shown(334.678), shown(0.00123456), shown(0.0)) == ("334.68", "0.00123", "0")


def test_kid_is_torchmetrics_estimate() -> None:
    """The mean over all subsets is the value of the whole sets; the deviation is that of other random subsets."""
    a, b = rows(300), rows(300, seed=1, shift=0.3)
    found = kid(a, b)
    assert found["subset_size"] == 150
    whole = float(poly_mmd(a.double(), b.double()))
    assert found["mean"] == pytest.approx(whole, abs=4 * found["std"] / math.sqrt(KID_SUBSETS))
    theirs = KernelInceptionDistance(torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=150)
    theirs.fake_features, theirs.real_features = [a], [b]
    assert found["std"] == pytest.approx(float(theirs.compute()[1]), rel=0.3)


@pytest.mark.parametrize("count", [4, 7, 99])
def test_kid_never_calls_rounding_a_deviation(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "KID_SUBSET_SIZE", 50)
    found = kid(rows(count), rows(150, seed=1, shift=0.3))
    assert found["std"] > 0.01 * abs(found["mean"])


def test_kid_is_the_definition_and_has_no_bias() -> None:
    """Unbiased MMD^2 of (x.y / d + 1)^3, by loops over all 36 pairs of subsets of two of four rows.

    Sets of one distribution are at 0 on average, also small ones.
    """
    a, b = rows(4).double().numpy(), rows(4, seed=1, shift=0.5).double().numpy()

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    values = [
        k(*x) + k(*y) - 2 * np.mean([k(p, q) for p in x for q in y])
        for x in itertools.combinations(a, 2)
        for y in itertools.combinations(b, 2)
    ]
    found = kid(torch.from_numpy(a), torch.from_numpy(b))
    assert found["mean"] == pytest.approx(np.mean(values), abs=4 * np.std(values) / math.sqrt(KID_SUBSETS))
    assert found["std"] == pytest.approx(np.std(values), rel=0.3)
    values = [kid(rows(20, seed=2 * i), rows(20, seed=2 * i + 1))["mean"] for i in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_precision_and_recall_by_brute_force() -> None:
    made, real = rows(40, 3), rows(50, 3, seed=1, shift=0.7)

    def covered(points: list[list[float]], by: list[list[float]]) -> float:
        """Share of points within some ball about a row of `by` that reaches its third neighbour."""
        radii = [sorted(math.dist(centre, other) for other in by)[3] for centre in by]  # [0] is the row itself
        inside = [any(math.dist(p, centre) <= r for centre, r in zip(by, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    precision, recall = precision_recall(made, real)
    points, by = made.tolist(), real.tolist()
    assert (precision, recall) == (pytest.approx(covered(points, by)), pytest.approx(covered(by, points)))
    assert 0 < precision < 1
    assert (precision, recall) == calculate_precision_recall_full(made, real)


def test_precision_falls_with_strangers_and_recall_with_gaps() -> None:
    real = rows(200, 4)
    precision, recall = precision_recall(torch.cat([real[:100], rows(100, 4, seed=3, shift=50.0)]), real)
    assert precision == 0.5
    precision, recall = precision_recall(real[:1].repeat(200, 1) + rows(200, 4, seed=4) * 1e-3, real)
    assert precision == 1
    assert recall < 0.05


def test_nearest_is_brute_force_and_exact() -> None:
    a, b = rows(30, 5, shift=100.0), rows(2000, 5, seed=1, shift=100.0)
    b[1500] = a[7]
    distances, index = nearest(a, b)
    by_hand = (a[:, None].double() - b[None].double()).norm(dim=2)
    np.testing.assert_allclose(distances, by_hand.min(dim=1).values, rtol=1e-3, atol=1e-4)
    assert (distances[7], index[7]) == (0, 1500)
    others, which = nearest(b, b, other=True)
    assert not (which == torch.arange(2000)).any()
    assert others.min() > 0


def test_exact_copies_count_however_many_training_images_have_twins() -> None:
    """With twins of over COPY_QUANTILE of them, the threshold is 0."""
    training = rows(100, 4)
    twins = torch.cat([training, training[:2]])
    found = copies(torch.cat([training[50:53], rows(7, 4, seed=1, shift=30.0)]), twins)
    assert (found.threshold, found.share) == (0.0, 0.3)


def test_fresh_samples_are_copies_as_often_as_the_quantile_says() -> None:
    """Fewer neighbours (themselves left out) make no difference at 5,000: the share is the quantile."""
    training = rows(5000, 4)
    fresh = copies(rows(5000, 4, seed=1), training)
    assert fresh.share == pytest.approx(COPY_QUANTILE, abs=3 * math.sqrt(COPY_QUANTILE / 5000))
    few = torch.cat([rows(90, 4, seed=2, shift=30.0), training[:10] + 1e-4])
    found = copies(few, training)
    assert found.share == 0.1
    assert found.nearest[90:].tolist() == list(range(10))
    assert set(found.distances.argsort()[:10].tolist()) == set(range(90, 100))
    between = torch.cdist(training.double(), training.double()).fill_diagonal_(torch.inf).min(dim=1).values
    assert found.threshold == pytest.approx(float(np.quantile(between, COPY_QUANTILE)), rel=1e-5)


def test_the_distance_at_infinity_has_less_bias() -> None:
    """True distance of N(0, I) and N(m, I): |m|^2. Of the fewest rows allowed."""
    dim, shift, errors, whole = 32, 0.5, [], []
    for seed in range(16):
        x = rows(INFINITY_ROWS * dim, dim, seed=seed, shift=shift).double().numpy()
        errors.append(frechet_at_infinity(x, np.zeros(dim), np.eye(dim), seed=seed) - dim * shift**2)
        finite = frechet_distance(x.mean(0), np.cov(x, rowvar=False), np.zeros(dim), np.eye(dim))
        whole.append(finite - dim * shift**2)
    assert np.mean(whole) > 1
    assert abs(np.mean(errors)) < 0.15 * np.mean(whole)
    with pytest.raises(UserError, match="at least 160 samples and has 159"):
        frechet_at_infinity(x[1:], np.zeros(dim), np.eye(dim))


@pytest.mark.parametrize("measure", [kid, precision_recall, copies])
def test_features_that_do_not_fit_are_one_line(measure: object) -> None:
    with pytest.raises(UserError, match="one extractor"):
        measure(rows(10, 3), rows(10, 4))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"needs at least \d samples and \d real images, and there are 10 and 1: give"):
        measure(rows(10, 3), rows(1, 3))  # type: ignore[operator]
