import numpy as np
import pytest
import torch

from diffusion.model.process import posterior_mean_variance, q_posterior_mean_variance, q_sample
from diffusion.model.schedules import SCHEDULES, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_has_the_closed_forms_moments(name: str) -> None:
    schedule = make_schedule(name, 100)
    x0 = torch.full((200_000, 1, 1, 1), 0.6, dtype=torch.float64)
    for step in (0, 40, 99):
        eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x_t = q_sample(schedule, x0, torch.full((len(x0),), step), eps)
        alpha_bar = float(schedule.alphas_cumprod[step])
        assert float(x_t.mean()) == pytest.approx(alpha_bar**0.5 * 0.6, abs=5 / len(x0) ** 0.5)
        assert float(x_t.var()) == pytest.approx(1 - alpha_bar, rel=0.02)


def test_q_sample_equals_adding_the_noise_step_by_step() -> None:
    """The composition of T Gaussian steps (Ho et al. 2020, eq. 2) has eq. 4's mean and variance."""
    schedule = make_schedule("linear", 50)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        assert float(q_sample(schedule, one, torch.tensor([t]), zero)) == pytest.approx(mean, rel=1e-12)
        assert float(q_sample(schedule, zero, torch.tensor([t]), one)) == pytest.approx(variance**0.5, rel=1e-12)


def test_each_image_has_its_own_step() -> None:
    schedule = make_schedule("cosine", 10)
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    both = q_sample(schedule, x0, torch.tensor([2, 7]), eps)
    for i, t in enumerate((2, 7)):
        torch.testing.assert_close(
            both[i : i + 1], q_sample(schedule, x0[i : i + 1], torch.tensor([t]), eps[i : i + 1])
        )


def brute_force_posterior(schedule, x0: float, x_t: float, t: int, s: int) -> tuple[float, float]:
    """Bayes on a grid: q(x_s | x_t, x0) ~ q(x_t | x_s) q(x_s | x0)."""
    ab_t = float(schedule.alphas_cumprod[t])
    ab_s = float(schedule.alphas_cumprod[s])
    x_s = np.linspace(-8, 8, 400_001)
    alpha = ab_t / ab_s
    log = -((x_t - alpha**0.5 * x_s) ** 2) / (2 * (1 - alpha)) - (x_s - ab_s**0.5 * x0) ** 2 / (2 * (1 - ab_s))
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = (weight * x_s).sum()
    return mean, (weight * (x_s - mean) ** 2).sum()


@pytest.mark.parametrize(("t", "s"), [(1, 0), (30, 29), (99, 98), (60, 20), (99, 0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes(name: str, t: int, s: int) -> None:
    schedule = make_schedule(name, 100)
    x0, x_t = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.full((1, 1, 1, 1), -1.3, dtype=torch.float64)
    mean, variance = posterior_mean_variance(schedule, x0, x_t, torch.tensor([t]), torch.tensor([s]))
    expected_mean, expected_variance = brute_force_posterior(schedule, 0.7, -1.3, t, s)
    assert float(mean) == pytest.approx(expected_mean, abs=1e-6)
    assert float(variance) == pytest.approx(expected_variance, rel=1e-4)
    if s == t - 1:
        assert float(q_posterior_mean_variance(schedule, x0, x_t, torch.tensor([t]))[0]) == float(mean)


def test_the_posterior_of_the_first_step_is_the_image() -> None:
    schedule = make_schedule("linear", 10)
    x0, x_t = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    mean, variance = q_posterior_mean_variance(schedule, x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x0)
    assert float(variance) == 0.0
