"""Network, schedule and parameterisation as the one thing that samplers ask."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.model.parameterization import PARAMETERIZATIONS
from diffusion.model.process import signal_and_noise
from diffusion.model.schedules import NoiseSchedule
from diffusion.runtime import autocast


class Prediction(NamedTuple):
    """The denoiser's estimate of the two parts of x_t, each (B, C, H, W) float32."""

    x0: Tensor
    eps: Tensor


class Denoiser:
    """Network + schedule + parameterisation -> Prediction(x0, eps); all that a sampler knows of the model.

    The network runs in `dtype`, everything around it in float32.
    """

    labels: Tensor | None = None  # int (B,); None or -1 = of no class
    guidance = 1.0  # 1 = none
    guidable = True  # the network was also trained without classes

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
        """The same for a batch with these labels (B,), drawn away from images of no class by `guidance`.

        Raises:
            UserError: the network does not know images of no class.
        """
        if guidance != 1.0 and not self.guidable:
            raise UserError("the model was never trained without a class: set sample.guidance: 1.0")
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
