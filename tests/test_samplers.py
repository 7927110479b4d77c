"""Samplers against an exact denoiser: data N(mu, sigma2) per pixel have a closed-form E[x0 | x_t]."""

import itertools

import pytest
import torch
from conftest import REPO
from torch import Tensor

from diffusion import config
from diffusion.parameterization import Prediction
from diffusion.process import signal_and_noise
from diffusion.samplers import SAMPLERS, configured, ddim, ddpm
from diffusion.schedules import NoiseSchedule, make_schedule, sampling_timesteps

MU, SIGMA = 0.3, 0.5


def gaussian_denoiser(schedule: NoiseSchedule):
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        a, s = signal_and_noise(schedule, t, x_t)
        variance = a**2 * SIGMA**2 + s**2
        eps = s * (x_t - a * MU) / variance
        return Prediction((x_t - s * eps) / a, eps)

    return denoise


def start(count: int = 60_000, seed: int = 0) -> Tensor:
    return torch.randn((count, 1, 1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finish(steps):
    *_, x0 = steps
    return x0


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {}), ("ddim", {"eta": 0.7}), ("ddim", {"eta": 1.0})],
    ids=str,
)
def test_full_chains_reach_the_datas_mean_and_variance(name: str, sampler: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    schedule = make_schedule(name, 1000)
    timesteps = sampling_timesteps("uniform", 1000, 1000)
    x0 = finish(SAMPLERS[sampler](gaussian_denoiser(schedule), schedule, start(), timesteps, **options))
    assert float(x0.mean()) == pytest.approx(MU, abs=0.012)
    assert float(x0.std()) == pytest.approx(SIGMA, rel=0.03)


def test_ddim_is_first_order() -> None:
    """Halving the step halves the error of the probability-flow solution, which is known for Gaussian data."""
    schedule = make_schedule("linear", 4096)
    alpha_bar = schedule.alphas_cumprod[-1]
    x_T = torch.tensor([1.5, -0.4], dtype=torch.float64).view(2, 1, 1, 1)
    standardised = (x_T - alpha_bar.sqrt() * MU) / (alpha_bar * SIGMA**2 + 1 - alpha_bar).sqrt()
    exact = MU + SIGMA * standardised  # the flow keeps each point's quantile
    errors = []
    for count in (32, 64, 128, 256):
        timesteps = sampling_timesteps("uniform", 4096, count)
        errors.append(float((finish(ddim(gaussian_denoiser(schedule), schedule, x_T, timesteps)) - exact).abs().max()))
    orders = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(errors)]
    assert all(0.8 < order < 1.3 for order in orders), (errors, orders)


@pytest.mark.parametrize("count", [7, 50])
def test_ddim_with_eta_one_is_ddpm_with_small_variance(count: int) -> None:
    schedule = make_schedule("cosine", 50)
    timesteps = sampling_timesteps("uniform", 50, count)
    chains = []
    for sampler, options in ((ddim, {"eta": 1.0}), (ddpm, {"variance": "fixed_small"})):
        source = torch.Generator().manual_seed(5)

        def noise(source: torch.Generator = source) -> Tensor:
            return torch.randn((100, 1, 1, 1), generator=source, dtype=torch.float64)

        chains.append(
            list(sampler(gaussian_denoiser(schedule), schedule, start(100), timesteps, noise=noise, **options))
        )
    for a, b in zip(*chains, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_ddpm_fixed_large_adds_beta() -> None:
    """From x0 = eps = 0 the first step leaves noise of variance beta_t (Ho et al. 2020, section 3.2)."""
    schedule = make_schedule("linear", 100)
    zero = torch.zeros(100_000, 1, 1, 1, dtype=torch.float64)
    for variance, expected in (
        ("fixed_large", schedule.betas[99]),
        ("fixed_small", schedule.betas[99] * (1 - schedule.alphas_cumprod[98]) / (1 - schedule.alphas_cumprod[99])),
    ):
        torch.manual_seed(0)
        chain = ddpm(
            lambda x, t: Prediction(zero, zero),
            schedule,
            zero,
            sampling_timesteps("uniform", 100, 100),
            variance=variance,
        )
        assert float(next(chain).var()) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_yields_each_step_and_ends_without_noise(name: str) -> None:
    schedule = make_schedule("cosine", 20)
    x0 = torch.rand(3, 3, 4, 4)

    def perfect(x_t: Tensor, t: Tensor) -> Prediction:
        a, s = signal_and_noise(schedule, t, x_t)
        return Prediction(x0, (x_t - a * x0) / s)

    chain = list(SAMPLERS[name](perfect, schedule, torch.randn(3, 3, 4, 4), sampling_timesteps("uniform", 20, 6)))
    assert len(chain) == 6
    torch.testing.assert_close(chain[-1], x0, rtol=0, atol=1e-6)


def test_the_config_chooses_sampler_and_options() -> None:
    schedule = make_schedule("cosine", 20)
    timesteps = sampling_timesteps("uniform", 20, 20)
    for overrides, sampler, options in (
        ({"sample.sampler": "ddim", "sample.eta": 0.5}, ddim, {"eta": 0.5}),
        ({"sample.sampler": "ddpm", "sample.variance": "fixed_large"}, ddpm, {"variance": "fixed_large"}),
    ):
        section = config.load(REPO / "params.yaml", overrides).sample
        torch.manual_seed(0)
        expected = finish(sampler(gaussian_denoiser(schedule), schedule, start(9), timesteps, **options))
        torch.manual_seed(0)
        assert finish(configured(section)(gaussian_denoiser(schedule), schedule, start(9), timesteps)).equal(expected)
