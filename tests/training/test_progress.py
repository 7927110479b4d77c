import math

import pytest
import torch

from diffusion.training.progress import Record, smoothed


def test_the_smoothed_loss_is_an_average_with_warm_up() -> None:
    """After n rows the next counts 1 - min(0.9, (1 + n) / (10 + n)); what is not finite yet, is left out."""
    assert smoothed([], 3.0) == 3.0
    assert smoothed([{"loss_smoothed": 3.0}], 14.0) == pytest.approx(3.0 * 2 / 11 + 14.0 * 9 / 11)
    assert smoothed([{"loss_smoothed": 0.0}, {"loss_smoothed": 2.0}], 4.0) == pytest.approx(2.0 * 3 / 12 + 4.0 * 9 / 12)
    assert smoothed([{"loss_smoothed": 2.0}] * 1000, 4.0) == pytest.approx(2.0 * 0.9 + 4.0 * 0.1)
    assert smoothed([{"loss_smoothed": 2.0}], math.nan) == 2.0
    assert smoothed([{"loss_smoothed": math.nan}], 4.0) == 4.0
    assert math.isnan(smoothed([{"loss_smoothed": math.nan}], math.nan))


def test_a_records_loss_is_a_number() -> None:
    assert Record(1, torch.tensor(0.5)).loss == 0.5
