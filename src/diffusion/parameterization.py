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


class Prediction(NamedTuple):
    """The denoiser's estimate of the two parts of x_t, each (B, C, H, W) float32."""

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Parameterization:
    """A training target and the way back from it. Both take (.., a, s) with a, s of shape (B, 1, 1, 1)."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, eps, a, s) -> what the network should output
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (output, x_t, a, s) -> x0


PARAMETERIZATIONS = {
    # Ho et al. 2020, eq. 14
    "eps": Parameterization(lambda x0, eps, a, s: eps, lambda out, x_t, a, s: (x_t - s * out) / a),
    "x0": Parameterization(lambda x0, eps, a, s: x0, lambda out, x_t, a, s: out),
    # Salimans & Ho 2022, section 4 and appendix D
    "v": Parameterization(lambda x0, eps, a, s: a * eps - s * x0, lambda out, x_t, a, s: a * x_t - s * out),
}


class Denoiser:
    """Network + schedule + parameterisation -> Prediction(x0, eps); all that a sampler knows of the model.

    The network runs in `dtype`, everything around it in float32.
    """

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
        self.schedule = schedule
        self.parameterization = PARAMETERIZATIONS[prediction]
        self.dtype = dtype
        self.clip_x0 = clip_x0

    def compiled(self) -> "Denoiser":
        """The same with its network compiled, anew for every batch shape: give it one."""
        other = copy.copy(self)
        other.net = torch.compile(self.net, dynamic=False)  # type: ignore[assignment]
        return other

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """x_t (B, C, H, W) float32, t int (B,) in 0 .. num_steps - 1."""
        with autocast(x_t.device, self.dtype):
            output = self.net(x_t, t).float()
        a, s = signal_and_noise(self.schedule, t, x_t)
        x0 = self.parameterization.x0(output, x_t, a, s)
        if self.clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
        return Prediction(x0, (x_t - a * x0) / s)
