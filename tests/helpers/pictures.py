"""Images whose features can be computed by hand, and extractors of few features in the place of the real ones."""

from pathlib import Path

import numpy as np
import torch

from diffusion.data.download.inception_weights import sha256
from diffusion.metrics.features import Inception


class Colours(torch.nn.Module):
    """Features that can be computed by hand: the three channel means."""

    metric, dim = "colours", 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    def describe(self) -> dict[str, str]:
        return {"extractor": "colours"}


class SmallLite0(Colours):
    """For fd_lite0."""

    metric = "fd_lite0"

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__()


class SmallInception(Inception):
    """Twelve features in the place of FID's 2,048, of any file of weights."""

    dim = 12

    def __init__(self, weights: Path, precision: str = "fp32") -> None:
        torch.nn.Module.__init__(self)
        self.weights_sha256 = sha256(weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
