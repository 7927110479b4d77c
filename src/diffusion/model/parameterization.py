"""What the network predicts: training target and its inversion side by side, and the denoiser that samplers call.

With a = sqrt(alpha-bar_t) and s = sqrt(1 - alpha-bar_t): x_t = a x0 + s eps (Ho et al. 2020, eq. 4).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] (Karras et al. 2022, table 1)


@dataclass(frozen=True)
class Parameterization:
    """A training target and the way back from it. All take (.., a, s) with a, s of shape (B, 1, 1, 1)."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, eps, a, s) -> what the network should output
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (output, x_t, a, s) -> x0
    of_x0_error: Callable[[Tensor], Tensor]  # snr -> squared error of the output in units of x0's
    net_input: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x_t, a, s: x_t  # what the network sees


def _edm_scale(a: Tensor, s: Tensor) -> Tensor:
    """Standard deviation of x_t, if that of the images is SIGMA_DATA."""
    return (s**2 + (a * SIGMA_DATA) ** 2).sqrt()


def _edm_x0(out: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    scale = _edm_scale(a, s)
    return a * (SIGMA_DATA / scale) ** 2 * x_t + s * SIGMA_DATA / scale * out


PARAMETERIZATIONS = {
    # Ho et al. 2020, eq. 14
    "eps": Parameterization(
        lambda x0, eps, a, s: eps,
        lambda out, x_t, a, s: (x_t - s * out) / a,
        lambda snr: snr,
    ),
    "x0": Parameterization(
        lambda x0, eps, a, s: x0,
        lambda out, x_t, a, s: out,
        torch.ones_like,
    ),
    # Salimans & Ho 2022, section 4 and appendix D
    "v": Parameterization(
        lambda x0, eps, a, s: a * eps - s * x0,
        lambda out, x_t, a, s: a * x_t - s * out,
        lambda snr: snr + 1.0,
    ),
    # Karras et al. 2022, table 1 with sigma = s / a, its x = x_t / a: the network's input, x0 and target, cleared of a
    "edm": Parameterization(
        lambda x0, eps, a, s: (s * x0 - a * SIGMA_DATA**2 * eps) / (SIGMA_DATA * _edm_scale(a, s)),
        _edm_x0,
        lambda snr: snr + SIGMA_DATA**-2,
        lambda x_t, a, s: x_t / _edm_scale(a, s),
    ),
}
