"""Images for pictures: stages of the denoising, rows by class, columns by guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.config import SampleConfig
from diffusion.data.pixels import to_uint8
from diffusion.model.denoiser import Denoiser
from diffusion.sampling.generation import generate, trajectory

GUIDANCES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)


def stages(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: Sequence[int], device: torch.device, columns: int
) -> Tensor:
    """uint8 (columns, B, H, W, C): evenly spaced moments of the denoising, from x_T to the image."""
    picked = torch.linspace(0, config.steps, min(columns, config.steps + 1)).round().long().tolist()
    frames = enumerate(trajectory(denoiser, config, seed, indices, device))
    return torch.stack([to_uint8(x) for step, x in frames if step in picked]).cpu()


def by_class(images: Tensor, labels: Tensor, columns: int) -> Tensor:
    """uint8 (classes * columns, H, W, C): the first `columns` images of each class that has so many, class by class."""
    rows = [images[labels == label][:columns] for label in labels.unique().tolist()]
    return torch.cat([row for row in rows if len(row) == columns] or [images[:0]])


def guidance_sweep(denoiser: Denoiser, config: SampleConfig, seed: int, indices: range, device: torch.device) -> Tensor:
    """uint8 (len(GUIDANCES), B, H, W, C): the images `indices` with each guidance, from the same noise."""
    guided = [config.model_copy(update={"guidance": g, "compile": "off"}) for g in GUIDANCES]
    return torch.stack([torch.cat([*generate(denoiser, one, seed, indices, device)]) for one in guided])
