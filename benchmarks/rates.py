"""What a machine's matrix products and convolutions reach, and what a network asks of them."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import ModelConfig
from diffusion.model.unet import UNet

TURNS = 5


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of `count` steps after one that is not counted."""
    step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(size: int, count: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _rate(lambda: a @ b, 2 * size**3, count, device)


def conv_rate(
    channels: int,
    size: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.channels_last,
) -> float:
    """TFLOP/s of a 3x3 convolution and its two gradients."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).to(memory_format=layout)

    x, weight = tensor(batch, channels, size, size).requires_grad_(), tensor(channels, channels, 3, 3).requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> object:
        return torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient)

    return _rate(step, 3 * 2 * batch * size**2 * 9 * channels**2, 10, device)


def forward_flops(model: ModelConfig) -> float:
    """FLOPs of the network's forward pass for one image; a training step is counted as three times that."""
    return count_flops(UNet(model), model.image_shape)


def count_flops(net: torch.nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> float:
    """FLOPs of `net` for one image of `shape` (C, H, W): convolutions and products; a multiply-add counts as two."""
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    return float(counter.get_total_flops())


def _rate(step: Callable[[], object], flops: float, count: int, device: torch.device) -> float:
    rates = [flops * count / timed(step, count, device) for _ in range(TURNS)]
    return float(f"{median(rates) / 1e12:.4g}")
