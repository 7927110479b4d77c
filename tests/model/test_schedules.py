import math

import numpy as np
import pytest
import torch

from diffusion.model.schedules import SCHEDULES, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 10, 1000, 4000])
def test_tables_are_float64_and_consistent(name: str, num_steps: int) -> None:
    schedule = make_schedule(name, num_steps)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert len(schedule.betas) == len(schedule.alphas_cumprod) == num_steps
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - schedule.betas.numpy()), rtol=1e-12)
    assert (schedule.alphas_cumprod.diff() < 0).all()
    signal, noise = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    np.testing.assert_allclose(schedule.log_ratio(), (signal / noise).log(), atol=1e-9)


def test_linear_is_the_papers() -> None:
    betas = make_schedule("linear", 1000).betas
    assert (float(betas[0]), float(betas[-1])) == (1e-4, 0.02)
    np.testing.assert_allclose(betas.diff(), (0.02 - 1e-4) / 999, rtol=1e-9)
    # KL(q(x_T | x0) || N(0, I)) is about 1e-5 bits a dimension (Ho et al. 2020, section 4): alpha-bar_T is 4.04e-5
    assert float(make_schedule("linear", 1000).alphas_cumprod[-1]) == pytest.approx(4.036e-5, rel=1e-3)


def test_cosine_is_its_closed_form() -> None:
    """Nichol & Dhariwal 2021, eq. 17, where the cap on beta does not act."""
    alphas_cumprod = make_schedule("cosine", 1000).alphas_cumprod
    for t in (0, 1, 250, 500, 900):
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0, t + 1)]
        assert float(alphas_cumprod[t]) == pytest.approx(f[1] / f[0], rel=1e-9)
    assert float(make_schedule("cosine", 1000).betas[-1]) == 0.999


def test_sigmoid_is_its_closed_form() -> None:
    """Jabri et al. 2022: (sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) - sigmoid(-3)); tanh form as a second opinion."""
    alphas_cumprod = make_schedule("sigmoid", 1000).alphas_cumprod
    for t in (0, 250, 499, 900):
        u = (t + 1) / 1000
        expected = (math.tanh(1.5) - math.tanh(3 * u - 1.5)) / (2 * math.tanh(1.5))
        assert float(alphas_cumprod[t]) == pytest.approx(expected, rel=1e-9)


def test_alpha_bar_before_the_first_step_is_one() -> None:
    schedule = make_schedule("linear", 10)
    t = torch.tensor([-1, 0, 9])
    assert schedule.alpha_bar(t).tolist() == [1.0, float(schedule.alphas_cumprod[0]), float(schedule.alphas_cumprod[9])]


def test_edm_is_even_in_the_logarithm_of_sigma() -> None:
    """Karras et al. 2022, table 1: sigma from 0.002 to 80; x_t = (x0 + sigma eps) / sqrt(1 + sigma^2)."""
    alphas_cumprod = make_schedule("edm", 1000).alphas_cumprod
    sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    np.testing.assert_allclose(sigma[[0, -1]], [0.002, 80.0], rtol=1e-7)
    np.testing.assert_allclose(sigma.log().diff(), math.log(80 / 0.002) / 999, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_shifts_and_scales_the_signal(name: str) -> None:
    """Lin et al. 2023, section 3.1: sqrt(alpha-bar) ends at 0, begins as it did, a linear map of what it was."""
    plain = make_schedule(name, 1000).alphas_cumprod.sqrt()
    zero = make_schedule(name, 1000, zero_terminal_snr=True).alphas_cumprod.sqrt()
    assert float(zero[-1]) == 0.0
    assert float(zero[0]) == pytest.approx(float(plain[0]), rel=1e-12)
    np.testing.assert_allclose(np.polyval(np.polyfit(plain, zero, 1), plain), zero, atol=1e-9)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="linear, cosine, sigmoid"):
        make_schedule("cosin", 10)
