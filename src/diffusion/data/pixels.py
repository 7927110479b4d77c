"""Pixels: the exact uint8 <-> [-1, 1] map, and colours."""

import numpy as np
import torch
from torch import Tensor


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; channels-last in memory, so nothing is transposed."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float (N, C, H, W) -> uint8 (N, H, W, C): clamped to [-1, 1] and rounded; inverts `to_tensor` exactly."""
    scaled = images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (..., C), C = 1 to 4 -> (..., 3): grey is repeated, alpha dropped."""
    colours = images[..., : 1 if images.shape[-1] < 3 else 3]
    return np.broadcast_to(colours, (*images.shape[:-1], 3))
