"""Images whose features can be computed by hand."""

import numpy as np
import torch


class Colours(torch.nn.Module):
    """Features that can be computed by hand: the three channel means."""

    metric, dim = "colours", 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    def describe(self) -> dict[str, str]:
        return {"extractor": "colours"}


def pictures(count: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
