"""The forward process: x_t from x0, and the posterior of an earlier step."""

from torch import Tensor

from diffusion.model.schedules import NoiseSchedule


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0) for noise eps ~ N(0, I) (Ho et al. 2020, eq. 4).

    x0 and eps: (B, C, H, W); t: int (B,) in 0 .. num_steps - 1. Computed in x0's dtype.
    """
    signal, noise = signal_and_noise(schedule, t, x0)
    return signal * x0 + noise * eps


def signal_and_noise(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), each (B, 1, 1, 1) in the dtype and on the device of `like`."""
    alpha_bar = schedule.alpha_bar(t)
    return column(alpha_bar.sqrt(), like), column((1.0 - alpha_bar).sqrt(), like)


def q_posterior_mean_variance(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eqs. 6-7)."""
    return posterior_mean_variance(schedule, x0, x_t, t, t - 1)


def posterior_mean_variance(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """As `q_posterior_mean_variance`, for any earlier step s < t (s = -1: the image itself, variance 0).

    With alpha = alpha-bar_t / alpha-bar_s and beta = 1 - alpha, eqs. 6-7 hold for a respaced chain too
    (Nichol & Dhariwal 2021, section 4).
    """
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    alpha = alpha_bar_t / alpha_bar_s
    of_x0 = alpha_bar_s.sqrt() * (1.0 - alpha) / (1.0 - alpha_bar_t)
    of_x_t = alpha.sqrt() * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)
    variance = (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t) * (1.0 - alpha)
    return column(of_x0, x_t) * x0 + column(of_x_t, x_t) * x_t, column(variance, x_t)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype and on the device of `like`."""
    return values.to(dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)
