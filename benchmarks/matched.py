"""The networks that are compared on CPUs: the same arithmetic at 32x32, attention at 8x8, nobody's patch stem.

Ours has the topology and the parameters of diffusers' (2.74M, 0.764 GFLOP a forward pass and image), normalised in
groups of 16 channels or more; denoising-diffusion-pytorch has another topology, so it is matched in GFLOP.
"""

import torch

from diffusion.config import ModelConfig, Params
from diffusion.data.dataset import Dataset, real_images
from diffusion.params_file import load
from diffusion.paths import TRAIN_IMAGES

LUCIDRAINS = (32, (1, 2, 3))  # dim, dim_mults
RECIPE = "params/paper.yaml"


def params(batch_size: int) -> Params:
    """The paper's recipe with the matched network; AdamW, as diffusers' example has."""
    return load(
        RECIPE,
        {
            "model.channels": 32,
            "model.multipliers": [1, 2, 4],
            "model.num_blocks": 1,
            "model.attention_resolutions": [8],
            "model.head_channels": None,
            "model.norm_groups": 2,
            "model.dropout": 0.0,
            "train.batch_size": batch_size,
            "train.optimizer": "adamw",
            "train.precision": "auto",
            "sample.batch_size": batch_size,
        },
    )


def diffusers_model(batch_size: int) -> ModelConfig:
    """The same for diffusers, with its own defaults of 32 groups and 8 channels a head."""
    return params(batch_size).model.model_copy(update={"norm_groups": 32, "head_channels": 8})


def data(count: int = 10_000) -> Dataset:
    """CIFAR-10 if it is there, otherwise noise: neither changes what a step costs."""
    if TRAIN_IMAGES.exists():
        images = torch.from_numpy(real_images("train")[:count])
    else:
        images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    return Dataset(
        images, torch.arange(256, count), torch.arange(256), "benchmark", torch.zeros(count, dtype=torch.long)
    )
