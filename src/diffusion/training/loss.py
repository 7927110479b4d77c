"""Training and validation loss: draw t and noise, weight, mean."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.model.parameterization import PARAMETERIZATIONS
from diffusion.model.process import q_sample, signal_and_noise
from diffusion.model.schedules import NoiseSchedule
from diffusion.runtime import autocast, generator

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # Karras et al. 2022, table 1


def simple_weight(snr: Tensor, prediction: str) -> Tensor:
    """Ho et al. 2020, eq. 14: every t counts the same."""
    return torch.ones_like(snr)


def min_snr_weight(snr: Tensor, prediction: str) -> Tensor:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) on the error of x0, carried over to the error of the target."""
    return snr.clamp(max=MIN_SNR_GAMMA) / PARAMETERIZATIONS[prediction].of_x0_error(snr)


def own_weight(snr: Tensor, prediction: str) -> Tensor:
    """As the objective was proposed: max(SNR, 1) for x0 (Salimans & Ho 2022, section 4); 1 for eps, v and edm.

    For edm that is lambda(sigma) = 1 / c_out^2 on the error of x0 (Karras et al. 2022, table 1).
    """
    return snr.clamp(min=1.0) if prediction == "x0" else torch.ones_like(snr)


WEIGHTS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "simple": simple_weight,
    "min_snr": min_snr_weight,
    "own": own_weight,
}


def uniform_timesteps(schedule: NoiseSchedule, count: int, source: torch.Generator) -> Tensor:
    """int64 (count,): independent and uniform over 0 .. num_steps - 1 (Ho et al. 2020, algorithm 1)."""
    return torch.randint(schedule.num_steps, (count,), generator=source, device=source.device)


def lognormal_timesteps(schedule: NoiseSchedule, count: int, source: torch.Generator) -> Tensor:
    """int64 (count,): the steps with sigma = s / a nearest to draws of a log-normal (Karras et al. 2022, table 1)."""
    log_sigma = -schedule.log_ratio().to(source.device, torch.float32)
    drawn = torch.randn(count, generator=source, device=source.device) * LOG_SIGMA_STD + LOG_SIGMA_MEAN
    return torch.searchsorted((log_sigma[1:] + log_sigma[:-1]) / 2, drawn)


def stratified_timesteps(schedule: NoiseSchedule, count: int, source: torch.Generator) -> Tensor:
    """int64 (count,): one from each of `count` equal parts of the schedule, in random order.

    Each is uniform on its own, so the expected gradient is unchanged; its variance over batches falls (Kingma et al.
    2021, appendix I.1).
    """
    parts = torch.randperm(count, generator=source, device=source.device)
    exact = torch.float32 if source.device.type == "mps" else torch.float64  # mps has no float64
    u = torch.rand(count, generator=source, device=source.device, dtype=exact)
    return ((parts + u) * (schedule.num_steps / count)).long().clamp(max=schedule.num_steps - 1)


TIMESTEPS: dict[str, Callable[[NoiseSchedule, int, torch.Generator], Tensor]] = {
    "uniform": uniform_timesteps,
    "stratified": stratified_timesteps,
    "lognormal": lognormal_timesteps,
}


class Loss:
    """Weighted mean squared error between the network's output and its target.

    Everything is float32 except the network itself, which runs in `dtype`.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction: str, weight: str, dtype: torch.dtype, timesteps: str = "uniform"
    ) -> None:
        self.timesteps = TIMESTEPS[timesteps]
        self.schedule = schedule
        self.parameterization = PARAMETERIZATIONS[prediction]
        self.weights = WEIGHTS[weight](schedule.snr(), prediction).float()
        self.dtype = dtype

    def per_image(self, net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, **given: Tensor) -> Tensor:
        """Unweighted loss of each image, float32 (B,). x0, eps: (B, C, H, W); t: int (B,); `given`: for the network."""
        a, s = signal_and_noise(self.schedule, t, x0)
        x = self.parameterization.net_input(q_sample(self.schedule, x0, t, eps), a, s)
        with autocast(x0.device, self.dtype):
            output = net(x, t, **given)
        target = self.parameterization.target(x0, eps, a, s)
        return (output.float() - target).square().mean(dim=(1, 2, 3))

    def draw(self, x0: Tensor, batch_size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, noise) of a whole batch: int (batch_size,) and float32 (batch_size, C, H, W), like images x0."""
        t = self.timesteps(self.schedule, batch_size, source)
        eps = torch.empty((batch_size, *x0.shape[1:]), device=x0.device, memory_format=torch.channels_last)
        return t, eps.normal_(generator=source)

    def training(self, net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, **given: Tensor) -> Tensor:
        """Scalar loss of x0 (B, C, H, W) at steps t (B,) with noise eps: the weighted mean."""
        weights = self.weights.to(t.device)  # on mps the tables stay on the CPU
        return (weights[t] * self.per_image(net, x0, t, eps, **given)).mean()

    @torch.inference_mode()
    def validation(
        self,
        net: nn.Module,
        x0: Tensor,
        seed: int,
        batch_size: int,
        world: World = SINGLE_PROCESS,
        **given: Tensor,
    ) -> float:
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
            of_part = {name: value[part] for name, value in given.items()}
            losses = self.per_image(net, x0[part], t[part].to(x0.device), eps[part].to(x0.device), **of_part)
            total += losses.cpu().double().sum()
        return float(world.sum_(total)) / len(x0)
