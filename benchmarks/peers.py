"""What people would otherwise run: diffusers as its example trains, and the usual hand-written loop.

Each builder returns a function that does one training step (or one sampling run) on a batch of its own. All are fed by
our resident uint8 batches, which spares the peers the data loading that they would pay for.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.config import ModelConfig, TrainConfig
from diffusion.data.dataset import Batches, Dataset
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet

Step = Callable[[], None]


def images(data: Dataset, config: TrainConfig, device: torch.device) -> Callable[[int], Tensor]:
    """Step -> float32 (B, 3, H, W) in [-1, 1] in PyTorch's default memory layout."""
    batches = Batches(data, config.batch_size, 0, flip=config.flip, device=device)
    return lambda step: batches(step).contiguous()


def plain_training(
    model: ModelConfig, config: TrainConfig, data: Dataset, device: torch.device, dtype: torch.dtype
) -> Step:
    """The loop of a tutorial: NCHW, default AdamW, an average weight by weight, the loss printed each step."""
    torch.manual_seed(0)
    net = UNet(model).to(device)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    alphas_cumprod = make_schedule("linear", 1000).alphas_cumprod.float().to(device)
    batch, counter = images(data, config, device), iter(range(10**9))

    def step() -> None:
        x0 = batch(next(counter))
        t = torch.randint(1000, (len(x0),), device=device)
        noise = torch.randn_like(x0)
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.mse_loss(net(x_t, t).float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
                mean.mul_(config.ema_decay).add_(weight, alpha=1 - config.ema_decay)
        loss.item()

    return step


def diffusers_unet(model: ModelConfig) -> Any:
    """UNet2DModel laid out as google/ddpm-cifar10-32, sized by `model` (the paper's: 35,746,307 parameters too).

    Raises:
        ImportError: diffusers is not there.
        UserError: it has no counterpart, such as a patch stem.
    """
    from diffusers import UNet2DModel

    from diffusion.model.diffusers_format import unet_config

    return UNet2DModel.from_config(unet_config(model))


class DiffusersTraining:
    """examples/unconditional_image_generation/train_unconditional.py of diffusers, its mixed precision included.

    A call is one training step.

    Raises:
        ImportError: diffusers is not there.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        data: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,  # of the weights, which decides the activations'
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        self.config, self.device, self.dtype = config, device, dtype
        self.net = diffusers_unet(model).to(device).to(memory_format=layout).train()
        self.average = EMAModel(self.net.parameters(), decay=config.ema_decay, use_ema_warmup=True)
        self.average.to(device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
        self.batch, self.steps = images(data, config, device), 0

    def __call__(self) -> None:
        x0 = self.batch(self.steps)
        self.steps += 1
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),), device=self.device)
        x_t = self.scheduler.add_noise(x0, noise, t)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.net(x_t, t).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.net.parameters())
        loss.detach().item()

    def averaged(self) -> Any:
        """The network with the average of its weights, which is what its example samples from."""
        self.average.copy_to(self.net.parameters())
        return self.net.eval()


def diffusers_sampling(
    net: Any, batch_size: int, steps: int, device: torch.device, dtype: torch.dtype, scheduler_name: str
) -> Callable[[], Tensor]:
    """The loop of diffusers' pipelines: images (B, 3, H, W) in [0, 1] by `steps` evaluations of its network.

    Raises:
        ImportError: diffusers is not there.
    """
    import diffusers

    scheduler = getattr(diffusers, scheduler_name)(num_train_timesteps=1000)

    @torch.no_grad()
    def step() -> Tensor:
        scheduler.set_timesteps(steps)
        x = torch.randn((batch_size, net.config.in_channels, *[net.config.sample_size] * 2), device=device)
        for t in scheduler.timesteps:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                output = net(x, t).sample
            x = scheduler.step(output.float(), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).cpu()

    return step


def lucidrains_diffusion(dim: int, dim_mults: tuple[int, ...], steps: int | None = None) -> Any:
    """GaussianDiffusion and Unet of denoising-diffusion-pytorch, all else at their defaults; DDIM if `steps` is given.

    Raises:
        ImportError: denoising-diffusion-pytorch is not there.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    return GaussianDiffusion(Unet(dim=dim, dim_mults=dim_mults), image_size=32, sampling_timesteps=steps)


def lucidrains_training(
    dim: int, dim_mults: tuple[int, ...], config: TrainConfig, data: Dataset, device: torch.device
) -> Step:
    """A step of denoising-diffusion-pytorch's Trainer at its defaults (fp32, Adam, EMA every 10 steps).

    Raises:
        ImportError: denoising-diffusion-pytorch is not there.
    """
    from ema_pytorch import EMA

    torch.manual_seed(0)
    diffusion = lucidrains_diffusion(dim, dim_mults).to(device).train()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=config.lr, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    batch, counter = images(data, config, device), iter(range(10**9))

    def step() -> None:
        loss = diffusion(batch(next(counter)).add(1).div(2))  # it takes images in [0, 1]
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


def lucidrains_sampling(
    dim: int, dim_mults: tuple[int, ...], batch_size: int, steps: int, device: torch.device
) -> Step:
    """denoising-diffusion-pytorch's DDIM sampling: `steps` evaluations of `batch_size` images.

    Raises:
        ImportError: denoising-diffusion-pytorch is not there.
    """
    diffusion = lucidrains_diffusion(dim, dim_mults, steps).to(device).eval()

    def step() -> None:
        diffusion.sample(batch_size=batch_size).cpu()

    return step
