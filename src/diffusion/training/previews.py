"""Pictures during training: EMA samples from the same noise every time, and a strip of the denoising."""

from pathlib import Path

import torch

from diffusion.data import grids
from diffusion.sampling import generation, panels
from diffusion.training.loop import Trainer
from diffusion.training.scoring import preview_config

STRIP_IMAGES = 6
STRIP_COLUMNS = 9


def write_previews(trainer: Trainer, folder: Path) -> list[Path]:
    """Write step_<step>.png (a grid) and step_<step>_denoising.png (a strip) into `folder`."""
    train, seed, config = trainer.config.train, trainer.config.seed, preview_config(trainer.config.train)
    at_once = 2 * train.micro_batch if train.micro_batch else config.num_images  # as validation, which fits
    parts = [
        panels.stages(trainer.denoiser(), config, seed, some, trainer.device, STRIP_COLUMNS)
        for some in generation.cut(range(config.num_images), at_once)
    ]
    frames = torch.cat(parts, dim=1).numpy()
    name = f"step_{trainer.progress.step:06d}"
    grid, strip = folder / f"{name}.png", folder / f"{name}_denoising.png"
    grids.save_png(grids.grid(frames[-1], columns=8, scale=grids.zoom(frames)), grid)
    grids.save_png(grids.strip(frames[:, :STRIP_IMAGES], scale=grids.zoom(frames)), strip)
    return [grid, strip]
