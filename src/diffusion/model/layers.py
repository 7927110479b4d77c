"""Building blocks of the U-Net (Ho et al. 2020, appendix B)."""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class TimestepEmbedding(nn.Module):
    """Integer steps (B,) -> (B, width): sinusoids (Vaswani et al. 2017, section 3.5), then an MLP."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = channels // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000.0) / (half - 1)))
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the time embedding added between; (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.embed = nn.Linear(embedding, channels_out)
        self.norm2 = group_norm(channels_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv3x3(channels_out, channels_out))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the H W positions of (B, C, H, W)."""

    def __init__(self, channels: int, groups: int, head_channels: int | None) -> None:
        super().__init__()
        self.heads = channels // head_channels if head_channels else 1
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        heads = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        mixed = attention(*heads.permute(2, 0, 3, 1, 4).unbind(0))
        tokens = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        return x + tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, positions, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # Plain matrix products: the fused kernel's backward pass is slower on CPUs for small heads.
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights.to(v.dtype) @ v


class Downsample(nn.Module):
    """Strided 3x3 convolution; (B, C, H, W) -> (B, C, H/2, W/2).

    padding: "symmetric", or "same" as TensorFlow has it (nothing before, one row and column after), which the published
    DDPM was trained with.
    """

    def __init__(self, channels: int, padding: str = "symmetric") -> None:
        super().__init__()
        self.same = padding == "same"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.same else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.same else x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution; (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class SubPixelUpsample(nn.Module):
    """1x1 convolution, then pixel shuffle (Shi et al. 2016); (B, C, H, W) -> (B, C', 2H, 2W).

    A small fraction of Upsample's arithmetic, which at full width is the dearest layer of the network.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4 * channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """`groups` groups (Ho et al. 2020: 32); fewer where the channels do not divide.

    On CPUs, groups of a multiple of 16 channels are an order of magnitude faster in bf16 (benchmarks/group_norm.py).
    """
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


def zeroed(layer: Layer) -> Layer:
    """The layer with all parameters zero, so that its block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
