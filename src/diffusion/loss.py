"""Training and validation loss: draw t and noise, weight, mean."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.distributed import ALONE, World
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


def uniform_timesteps(num_steps: int, count: int, source: torch.Generator) -> Tensor:
    """int64 (count,): independent and uniform over 0 .. num_steps - 1 (Ho et al. 2020, algorithm 1)."""
    return torch.randint(num_steps, (count,), generator=source, device=source.device)


def stratified_timesteps(num_steps: int, count: int, source: torch.Generator) -> Tensor:
    """int64 (count,): one from each of `count` equal parts of the schedule, in random order.

    Each is uniform on its own, so the expected gradient is unchanged; its variance over batches falls (Kingma et al.
    2021, appendix I.1).
    """
    parts = torch.randperm(count, generator=source, device=source.device)
    u = torch.rand(count, generator=source, device=source.device, dtype=torch.float64)
    return ((parts + u) * (num_steps / count)).long().clamp(max=num_steps - 1)


TIMESTEPS = {"uniform": uniform_timesteps, "stratified": stratified_timesteps}


class Loss:
    """Weighted mean squared error between the network's output and its target.

    Everything is float32 except the network itself, which runs in `dtype`.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction: str, weight: str, dtype: torch.dtype, timesteps: str = "uniform"
    ) -> None:
        self.timesteps = TIMESTEPS[timesteps]
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

    def draw(self, x0: Tensor, batch_size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, noise) of a whole batch: int (batch_size,) and float32 (batch_size, C, H, W), like images x0."""
        t = self.timesteps(self.schedule.num_steps, batch_size, source)
        eps = torch.empty((batch_size, *x0.shape[1:]), device=x0.device, memory_format=torch.channels_last)
        return t, eps.normal_(generator=source)

    def training(self, net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Scalar loss of x0 (B, C, H, W) at steps t (B,) with noise eps: the weighted mean."""
        return (self.weights[t] * self.per_image(net, x0, t, eps)).mean()

    @torch.inference_mode()
    def validation(self, net: nn.Module, x0: Tensor, seed: int, batch_size: int, world: World = ALONE) -> float:
        """Unweighted mean loss of x0 (N, C, H, W) on one fixed (t, noise) grid; each rank of `world` does its share.

        t is spread evenly over the schedule, one stratum an image, so that N images cover all noise levels.
        """
        source = generator(seed, "validation")
        strata = (torch.arange(len(x0)) + 0.5) * self.schedule.num_steps / len(x0)
        t = strata.long()[torch.randperm(len(x0), generator=source)]
        eps = torch.randn(x0.shape, generator=source)
        share = world.share(len(x0))
        total = torch.zeros((), dtype=torch.float64)
        for start in range(share.start, share.stop, batch_size):
            part = slice(start, min(start + batch_size, share.stop))
            losses = self.per_image(net, x0[part], t[part].to(x0.device), eps[part].to(x0.device))
            total += losses.cpu().double().sum()
        return float(world.sum_(total)) / len(x0)
