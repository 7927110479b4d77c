"""Mean and covariance of features, which torchmetrics sums over processes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from diffusion.errors import UserError
from diffusion.metrics.frechet import Gaussian, frechet_distance


class Moments(Metric):
    """Mean and covariance of rows that arrive in batches: sums in constant memory, in float64 also after `half`.

    `compute` is of the rows of all processes, as of any metric. `mean`, `cov`, `count` and `distance` are of this
    process's, or after `sync` of all; `merge_state` adds what another one has seen.
    """

    full_state_update = False
    seen: Tensor  # int64 ()
    total: Tensor  # float64 (d,): sum of the rows
    products: Tensor  # float64 (d, d): sum of their outer products

    def __init__(self, dim: int, **options: Any) -> None:
        """`options` are those of torchmetrics.Metric."""
        super().__init__(**options)
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor | np.ndarray) -> None:
        """Take rows (N, d).

        Raises:
            UserError: another width, or a value that is not finite.
        """
        rows = torch.as_tensor(features).to(self.total.device, torch.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise UserError(f"features of shape {tuple(rows.shape)}, expected (N, {len(self.total)})")
        if not rows.isfinite().all():
            raise UserError("features hold NaN or infinity: the images or the extractor's weights are damaged")
        self.products.addmm_(rows.T, rows)  # fails where `to` has given the sums another precision
        self.total += rows.sum(0)
        self.seen += len(rows)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and unbiased covariance (d, d); raises UserError as `cov`."""
        return torch.from_numpy(self.mean), torch.from_numpy(self.cov)

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.seen)

    @property
    def mean(self) -> np.ndarray:
        """float64 (d,)."""
        return (self.total / self.seen).numpy(force=True)

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance, float64 (d, d).

        Raises:
            UserError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}")
        scatter = self.products - self.total.outer(self.total) / self.seen
        return (scatter / (self.seen - 1)).numpy(force=True)

    def distance(self, other: Gaussian) -> float:
        """Frechet distance to `other`; raises UserError as `frechet_distance` and `cov` do."""
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)
