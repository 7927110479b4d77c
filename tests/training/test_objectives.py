"""Each objective, trained to memorise 16 images, draws those images from noise; classes are drawn as asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.config import Params, trained
from diffusion.data.dataset import Dataset
from diffusion.data.pixels import to_tensor
from diffusion.model.denoiser import Denoiser
from diffusion.sampling import generation
from diffusion.training.loop import Trainer, train

CPU = torch.device("cpu")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "eps": {"diffusion.prediction": "eps"},
    "x0": {"diffusion.prediction": "x0", "train.loss_weight": "own"},
    "v": {"diffusion.prediction": "v"},
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
SMALL = {
    "model.image_size": 16,
    "model.channels": 32,
    "model.attention_resolutions": [4],
    "diffusion.num_steps": 1000,
    "train.steps": 700,
    "train.batch_size": 32,
    "train.lr": 3e-3,
    "train.flip": False,
    "train.validate_every": 700,
    "train.checkpoint_every": 700,
    "sample.sampler": "ddim",
    "sample.steps": 40,
    "sample.spacing": "trailing",
    "sample.num_images": 32,
    "sample.batch_size": 32,
}


def sixteen() -> Dataset:
    """Sixteen images of 4x4 random colours, for training and for validation."""
    coarse = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)
    images = torch.from_numpy(coarse.repeat(4, axis=1).repeat(4, axis=2))
    return Dataset(images, torch.arange(16), torch.arange(16), "sixteen", torch.arange(16) % 4)


def fitted(params: Params, data: Dataset, folder: Path) -> Denoiser:
    """The last average of a training."""
    trainer = Trainer(trained(params), data, folder, CPU)
    for _ in train(trainer):
        pass
    net = trainer.ema.net.eval()
    return Denoiser(net, trainer.schedule, params.diffusion.prediction, clip_x0=True)


def nearest(drawn: torch.Tensor, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """(root mean square distance, index) of the nearest of the sixteen to each image drawn, uint8 (N, H, W, C)."""
    distances = torch.cdist(to_tensor(drawn).flatten(1), to_tensor(data.images).flatten(1)) / (3 * 16 * 16) ** 0.5
    found = distances.min(dim=1)
    return found.values, found.indices


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sixteen_images_are_memorised(objective: str, tiny, tmp_path: Path) -> None:
    """Two of the sixteen are about 0.8 apart: a quarter of that is no other image."""
    data, params = sixteen(), tiny(**{**SMALL, **OBJECTIVES[objective]})
    denoiser = fitted(params, data, tmp_path)
    drawn = torch.cat([*generation.generate(denoiser, params.sample, 0, range(32), CPU)])
    distance, which = nearest(drawn, data)
    assert float(distance.median()) < 0.2, distance
    assert len(which.unique()) >= 10


@pytest.mark.slow
def test_a_conditional_network_draws_the_class_that_is_asked_for(tiny, tmp_path: Path) -> None:
    """Class c has the images c, c + 4, c + 8, c + 12; chance is a quarter."""
    data = sixteen()
    params = tiny(**{**SMALL, "model.num_classes": 4, "train.label_dropout": 0.2, "sample.guidance": 1.5})
    denoiser = fitted(params, data, tmp_path)
    drawn = torch.cat([*generation.generate(denoiser, params.sample, 0, range(32), CPU)])
    _, which = nearest(drawn, data)
    labels = generation.labels_of(params.sample, 4, range(32))
    accuracy = float((which % 4 == labels).float().mean())
    assert accuracy > 0.9, accuracy
