"""Noise schedules: where beta_t and alpha-bar_t are made, and which timesteps a sampler visits.

Tables are float64; a network step works on float32 rows of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.config import DiffusionConfig

SIGMA_MAX = 80.0  # of s / a: from there on x_t is noise to any purpose (Karras et al. 2022, table 1)
MAX_BETA = 0.999  # keeps the last steps of cosine and sigmoid finite (Nichol & Dhariwal 2021, section 3.2)


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) eps, for t = 0 .. num_steps - 1.

    Both tables are float64 of length num_steps; betas[t] is the variance that step t adds.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """float64 (B,): alphas_cumprod at integer steps t (B,); 1 at t = -1, where no noise is left."""
        padded = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod])
        return padded[t.to(padded.device) + 1]

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same schedule with its tables on `device`, or on the CPU where `device` has no float64 (mps)."""
        if device.type == "mps":
            return self
        return NoiseSchedule(self.betas.to(device), self.alphas_cumprod.to(device))

    def log_ratio(self) -> Tensor:
        """float64 (num_steps,): lambda = log(a / s) with a = sqrt(alpha-bar), s = sqrt(1 - alpha-bar)."""
        return torch.logit(self.alphas_cumprod) / 2

    def snr(self) -> Tensor:
        """float64 (num_steps,): signal-to-noise ratio alpha-bar / (1 - alpha-bar)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)


def linear_betas(num_steps: int) -> np.ndarray:
    """Ho et al. 2020, section 4: 1e-4 .. 0.02 over 1,000 steps, scaled so that other lengths add as much noise."""
    scale = 1000 / num_steps
    return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, num_steps), MAX_BETA)


def cosine_betas(num_steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17: alpha-bar = cos^2 of (t/T + s) / (1 + s) * pi/2 with s = 0.008."""
    return _betas(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_steps)


def sigmoid_betas(num_steps: int) -> np.ndarray:
    """Jabri et al. 2022 (appendix B; Chen 2023, algorithm 1): alpha-bar from a sigmoid between -3 and 3, tau = 1."""

    def sigmoid(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    low, high = sigmoid(-3.0), sigmoid(3.0)
    return _betas(lambda u: (high - sigmoid(6.0 * u - 3.0)) / (high - low), num_steps)


def edm_betas(num_steps: int) -> np.ndarray:
    """Karras et al. 2022 in variance-preserving form, alpha-bar = 1 / (1 + sigma^2): ln sigma even, 0.002 to 80."""
    sigma = np.exp(np.linspace(math.log(0.002), math.log(80.0), num_steps)) if num_steps > 1 else np.array([80.0])
    alphas_cumprod = 1.0 / (1.0 + np.concatenate([[0.0], sigma]) ** 2)
    return 1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "edm": edm_betas,
}


def make_schedule(name: str, num_steps: int, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule `linear | cosine | sigmoid | edm` with num_steps >= 1; if asked, no signal is left at the last step.

    Raises:
        ValueError: unknown name, or no steps.
    """
    if name not in SCHEDULES or num_steps < 1:
        raise ValueError(f"no schedule {name!r} with {num_steps} steps: use one of {', '.join(SCHEDULES)}, 1 or more")
    betas = SCHEDULES[name](num_steps)
    if zero_terminal_snr:
        betas = without_terminal_signal(betas)
    return NoiseSchedule(torch.from_numpy(betas), torch.from_numpy(np.cumprod(1.0 - betas)))


def configured_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The schedule of the diffusion section."""
    return make_schedule(config.schedule, config.num_steps, zero_terminal_snr=config.zero_terminal_snr)


def without_terminal_signal(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1: sqrt(alpha-bar) shifted to end at 0 and scaled to begin as before."""
    signal = np.sqrt(np.cumprod(1.0 - betas))
    if len(signal) == 1:
        return np.ones(1)
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return 1.0 - np.concatenate([[signal[0]], signal[1:] / signal[:-1]]) ** 2


def _betas(alpha_bar: Callable[[float], float], num_steps: int) -> np.ndarray:
    """beta_t = 1 - alpha-bar(t + 1) / alpha-bar(t) on u in [0, 1], capped (Nichol & Dhariwal 2021, section 3.2)."""
    values = np.array([alpha_bar(i / num_steps) for i in range(num_steps + 1)])
    return np.minimum(1.0 - values[1:] / values[:-1], MAX_BETA)
