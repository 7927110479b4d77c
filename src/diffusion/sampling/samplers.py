"""Samplers: from noise to images in a given list of steps.

One signature: `sampler(denoise, schedule, x_T, timesteps, *, noise, ...)` yields x after every step, the finished
images last. `denoise(x_t, t) -> Prediction(x0, eps)` is all they know of the model; `noise()` returns standard normal
noise in the shape of x_T. A sampler's other keyword arguments are keys of params.yaml's sample section. To add one:
a function here, an entry in SAMPLERS, its name in config.py.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffusion.config import SampleConfig
from diffusion.model.denoiser import Prediction
from diffusion.model.process import column, posterior_mean_variance, signal_and_noise
from diffusion.model.schedules import SIGMA_MAX, NoiseSchedule
from diffusion.sampling.spacings import sampling_timesteps

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


def heun(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    noise: Noise | None = None,  # not used: deterministic, as the next two are
) -> Iterator[Tensor]:
    """Karras et al. 2022, algorithm 1 without churn: the trapezoidal rule for x / a over sigma = s / a, order 2.

    Two evaluations a step, but one in the last, and in a first one from beyond SIGMA_MAX, which would be far too long.
    """
    x = x_T
    blind = _is_noise(schedule, timesteps)
    for t, s, last in _pairs(timesteps, x):
        (a_t, s_t), (a_s, s_s) = signal_and_noise(schedule, t, x), signal_and_noise(schedule, s, x)
        x0, eps = denoise(x, t)
        euler = a_s * x0 + s_s * eps
        if not last and not blind:
            slope = (eps + denoise(euler, s).eps) / 2
            euler = a_s * (x / a_t + (s_s / a_s - s_t / a_t) * slope)
        x, blind = euler, False
        yield x


def dpmpp_2m(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), algorithm 2, order 2 with one evaluation a step."""
    return _multistep(denoise, schedule, x_T, timesteps, correct=False)


def unipc(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    *,
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """UniPC-2 with B2(h) = e^h - 1 on x0 (Zhao et al. 2023, algorithms 1 and 2): its predictor is DPM-Solver++(2M)."""
    return _multistep(denoise, schedule, x_T, timesteps, correct=True)


def _multistep(
    denoise: Denoise, schedule: NoiseSchedule, x_T: Tensor, timesteps: Tensor, *, correct: bool
) -> Iterator[Tensor]:
    x, step = x_T, None
    for t, s, last in _pairs(timesteps, x):
        x0 = denoise(x, t).x0
        if correct and step:
            x = step.corrected(x0)
        step = ExponentialStep.between(schedule, t, s, x, x0, step)
        x = step.predicted(first_order=last)
        yield x


@dataclass(frozen=True)
class ExponentialStep:
    """From x and x0 at step t to step s, exact if x0 is constant in between; h = growth of lambda = log(a / s)."""

    x: Tensor
    x0: Tensor
    h: Tensor  # float64 (B,)
    decay: Tensor  # of x, (B, 1, 1, 1)
    gain: Tensor  # of x0
    before: "ExponentialStep | None"

    @staticmethod
    def between(
        schedule: NoiseSchedule, t: Tensor, s: Tensor, x: Tensor, x0: Tensor, before: "ExponentialStep | None"
    ) -> "ExponentialStep":
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
        h = (torch.logit(alpha_bar_s) - torch.logit(alpha_bar_t)) / 2
        decay, gain = ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt(), -alpha_bar_s.sqrt() * torch.expm1(-h)
        return ExponentialStep(x, x0, h, column(decay, x), column(gain, x), before and replace(before, before=None))

    def predicted(self, *, first_order: bool) -> Tensor:
        """X at s, with x0's slope from the step before."""
        if first_order or not self.before:
            return self._to(self.x0)
        return self._to(self.x0 + column(self.h / self.before.h / 2, self.x) * (self.x0 - self.before.x0))

    def corrected(self, x0_s: Tensor) -> Tensor:
        """X at s again, now that x0 was found there: UniC with B2(h) (Zhao et al. 2023, algorithm 1, appendix A)."""
        if not self.before:
            return self._to((self.x0 + x0_s) / 2)
        b, r = torch.expm1(-self.h), -self.before.h / self.h
        phi2 = -b / self.h - 1
        b1, b2 = phi2 / b, 2 * (-phi2 / self.h - 0.5) / b
        of_before = (b1 - b2) / (1 - r)
        slope = column(of_before / r, self.x) * (self.before.x0 - self.x0)
        return self._to(self.x0 + slope + column(b1 - of_before, self.x) * (x0_s - self.x0))

    def _to(self, x0: Tensor) -> Tensor:
        return self.decay * self.x + self.gain * x0


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


def configured(config: SampleConfig) -> Callable[..., Iterator[Tensor]]:
    """The sampler that `sample.sampler` names, with its options taken from the same section."""
    sampler = SAMPLERS[config.sampler]
    options = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return partial(sampler, **{name: getattr(config, name) for name in options if name != "noise"})


def evaluations(config: SampleConfig, schedule: NoiseSchedule) -> int:
    """Network evaluations that an image takes; with guidance each is of two images in one call."""
    if config.sampler != "heun":
        return config.steps
    timesteps = sampling_timesteps(config.spacing, schedule, config.steps)
    return 2 * config.steps - 1 - (_is_noise(schedule, timesteps) and config.steps > 1)


def _is_noise(schedule: NoiseSchedule, timesteps: Tensor) -> bool:
    """Whether the first step comes from beyond SIGMA_MAX."""
    return float(schedule.log_ratio()[timesteps[0]]) < -math.log(SIGMA_MAX * 1.1)


def _pairs(timesteps: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(t, s, is it the last) with int64 (B,) t and s: each step and the next one, -1 after the last.

    The flag is Python's: reading s back from a GPU would wait for it.
    """
    for t, s in itertools.pairwise([*timesteps.tolist(), -1]):
        yield torch.full((len(x),), t, device=x.device), torch.full((len(x),), s, device=x.device), s < 0


def _draw(noise: Noise | None, x: Tensor) -> Tensor:
    return noise() if noise else torch.randn_like(x)
