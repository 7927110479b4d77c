"""Each objective end to end: the least loss is what samplers expect, a trained network draws its images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gaussian import MU, SIGMA, gaussian_denoiser
from torch import Tensor, nn

from diffusion.config import Params, trained
from diffusion.data.dataset import Dataset
from diffusion.data.pixels import to_tensor
from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import configured_schedule
from diffusion.sampling import generation
from diffusion.training.loop import Trainer, train
from diffusion.training.loss import Loss

CPU = torch.device("cpu")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "eps": {"diffusion.prediction": "eps"},
    "x0": {"diffusion.prediction": "x0", "train.loss_weight": "own"},
    "v": {"diffusion.prediction": "v", "train.loss_weight": "simple"},
    "v, min-SNR": {"diffusion.prediction": "v", "train.loss_weight": "min_snr"},
    "v, zero terminal SNR": {
        "diffusion.prediction": "v",
        "diffusion.zero_terminal_snr": True,
        "train.loss_weight": "simple",
    },
    "edm": {
        "diffusion.prediction": "edm",
        "diffusion.schedule": "edm",
        "train.timesteps": "lognormal",
        "train.loss_weight": "own",
        "sample.sampler": "heun",
        "sample.spacing": "karras",
    },
}


class Affine(nn.Module):
    """scale[t] x + shift[t]: holds every objective's best network for Gaussian pixels, whose E[x0 | x_t] is affine."""

    image_shape, num_classes = (1, 1, 1), None

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.scale_and_shift = nn.Parameter(torch.zeros(2, num_steps, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift[:, t].view(2, -1, 1, 1, 1)
        return scale * x + shift


def minimise(net: Affine, loss: Loss, x0: Tensor, t: Tensor, eps: Tensor) -> None:
    """The loss is a quadratic form of two numbers for each t: three of its gradients tell where it is least."""

    def gradient(scale: float, shift: float) -> Tensor:
        with torch.no_grad():
            net.scale_and_shift.copy_(torch.tensor([[scale], [shift]]).expand_as(net.scale_and_shift))
        net.zero_grad()
        loss.training(net, x0, t, eps).backward()
        return net.scale_and_shift.grad.clone()

    origin = gradient(0, 0)
    curvature = torch.stack([gradient(1, 0) - origin, gradient(0, 1) - origin], dim=1).permute(2, 0, 1)  # (t, 2, 2)
    with torch.no_grad():
        net.scale_and_shift.copy_(torch.linalg.solve(curvature, -origin.T).T)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_least_loss_is_the_exact_denoiser(objective: str, tiny) -> None:
    """At every t, for pixels of N(mu, sigma2): target, weight, network input, inversion and schedule fit each other."""
    params = tiny(**{"diffusion.num_steps": 1000, **OBJECTIVES[objective]})
    schedule, prediction = configured_schedule(params.diffusion), params.diffusion.prediction
    net = Affine(1000)
    signs = torch.tensor([(i, j) for i in (-1.0, 1.0) for j in (-1.0, 1.0)], dtype=torch.float64)
    z = signs.repeat(1000, 1).T.reshape(2, -1, 1, 1, 1)  # has a normal variable's moments up to the third
    t = torch.arange(1000).repeat_interleave(4)
    loss = Loss(schedule, prediction, params.train.loss_weight, torch.float32, params.train.timesteps)
    minimise(net, loss, MU + SIGMA * z[0], t, z[1])
    found = Denoiser(net, schedule, prediction)(x := 0.9 * z[0] + z[1], t)
    expected = gaussian_denoiser(schedule)(x, t)
    torch.testing.assert_close(found.x0.double(), expected.x0, rtol=0, atol=2e-4)
    noisy = schedule.alphas_cumprod[t] < 0.99  # with less noise eps is the difference of two nearly equal images
    torch.testing.assert_close(found.eps[noisy], expected.eps[noisy], rtol=0, atol=2e-3)


SMALL = {
    "model.image_size": 4,
    "model.channels": 32,
    "model.multipliers": [1],
    "model.attention_resolutions": [],
    "diffusion.num_steps": 1000,
    "train.batch_size": 32,
    "train.lr": 5e-3,
    "train.flip": False,
    "train.validate_every": 700,
    "train.checkpoint_every": 700,
    "sample.sampler": "ddim",
    "sample.steps": 20,
    "sample.spacing": "trailing",
    "sample.num_images": 32,
    "sample.batch_size": 32,
}


def few(count: int) -> Dataset:
    """`count` images of 4x4 random colours, each of a class of its own, for training and for validation."""
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return Dataset(torch.from_numpy(images), torch.arange(count), torch.arange(count), "few", torch.arange(count))


def drawn(params: Params, data: Dataset, folder: Path) -> tuple[Tensor, Tensor]:
    """32 images of a training's last average: (root mean square distance to, index of) the nearest of `data`'s."""
    trainer = Trainer(trained(params), data, folder, CPU)
    for _ in train(trainer):
        pass
    denoiser = Denoiser(trainer.ema.net.eval(), trainer.schedule, params.diffusion.prediction, clip_x0=True)
    images = torch.cat([*generation.generate(denoiser, params.sample, 0, range(32), CPU)])
    distances = torch.cdist(to_tensor(images).flatten(1), to_tensor(data.images).flatten(1)) / (3 * 4 * 4) ** 0.5
    found = distances.min(dim=1)
    return found.values, found.indices


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["v, zero terminal SNR", "edm"])
def test_images_are_memorised(objective: str, tiny, tmp_path: Path) -> None:
    """The two are 0.85 apart: a quarter of that is neither the other nor their mean."""
    distance, which = drawn(tiny(**{**SMALL, "train.steps": 500, **OBJECTIVES[objective]}), few(2), tmp_path)
    assert float(distance.median()) < 0.2, distance
    assert len(which.unique()) == 2


def test_a_conditional_network_draws_the_class_that_is_asked_for(tiny, tmp_path: Path) -> None:
    """Class c is image c of four; chance is a quarter."""
    classes = {"model.num_classes": 4, "train.label_dropout": 0.2, "sample.guidance": 1.5}
    params = tiny(**{**SMALL, **OBJECTIVES["x0"], "train.steps": 100, **classes})
    distance, which = drawn(params, few(4), tmp_path)
    assert float(distance.median()) < 0.2, distance
    assert which.equal(generation.labels_of(params.sample, 4, range(32)))
