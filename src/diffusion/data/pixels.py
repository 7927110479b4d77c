"""Pixels: the exact uint8 <-> [-1, 1] map, and colours."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; channels-last in memory, so nothing is transposed."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float (N, C, H, W) -> uint8 (N, H, W, C): clamped to [-1, 1] and rounded; inverts `to_tensor` exactly."""
    scaled = images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, C), C = 1 to 4 -> (..., H, W, 3): grey is repeated, what is transparent is shown on white."""
    channels = images.shape[-1]
    if channels in (1, 3):
        return np.broadcast_to(images, (*images.shape[:-1], 3))
    rows = np.ascontiguousarray(images).reshape(-1, images.shape[-2], channels)
    shown = np.asarray(on_white(Image.fromarray(rows)).convert("RGB"))
    return shown.reshape(*images.shape[:-1], 3)


def on_white(image: Image.Image) -> Image.Image:
    """RGBA without transparency."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image.convert("RGBA"))
