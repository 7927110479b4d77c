"""Samplers: from noise to images in a given list of steps.

One signature: `sampler(denoise, schedule, x_T, timesteps, *, noise, ...)` yields x after every step, the finished
images last. `denoise(x_t, t) -> Prediction(x0, eps)` is all they know of the model; `noise()` returns standard normal
noise in the shape of x_T. A sampler's other keyword arguments are keys of params.yaml's sample section. To add one:
a function here, an entry in SAMPLERS, its name in config.py.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from diffusion.config import SampleConfig
from diffusion.parameterization import Prediction
from diffusion.process import column, posterior_mean_variance
from diffusion.schedules import NoiseSchedule

Denoise = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[], Tensor]


def ddpm(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,  # (B, C, H, W) standard normal
    timesteps: Tensor,  # int (steps,), descending
    *,
    noise: Noise | None = None,  # None = torch's global generator
    variance: str = "fixed_small",  # fixed_small: beta-tilde; fixed_large: beta (Ho et al. 2020, section 3.2)
) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on a respaced chain when steps are left out."""
    x = x_T
    for t, s, last in _pairs(timesteps, x):
        mean, small = posterior_mean_variance(schedule, denoise(x, t).x0, x, t, s)
        sigma2 = small if variance == "fixed_small" else column(1.0 - schedule.alpha_bar(t) / schedule.alpha_bar(s), x)
        x = mean if last else mean + sigma2.sqrt() * _draw(noise, x)
        yield x


def ddim(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,  # 0 = deterministic, 1 = ddpm with fixed_small
) -> Iterator[Tensor]:
    """Song et al. 2021 (DDIM), eqs. 12 and 16."""
    x = x_T
    for t, s, last in _pairs(timesteps, x):
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
        sigma2 = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        x0, eps = denoise(x, t)
        x = column(alpha_bar_s.sqrt(), x) * x0 + column((1 - alpha_bar_s - sigma2).clamp(min=0).sqrt(), x) * eps
        if eta > 0 and not last:
            x = x + column(sigma2.sqrt(), x) * _draw(noise, x)
        yield x


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {"ddpm": ddpm, "ddim": ddim}


def configured(config: SampleConfig) -> Callable[..., Iterator[Tensor]]:
    """The sampler that `sample.sampler` names, with its options taken from the same section."""
    sampler = SAMPLERS[config.sampler]
    options = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return partial(sampler, **{name: getattr(config, name) for name in options if name != "noise"})


def _pairs(timesteps: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(t, s, is it the last) with int64 (B,) t and s: each step and the next one, -1 after the last.

    The flag is Python's: reading s back from a GPU would wait for it.
    """
    for t, s in itertools.pairwise([*timesteps.tolist(), -1]):
        yield torch.full((len(x),), t, device=x.device), torch.full((len(x),), s, device=x.device), s < 0


def _draw(noise: Noise | None, x: Tensor) -> Tensor:
    return noise() if noise else torch.randn_like(x)
