"""Non-leaking augmentation (Karras et al. 2022, appendix F.2): the network is told what was done, and samples without.

What is done to an image is its row of AUGMENT_LABELS numbers; zeros leave it as it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, SHIFT = 0.2, 0.125  # standard deviations: of log2 sizes, and in image widths
TURNED = 0.5  # share of stretches that are along any angle; the others are along x or y


def draw(count: int, probability: float, source: torch.Generator) -> Tensor:
    """float32 (count, AUGMENT_LABELS): each of five augmentations happens with `probability`, of random strength."""

    def gate() -> Tensor:
        return (torch.rand(count, generator=source, device=source.device) < probability).float()

    def angle() -> Tensor:
        return (torch.rand(count, generator=source, device=source.device) * 2 - 1) * math.pi

    def normal() -> Tensor:
        return torch.randn(count, generator=source, device=source.device)

    flip = gate() * torch.randint(2, (count,), generator=source, device=source.device)
    scale = gate() * normal()
    turn = gate() * angle()
    stretch, turned = gate() * normal(), torch.rand(count, generator=source, device=source.device) < TURNED
    upright = stretch.lt(0) * (math.pi / 2)  # narrower along x is wider along y
    axis, stretch = torch.where(turned, angle(), upright), stretch.abs()
    shifted = gate()
    columns = [flip, scale, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin()]
    return torch.stack([*columns, shifted * normal(), shifted * normal()], dim=1)


def applied(images: Tensor, labels: Tensor) -> Tensor:
    """Images (B, C, H, W), H = W, as their `labels` (B, AUGMENT_LABELS) say: bilinear, mirrored at the edges."""
    grid = F.affine_grid(_inverse(labels)[:, :2], list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)
    changed = labels.ne(0).any(dim=1).view(-1, 1, 1, 1)
    return torch.where(changed, moved, images).contiguous(memory_format=torch.channels_last)


def _inverse(labels: Tensor) -> Tensor:
    """(B, 3, 3) from a place in the result to the place in the image, both in [-1, 1]: the steps undone in turn."""
    flip, scale, cos_less_1, sin, along_x, along_y, x, y = labels.unbind(1)
    zero, one = torch.zeros_like(flip), torch.ones_like(flip)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, dim=1).view(-1, 3, 3)

    def turned(cos: Tensor, sin: Tensor) -> Tensor:
        return matrix(cos, -sin, zero, sin, cos, zero, zero, zero, one)

    flipped = matrix(one, zero, zero, zero, 1 - 2 * flip, zero, zero, zero, one)
    smaller = torch.exp2(-SCALE * scale)
    scaled = matrix(smaller, zero, zero, zero, smaller, zero, zero, zero, one)
    strength = torch.hypot(along_x, along_y)
    axis = torch.atan2(along_y, along_x)
    narrower = torch.exp2(-SCALE * strength)
    squeezed = matrix(narrower, zero, zero, zero, 1 / narrower, zero, zero, zero, one)
    stretched = turned(axis.cos(), axis.sin()) @ squeezed @ turned(axis.cos(), -axis.sin())
    shifted = matrix(one, zero, -2 * SHIFT * x, zero, one, -2 * SHIFT * y, zero, zero, one)
    return flipped @ scaled @ turned(1 + cos_less_1, -sin) @ stretched @ shifted
