"""Pictures during training: EMA samples from the same noise every time, and a strip of the denoising."""

from pathlib import Path

import torch

from diffusion import images, sampling
from diffusion.config import SampleConfig, TrainConfig
from diffusion.training import Trainer

STRIP_IMAGES = 6
STRIP_COLUMNS = 9


def preview_config(config: TrainConfig, images: int | None = None, batch_size: int | None = None) -> SampleConfig:
    """How previews are sampled: few deterministic steps, sized by the train section, but for what is given."""
    return SampleConfig(
        sampler="ddim",
        steps=config.preview_steps,
        spacing="trailing",
        eta=0.0,
        variance="fixed_small",
        clip_x0=True,
        guidance=1.0,
        labels="balanced",
        num_images=images or config.preview_images,
        batch_size=batch_size or config.preview_images,
        compile="off",
        save_png=False,
        processes=1,
        device=config.device,
        precision=config.precision,
    )


def write_previews(trainer: Trainer, folder: Path) -> list[Path]:
    """Write step_<step>.png (a grid) and step_<step>_denoising.png (a strip) into `folder`."""
    train, seed, config = trainer.config.train, trainer.config.seed, preview_config(trainer.config.train)
    at_once = 2 * train.micro_batch if train.micro_batch else config.num_images  # as validation, which fits
    parts = [
        sampling.stages(trainer.denoiser(), config, seed, some, trainer.device, STRIP_COLUMNS)
        for some in sampling.cut(range(config.num_images), at_once)
    ]
    frames = torch.cat(parts, dim=1).numpy()
    name = f"step_{trainer.progress.step:06d}"
    grid, strip = folder / f"{name}.png", folder / f"{name}_denoising.png"
    images.save_png(images.grid(frames[-1], columns=8, scale=images.zoom(frames)), grid)
    images.save_png(images.strip(frames[:, :STRIP_IMAGES], scale=images.zoom(frames)), strip)
    return [grid, strip]
