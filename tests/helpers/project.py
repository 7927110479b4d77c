"""Where the repository is, how every recipe is shrunk, and the images that it is run on."""

from pathlib import Path

import numpy as np

REPO = Path(__file__).parents[2]


# Every recipe, shrunk: the same code paths in seconds.
TINY = {
    "model.channels": 16,
    "model.multipliers": [1, 2],
    "model.num_blocks": 1,
    "model.attention_resolutions": [16],  # of the last level, or with a patch stem the first
    "model.head_channels": 16,
    "model.norm_groups": 4,
    "diffusion.num_steps": 50,
    "train.steps": 8,
    "train.batch_size": 4,
    "train.warmup_steps": 2,
    "train.log_every": 2,
    "train.validate_every": 4,
    "train.preview_every": 4,
    "train.preview_images": 4,
    "train.preview_steps": 3,
    "train.checkpoint_every": 3,
    "train.device": "cpu",
    "train.precision": "fp32",
    "sample.steps": 4,
    "sample.num_images": 12,
    "sample.batch_size": 5,
    "sample.device": "cpu",
    "sample.precision": "fp32",
    "evaluate.reference_images": 20,
    "evaluate.inception": "off",
    "evaluate.batch_size": 10,
    "evaluate.device": "cpu",
    "data.val_images": 20,
}


def write_images(folder: Path) -> None:
    """What the download stage leaves in `folder`: 60 images for training, 30 for testing."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 60), ("test", 30)):
        coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        images, labels = coarse.repeat(8, 1).repeat(8, 2), np.arange(count, dtype=np.uint8) % 10
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
