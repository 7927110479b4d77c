"""Pixels of N(mu, sigma2), of which the best denoiser is known in closed form."""

from collections.abc import Callable

from torch import Tensor

from diffusion.model.denoiser import Prediction
from diffusion.model.schedules import NoiseSchedule

MU, SIGMA = 0.3, 0.5


def gaussian_denoiser(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Prediction]:
    """E[x0 | x_t] and E[eps | x_t]."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha_bar = schedule.alphas_cumprod[t].to(x_t.dtype).view(-1, 1, 1, 1)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        variance = a**2 * SIGMA**2 + s**2
        eps = s * (x_t - a * MU) / variance
        return Prediction((a * SIGMA**2 * x_t + s**2 * MU) / variance, eps)

    return denoise
