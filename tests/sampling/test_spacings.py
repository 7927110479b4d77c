"""Which steps are visited: by hand, as in diffusers, as in the papers."""

import numpy as np
import pytest
import torch

from diffusion.model.schedules import SCHEDULES, make_schedule
from diffusion.sampling.spacings import sampling_timesteps

SPACINGS = ["uniform", "quadratic", "trailing", "logsnr", "karras"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_timesteps_descend_without_repeats(name: str, zero: bool, spacing: str, num_steps: int) -> None:
    schedule = make_schedule(name, num_steps, zero_terminal_snr=zero)
    for count in {1, 2, num_steps // 3 or 1, num_steps} & set(range(1, num_steps + 1)):
        steps = sampling_timesteps(spacing, schedule, count)
        assert len(steps) == count
        sigma = torch.exp(-schedule.log_ratio())
        if count > 1 and (spacing in ("uniform", "quadratic", "trailing") or sigma[-1] <= 80):
            assert int(steps[0]) == num_steps - 1
        assert sigma[steps[0]] >= min(float(sigma.max()), 80 * (1 - 1e-9))
        assert (steps.diff() < 0).all()
        assert steps.min() >= 0
    assert sampling_timesteps(spacing, schedule, num_steps).tolist() == list(range(num_steps))[::-1]


def test_spacings_are_what_they_say() -> None:
    thousand = make_schedule("linear", 1000)
    assert sampling_timesteps("uniform", thousand, 4).tolist() == [999, 666, 333, 0]
    assert sampling_timesteps("trailing", thousand, 4).tolist() == [999, 749, 499, 249]
    assert sampling_timesteps("quadratic", make_schedule("linear", 901), 4).tolist() == [900, 400, 100, 0]
    assert sampling_timesteps("logsnr", make_schedule("edm", 1000), 4).tolist() == [
        999,
        666,
        333,
        0,
    ]  # it is even there


@pytest.mark.parametrize("count", [7, 16, 48, 80, 160])
def test_trailing_spacing_is_that_of_diffusers(count: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    ours = sampling_timesteps("trailing", make_schedule("linear", 1000), count)
    assert ours.tolist() == scheduler.timesteps.tolist()


def test_karras_spacing_is_the_papers() -> None:
    """Karras et al. 2022, eq. 5 with rho = 7, to the nearest of 100,000 steps."""
    schedule = make_schedule("edm", 100_000)
    sigma = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    i = np.arange(18) / 17
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[sampling_timesteps("karras", schedule, 18)], expected, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 11])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="sampling steps"):
        sampling_timesteps("uniform", make_schedule("linear", 10), count)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="trailing"):
        sampling_timesteps("even", make_schedule("linear", 10), 5)
