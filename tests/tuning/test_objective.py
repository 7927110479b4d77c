"""What trials are scored by, against denoisers whose error is known."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import config
from diffusion.data.dataset import Dataset
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import make_reference
from diffusion.metrics.scores import evaluate
from diffusion.model.denoiser import Denoiser
from diffusion.model.model_file import load_model, save_model
from diffusion.model.parameterization import PARAMETERIZATIONS, SIGMA_DATA
from diffusion.model.process import signal_and_noise
from diffusion.model.schedules import NoiseSchedule, make_schedule
from diffusion.runtime import resolve_device
from diffusion.sampling.generation import generate
from diffusion.training import loop
from diffusion.training.loop import Trainer
from diffusion.training.loss import Loss
from diffusion.training.scoring import preview_config
from diffusion.tuning.objective import common_error, samples, score

SCHEDULES = ("linear", "cosine", "sigmoid", "edm")


class Knows:
    """A network that denoises x_t to what `x0_of(x_t, sigma)` says, in the units of any prediction."""

    def __init__(self, schedule: NoiseSchedule, prediction: str, x0_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.schedule, self.prediction, self.x0_of = schedule, prediction, x0_of

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a, s = signal_and_noise(self.schedule, t, x)
        if self.prediction == "edm":  # which sees x_t at unit variance
            x = x * (s**2 + (a * SIGMA_DATA) ** 2).sqrt()
        x0 = self.x0_of(x / a, s / a)
        return PARAMETERIZATIONS[self.prediction].target(x0, (x - a * x0) / s, a, s)


def trainer(schedule: NoiseSchedule, prediction: str, x0_of: Callable[[Tensor, Tensor], Tensor], val: Tensor) -> Any:
    loss = Loss(schedule, prediction, "simple", torch.float32)
    net = Knows(schedule, prediction, x0_of)
    return SimpleNamespace(
        schedule=schedule, loss=loss, val=val, val_given={}, dtype=torch.float32, ema=SimpleNamespace(net=net)
    )


def gaussian(y: Tensor, sigma: Tensor) -> Tensor:
    """Posterior mean of x0 ~ N(0, SIGMA_DATA^2) from y = x0 + sigma eps: Karras et al. 2022, c_skip."""
    return y * SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_equal_denoisers_have_equal_errors_whatever_schedule_and_prediction(prediction: str) -> None:
    """The best denoiser of Gaussian images has 1: its variance times EDM's weight. Validation losses differ."""
    val = torch.randn((600, 3, 8, 8), generator=torch.Generator().manual_seed(0)) * SIGMA_DATA
    errors, losses = [], []
    for name in SCHEDULES:
        one = trainer(make_schedule(name, 4000), prediction, gaussian, val)
        errors.append(common_error(one))
        losses.append(one.loss.validation(one.ema.net, val, 0, 200))
    assert errors == pytest.approx([1.0] * 4, abs=0.03)
    assert max(errors) - min(errors) < 0.005
    if prediction != "edm":
        assert max(losses) / min(losses) > 1.15


def test_a_better_denoiser_has_a_smaller_error_and_a_perfect_one_none() -> None:
    """All images are the same picture: who knows it makes no mistake, whoever errs by a factor f is off by f^2."""
    picture = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
    val, schedule = picture.expand(64, -1, -1, -1), make_schedule("cosine", 1000)

    def error(factor: float) -> float:
        return common_error(trainer(schedule, "x0", lambda y, sigma: picture + 0.0 * y + factor, val))

    assert error(0.0) == pytest.approx(0.0, abs=1e-9)
    assert error(0.2) == pytest.approx(4 * error(0.1), rel=1e-3)


def test_the_error_draws_from_edms_distribution() -> None:
    """A denoiser that is wrong by exactly 1 has the mean of 1/sigma^2 + 1/sigma_data^2, ln sigma ~ N(-1.2, 1.2^2)."""
    val, schedule = torch.zeros((512, 1, 4, 4)), make_schedule("edm", 4000)
    found = common_error(trainer(schedule, "x0", lambda y, sigma: torch.ones_like(y), val))
    quantiles = torch.distributions.Normal(-1.2, 1.2).icdf((torch.arange(512, dtype=torch.float64) + 0.5) / 512)
    assert found == pytest.approx(float((torch.exp(-2 * quantiles) + 4).mean()), rel=1e-6)


@pytest.mark.slow
def test_the_score_is_what_the_stages_would_give(
    tmp_path: Path, tiny: Callable[..., config.Params], tiny_data: Dataset
) -> None:
    params, device = (
        tiny(**{"tune.sample_images": 4, "tracking.enabled": False, "evaluate.measures": ["frechet"]}),
        resolve_device("cpu"),
    )
    extractor = EfficientNetLite0()
    reference = make_reference(tiny_data.images[:20].numpy(), "train", extractor, 10, device)
    trained = Trainer(config.trained(params), tiny_data, tmp_path / "run", device)
    for _ in loop.train(trained):
        pass
    save_model(tmp_path / "model.safetensors", trained.best, trained.config, {})
    for parameter in trained.ema.net.parameters():
        parameter.data.mul_(0.5)  # as if training had gone on and become worse
    value = score(samples(trained, params), params, reference, extractor, device)

    net, card = load_model(tmp_path / "model.safetensors")  # the way of the sample and evaluate stages
    schedule = make_schedule(card.diffusion.schedule, card.diffusion.num_steps)
    denoiser = Denoiser(net, schedule, card.diffusion.prediction, dtype=trained.dtype, clip_x0=True)
    images = [batch.numpy() for batch in generate(denoiser, preview_config(card.train), card.seed, range(4), device)]
    np.savez(tmp_path / "images.npz", images=np.concatenate(images))
    reference.save(tmp_path / "fd_lite0.npz")
    assert value == pytest.approx(evaluate(params, tmp_path / "images.npz", {}, tmp_path)["fd_lite0_4"], rel=1e-6)
