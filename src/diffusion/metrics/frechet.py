"""The Frechet distance between Gaussians, and its value for infinite samples."""

from typing import Protocol

import numpy as np

from diffusion.errors import UserError
from diffusion.rules import INFINITY_ROWS


class Gaussian(Protocol):
    """Mean (d,) and covariance (d, d), float64."""

    @property
    def mean(self) -> np.ndarray: ...
    @property
    def cov(self) -> np.ndarray: ...


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) (Dowson & Landau 1982, eq. 4; Heusel et al. 2017, eq. 6).

    mu: (d,), cov: (d, d) symmetric positive semi-definite. With factors cov = f f^T from eigenvalues, the trace of the
    root is the sum of the singular values of f1^T f2: no complex matrix square root is needed, and a covariance of
    fewer images than features costs no digits (eigenvalues of the product would lose half of them there).

    Raises:
        UserError: shapes do not agree, or a value is not finite.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (*mu1.shape, *mu1.shape):
        shapes = f"{mu1.shape}, {cov1.shape} and {mu2.shape}, {cov2.shape}"
        raise UserError(f"moments of shapes {shapes} cannot be compared: were they made by one extractor?")
    if not all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)):
        raise UserError("moments hold NaN or infinity: compute them again")
    trace_of_root = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
    difference = mu1 - mu2
    traces = np.trace(cov1) + np.trace(cov2)
    distance = float(difference @ difference + traces - 2 * trace_of_root)
    rounding = 10 * len(mu1) * traces * np.finfo(np.float64).eps  # by which equal Gaussians differ, on either side of 0
    return distance if distance > rounding else 0.0


def frechet_at_infinity(
    features: np.ndarray, mean: np.ndarray, cov: np.ndarray, *, points: int = 15, seed: int = 0
) -> float:
    """Frechet distance of rows (N, d) to a Gaussian, extrapolated to N = infinity (Chong & Forsyth 2020, algorithm 1).

    Distances of random subsets, of `points` sizes from N / 2 to N, lie on a line in 1 / size, whose value at 0 this is.
    The paper has N = 50,000 and sizes from 5,000: 2.4 d. Below that the distance bends away from the line, and the
    value falls under the true one; so the smallest subset here has 2.5 d rows. The bias of the Gaussian's own finite
    sample stays.

    Raises:
        UserError: fewer than INFINITY_ROWS d rows, too few for a line.
    """
    count, dim = features.shape
    if count < INFINITY_ROWS * dim:
        raise UserError(
            f"the distance at infinity needs the features of at least {INFINITY_ROWS * dim} samples and has {count}: "
            "give more, keep more, or leave infinity out"
        )
    rng, rows = np.random.default_rng(seed), features.astype(np.float64)
    sizes = np.linspace(count // 2, count, points).astype(int)
    distances = []
    for size in sizes:
        chosen = rows[rng.permutation(count)[:size]]
        distances.append(frechet_distance(chosen.mean(axis=0), np.cov(chosen, rowvar=False), mean, cov))
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def _factor(cov: np.ndarray) -> np.ndarray:
    """F with f f^T = cov; eigenvalues within rounding of zero, also negative ones, count as zero."""
    values, vectors = np.linalg.eigh(cov)
    rounding = np.abs(values).max() * len(values) * np.finfo(np.float64).eps  # as numpy.linalg.matrix_rank
    return np.asarray(vectors * np.sqrt(np.where(values > rounding, values, 0.0)))
