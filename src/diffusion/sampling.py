"""Images from noise: image i has random numbers of its own, whatever the batch it is made in."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffusion.config import SampleConfig
from diffusion.data import to_uint8
from diffusion.parameterization import Denoiser
from diffusion.runtime import generator
from diffusion.samplers import configured
from diffusion.schedules import sampling_timesteps
from diffusion.unet import IMAGE_CHANNELS, IMAGE_SIZE

SHAPE = (IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)


def trajectory(
    denoiser: Denoiser,
    config: SampleConfig,
    seed: int,
    indices: Sequence[int],
    device: torch.device,
) -> Iterator[Tensor]:
    """X after each step for the images `indices`, (B, C, H, W) float32; the start x_T comes first, x0 last."""
    sources = [generator(seed, "sample", i) for i in indices]

    def noise() -> Tensor:
        drawn = torch.stack([torch.randn(SHAPE, generator=source) for source in sources])
        return drawn.to(device).contiguous(memory_format=torch.channels_last)

    timesteps = sampling_timesteps(config.spacing, denoiser.schedule.num_steps, config.steps)
    x_T = noise()
    yield x_T
    yield from configured(config)(denoiser, denoiser.schedule, x_T, timesteps, noise=noise)


def generate(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: Sequence[int], device: torch.device
) -> Iterator[Tensor]:
    """uint8 (B, H, W, C) on the CPU, batch after batch of at most `sample.batch_size`, in the order of `indices`."""
    for start in range(0, len(indices), config.batch_size):
        *_, x0 = trajectory(denoiser, config, seed, indices[start : start + config.batch_size], device)
        yield to_uint8(x0).cpu()


def stages(
    denoiser: Denoiser, config: SampleConfig, seed: int, indices: Sequence[int], device: torch.device, columns: int
) -> Tensor:
    """uint8 (columns, B, H, W, C): evenly spaced moments of the denoising, from x_T to the image."""
    moments = [to_uint8(x).cpu() for x in trajectory(denoiser, config, seed, indices, device)]
    picked = torch.linspace(0, len(moments) - 1, min(columns, len(moments))).round().long()
    return torch.stack([moments[i] for i in picked])
