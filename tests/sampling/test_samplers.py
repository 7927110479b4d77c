"""Samplers against an exact denoiser: data N(mu, sigma2) per pixel have a closed-form E[x0 | x_t]."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.gaussian import MU, SIGMA, gaussian_denoiser
from helpers.project import REPO
from torch import Tensor

from diffusion import params_file
from diffusion.model.denoiser import Denoiser, Prediction
from diffusion.model.process import signal_and_noise
from diffusion.model.schedules import SCHEDULES, NoiseSchedule, make_schedule
from diffusion.sampling.samplers import SAMPLERS, configured, ddim, ddpm, evaluations
from diffusion.sampling.spacings import sampling_timesteps

MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.12, 0.0], [0.12, 0.2, -0.05], [0.0, -0.05, 0.1]], dtype=torch.float64)


def correlated_denoiser(schedule: NoiseSchedule):
    """E[x0 | x_t] = mu + a C (a^2 C + s^2)^-1 (x_t - a mu) of data N(mu, C) over channels, in C's eigenbasis."""
    variances, basis = torch.linalg.eigh(COVARIANCE)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        a, s = (float(value) for value in signal_and_noise(schedule, t[:1], x_t))
        z = (x_t.flatten(1) - a * MEAN) @ basis
        x0 = (MEAN + (a * variances / (a**2 * variances + s**2) * z) @ basis.T).view_as(x_t)
        return Prediction(x0, (x_t - a * x0) / s)

    return denoise


def start(count: int) -> Tensor:
    return torch.randn((count, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def finish(steps):
    *_, x0 = steps
    return x0


def moments(sampler: str, schedule: NoiseSchedule, timesteps: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Exact mean (3,) and covariance (3, 3) of a sampler's images of the correlated data.

    Images are affine in x_T and in each step's noise, for this denoiser is: the first row has none of them, every other
    row one unit in one channel of one of them.
    """
    units = torch.zeros(1 + len(timesteps), 1 + 3 * (1 + len(timesteps)), 3, 1, 1, dtype=torch.float64)
    for k, unit in enumerate(units):
        unit[1 + 3 * k : 4 + 3 * k, :, 0, 0] = torch.eye(3)
    source = iter(units)
    chain = SAMPLERS[sampler](
        correlated_denoiser(schedule), schedule, next(source), timesteps, noise=source.__next__, **options
    )
    x0 = finish(chain).flatten(1)
    responses = x0[1:] - x0[0]
    return x0[0], responses.T @ responses


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance": "fixed_large"}),
        ("ddim", {}),
        ("ddim", {"eta": 0.7}),
        ("ddim", {"eta": 1.0}),
        ("heun", {}),
        ("dpmpp_2m", {}),
        ("unipc", {}),
    ],
    ids=str,
)
def test_full_chains_reach_the_datas_mean_and_covariance(name: str, sampler: str, options: dict[str, object]) -> None:
    schedule = make_schedule(name, 250)
    mean, covariance = moments(sampler, schedule, sampling_timesteps("uniform", schedule, 250), **options)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.002)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.014 if sampler in ("ddpm", "ddim") else 0.0014)


@pytest.mark.parametrize("spacing", ["trailing", "logsnr", "karras"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("zero", [False, True])
def test_twenty_steps_of_second_order_reach_the_datas_mean_and_covariance(
    sampler: str, spacing: str, zero: bool
) -> None:
    schedule = make_schedule("cosine", 1000, zero_terminal_snr=zero)
    mean, covariance = moments(sampler, schedule, sampling_timesteps(spacing, schedule, 20))
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.022)  # ddim: 0.036 to 0.061


@pytest.mark.parametrize(
    ("sampler", "low", "high"), [("ddim", 0.9, 1.2), ("heun", 1.8, 2.3), ("dpmpp_2m", 1.8, 2.3), ("unipc", 1.8, 3.4)]
)
def test_order_of_convergence(sampler: str, low: float, high: float) -> None:
    """Halved steps divide the error by 2^order; the flow of Gaussian data is known: each point keeps its quantile.

    Steps are even in log(a / s) and the error is taken before the last step, which has order 1 in all solvers.
    """
    schedule = make_schedule("edm", 4097)
    alpha_bar = schedule.alphas_cumprod
    deviation = (alpha_bar * SIGMA**2 + 1 - alpha_bar).sqrt()
    z = torch.tensor([1.5, -0.4], dtype=torch.float64).view(2, 1, 1, 1)
    x_T = alpha_bar[-1].sqrt() * MU + deviation[-1] * z
    exact = alpha_bar[0].sqrt() * MU + deviation[0] * z
    errors = []
    for count in (65, 129, 257, 513):
        timesteps = sampling_timesteps("uniform", schedule, count)
        *_, x, _ = SAMPLERS[sampler](gaussian_denoiser(schedule), schedule, x_T, timesteps)
        errors.append(float((x - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low < order < high for order in orders), (errors, orders)


@pytest.mark.parametrize("count", [7, 50])
def test_ddim_with_eta_one_is_ddpm_with_small_variance(count: int) -> None:
    schedule = make_schedule("cosine", 50)
    timesteps = sampling_timesteps("uniform", schedule, count)
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
            sampling_timesteps("uniform", schedule, 100),
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

    chain = list(SAMPLERS[name](perfect, schedule, torch.randn(3, 3, 4, 4), sampling_timesteps("uniform", schedule, 6)))
    assert len(chain) == 6
    torch.testing.assert_close(chain[-1], x0, rtol=0, atol=1e-6)


def test_the_config_chooses_sampler_and_options() -> None:
    schedule = make_schedule("cosine", 20)
    timesteps = sampling_timesteps("uniform", schedule, 20)
    for overrides, sampler, options in (
        ({"sample.sampler": "ddim", "sample.eta": 0.5}, ddim, {"eta": 0.5}),
        ({"sample.sampler": "ddpm", "sample.variance": "fixed_large"}, ddpm, {"variance": "fixed_large"}),
    ):
        section = params_file.load(REPO / "params.yaml", overrides).sample
        torch.manual_seed(0)
        expected = finish(sampler(gaussian_denoiser(schedule), schedule, start(9), timesteps, **options))
        torch.manual_seed(0)
        assert finish(configured(section)(gaussian_denoiser(schedule), schedule, start(9), timesteps)).equal(expected)


@pytest.mark.parametrize(("schedule_name", "of_heun"), [("cosine", 16), ("edm", 17)])
def test_evaluations_are_what_a_sampler_spends(schedule_name: str, of_heun: int) -> None:
    """Cosine begins beyond sigma = 80, so that Heun's first step is a single one, and edm there."""
    schedule = make_schedule(schedule_name, 50)
    for name in SAMPLERS:
        section = params_file.load(REPO / "params.yaml", {"sample.sampler": name, "sample.steps": 9}).sample
        calls = []

        def counted(x_t: Tensor, t: Tensor, calls: list[Tensor] = calls) -> Prediction:
            calls.append(t)
            return gaussian_denoiser(schedule)(x_t, t)

        finish(configured(section)(counted, schedule, start(3), sampling_timesteps("trailing", schedule, 9)))
        assert len(calls) == evaluations(section, schedule) == (of_heun if name == "heun" else 9), name


# --- step by step against diffusers

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
STEPS = 10


class Wave(torch.nn.Module):
    """A network of no use that depends on all of its input."""

    image_shape, num_classes = (3, 4, 4), None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * torch.sin(1.7 * x + t.view(-1, 1, 1, 1) / 300) + 0.2 * x.flip(-1)


OURS = {"trailing": "trailing", "linspace": "uniform"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ddpm small": ("ddpm", {"variance": "fixed_small"}, "DDPMScheduler", {"variance_type": "fixed_small"}),
    "ddpm large": ("ddpm", {"variance": "fixed_large"}, "DDPMScheduler", {"variance_type": "fixed_large"}),
    "ddim": ("ddim", {"eta": 0.0}, "DDIMScheduler", {}),
    "ddim eta": ("ddim", {"eta": 0.6}, "DDIMScheduler", {}),
    "dpmpp_2m": ("dpmpp_2m", {}, "DPMSolverMultistepScheduler", {}),
    "unipc": ("unipc", {}, "UniPCMultistepScheduler", {}),
}


def pairs() -> Iterator[tuple[str, str, bool]]:
    """(key of SCHEDULERS, their spacing, clipping) of all that both have."""
    for key in SCHEDULERS:
        for spacing in OURS:
            if key.startswith("ddim") and spacing == "linspace":
                continue  # theirs goes to t - T // steps there, which is not the next of its own list
            if key == "ddpm large" and spacing == "trailing":
                continue  # theirs adds noise to the finished image there
            yield key, spacing, False
            if key.startswith("dd"):
                yield key, spacing, True  # the others do not clip


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("key", "spacing", "clip"), pairs())
def test_each_step_is_that_of_diffusers(key: str, spacing: str, clip: bool, prediction: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    name, options, theirs, their_options = SCHEDULERS[key]
    multistep = theirs in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    schedule = make_schedule("linear", 1000)
    clipping = {} if multistep else {"clip_sample": clip}
    scheduler = getattr(diffusers, theirs)(
        trained_betas=schedule.betas.tolist(),
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        **clipping,
        **their_options,
    )
    scheduler.set_timesteps(STEPS)
    if multistep and spacing == "linspace":
        timesteps = scheduler.timesteps  # their list leaves out 0, which ours has
    else:
        timesteps = sampling_timesteps(OURS[spacing], schedule, STEPS)
        assert timesteps.tolist() == scheduler.timesteps.tolist()
    net = Wave()
    denoiser = Denoiser(net, schedule, prediction, clip_x0=clip)
    x = x_T = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    ours_source, their_source = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)

    def noise() -> Tensor:
        return torch.randn(x_T.shape, generator=ours_source)

    chain = SAMPLERS[name](denoiser, schedule, x_T, timesteps, noise=noise, **options)
    extra = {"generator": their_source} if theirs in ("DDPMScheduler", "DDIMScheduler") else {}
    if theirs == "DDIMScheduler":
        extra["eta"] = options["eta"]
        extra["use_clipped_model_output"] = True
    for t, mine in zip(scheduler.timesteps, chain, strict=True):
        x = scheduler.step(net(x, t.expand(2)), t, x, **extra).prev_sample
        scale = max(1.0, float(x.abs().max()))  # eps with little signal makes large values
        torch.testing.assert_close(mine / scale, x / scale, rtol=0, atol=1e-4)
