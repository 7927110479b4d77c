"""What the network predicts: training target and its inversion side by side, and the denoiser that samplers call.

With a = sqrt(alpha-bar_t) and s = sqrt(1 - alpha-bar_t): x_t = a x0 + s eps (Ho et al. 2020, eq. 4).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.process import signal_and_noise
from diffusion.runtime import autocast
from diffusion.schedules import NoiseSchedule

SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1] (Karras et al. 2022, table 1)


class Prediction(NamedTuple):
    """The denoiser's estimate of the two parts of x_t, each (B, C, H, W) float32."""

    x0: Tensor
    eps: Tensor


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


class Denoiser:
    """Network + schedule + parameterisation -> Prediction(x0, eps); all that a sampler knows of the model.

    The network runs in `dtype`, everything around it in float32.
    """

    labels: Tensor | None = None  # int (B,); None or -1 = of no class
    guidance = 1.0  # 1 = none

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        prediction: str,
        *,
        dtype: torch.dtype = torch.float32,
        clip_x0: bool = False,  # clamp x0 to [-1, 1] and make eps agree with it (Ho et al. 2020's sampler)
    ) -> None:
        self.net = net
        self.image_shape: tuple[int, int, int] = net.image_shape  # type: ignore[assignment]  # (C, H, W)
        self.num_classes: int | None = net.num_classes  # type: ignore[assignment]
        self.schedule = schedule
        self.parameterization = PARAMETERIZATIONS[prediction]
        self.dtype = dtype
        self.clip_x0 = clip_x0

    def compiled(self) -> "Denoiser":
        """The same with its network compiled, anew for every batch shape: give it one."""
        other = copy.copy(self)
        other.net = torch.compile(self.net, dynamic=False)  # type: ignore[assignment]
        return other

    def of(self, labels: Tensor | None, guidance: float = 1.0) -> "Denoiser":
        """The same for a batch with these labels (B,), drawn away from images of no class by `guidance`."""
        other = copy.copy(self)
        other.labels, other.guidance = labels, guidance
        return other

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """x_t (B, C, H, W) float32, t int (B,) in 0 .. num_steps - 1."""
        a, s = signal_and_noise(self.schedule, t, x_t)
        output = self._guided(self.parameterization.net_input(x_t, a, s), t)
        x0 = self.parameterization.x0(output, x_t, a, s)
        if self.clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
        return Prediction(x0, (x_t - a * x0) / s)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output, float32; guided as Ho & Salimans 2022, eq. 6, with 1 + w, both branches in one call."""
        with autocast(x.device, self.dtype):
            if self.labels is None:
                return self.net(x, t).float()
            if self.guidance == 1.0:
                return self.net(x, t, self.labels).float()
            labels = torch.cat([self.labels, torch.full_like(self.labels, -1)])
            given, free = self.net(torch.cat([x, x]), torch.cat([t, t]), labels).float().chunk(2)
        return free + self.guidance * (given - free)
