"""Training and validation loss: draw t and noise, weight, mean."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.parameterization import PARAMETERIZATIONS
from diffusion.process import q_sample, signal_and_noise
from diffusion.runtime import autocast, generator
from diffusion.schedules import NoiseSchedule

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4


def simple_weight(snr: Tensor, prediction: str) -> Tensor:
    """Ho et al. 2020, eq. 14: every t counts the same."""
    return torch.ones_like(snr)


def min_snr_weight(snr: Tensor, prediction: str) -> Tensor:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) on the error of x0, carried over to the error of the target."""
    of_x0_error = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1.0}[prediction]  # target error / x0 error
    return snr.clamp(max=MIN_SNR_GAMMA) / of_x0_error


WEIGHTS: dict[str, Callable[[Tensor, str], Tensor]] = {"simple": simple_weight, "min_snr": min_snr_weight}


class Loss:
    """Weighted mean squared error between the network's output and its target.

    Everything is float32 except the network itself, which runs in `dtype`.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: str, weight: str, dtype: torch.dtype) -> None:
        self.schedule = schedule
        self.target = PARAMETERIZATIONS[prediction].target
        self.weights = WEIGHTS[weight](schedule.snr(), prediction).float()
        self.dtype = dtype

    def per_image(self, net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Unweighted loss of each image, float32 (B,). x0, eps: (B, C, H, W); t: int (B,)."""
        x_t = q_sample(self.schedule, x0, t, eps)
        with autocast(x0.device, self.dtype):
            output = net(x_t, t)
        target = self.target(x0, eps, *signal_and_noise(self.schedule, t, x0))
        return (output.float() - target).square().mean(dim=(1, 2, 3))

    def training(self, net: nn.Module, x0: Tensor, source: torch.Generator) -> Tensor:
        """Scalar loss of batch x0 (B, C, H, W), with t and noise drawn from `source`."""
        t = torch.randint(self.schedule.num_steps, (len(x0),), generator=source, device=x0.device)
        eps = torch.empty_like(x0).normal_(generator=source)
        weights = self.weights.to(x0.device)[t]
        return (weights * self.per_image(net, x0, t, eps)).mean()

    @torch.inference_mode()
    def validation(self, net: nn.Module, x0: Tensor, seed: int, batch_size: int) -> float:
        """Unweighted mean loss of x0 (N, C, H, W) on one fixed (t, noise) grid.

        t is spread evenly over the schedule, one stratum an image, so that N images cover all noise levels.
        """
        source = generator(seed, "validation")
        strata = (torch.arange(len(x0)) + 0.5) * self.schedule.num_steps / len(x0)
        t = strata.long()[torch.randperm(len(x0), generator=source)].to(x0.device)
        eps = torch.randn(x0.shape, generator=source).to(x0.device)
        parts = [
            self.per_image(net, x, t_part, eps_part)
            for x, t_part, eps_part in zip(
                x0.split(batch_size), t.split(batch_size), eps.split(batch_size), strict=True
            )
        ]
        return float(torch.cat(parts).double().mean())
