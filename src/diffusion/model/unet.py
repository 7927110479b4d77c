"""The U-Net of Ho et al. 2020 (appendix B), sized by params.yaml's model section."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.config import ModelConfig
from diffusion.model.layers import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    SubPixelUpsample,
    TimestepEmbedding,
    Upsample,
    conv3x3,
    group_norm,
    zeroed,
)

AUGMENT_LABELS = 8  # numbers that say how an image was augmented, see training/augment.py


class UNet(nn.Module):
    """net(x, t, labels) -> what diffusion.prediction says, the shape of x.

    x: (B, image_channels, image_size, image_size) in [-1, 1] plus noise; t: int (B,); labels: int (B,), -1 or None = of
    no class. patch_size p moves p x p pixels into channels first, so the first level works at image_size / p: most of
    the quality at a fraction of the cost. augment: float32 (B, 8), what training did to the images (augment.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.image_shape = config.image_shape
        self.num_classes = config.num_classes
        patch_channels = config.image_channels * config.patch_size**2
        width = 4 * config.channels
        levels = [config.channels * m for m in config.multipliers]
        size = config.image_size // config.patch_size

        def block(channels_in: int, channels_out: int, size: int) -> "Block":
            attend = size in config.attention_resolutions
            return Block(channels_in, channels_out, width, config, attend)

        self.embedding = TimestepEmbedding(config.channels, width)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last: of no class
        if config.augment:
            self.augment_embedding = nn.Linear(AUGMENT_LABELS, width, bias=False)
        self.stem = conv3x3(patch_channels, config.channels)

        self.down = nn.ModuleList()
        channels, skips = config.channels, [config.channels]
        for level, level_channels in enumerate(levels):
            for _ in range(config.num_blocks):
                self.down.append(block(channels, level_channels, size))
                channels = level_channels
                skips.append(channels)
            if level < len(levels) - 1:
                self.down.append(Downsample(channels, config.downsample))
                skips.append(channels)
                size //= 2

        self.middle = nn.ModuleList(
            [
                Block(channels, channels, width, config, attend=True),
                Block(channels, channels, width, config, attend=False),
            ]
        )

        self.up = nn.ModuleList()
        for level, level_channels in reversed(list(enumerate(levels))):
            for _ in range(config.num_blocks + 1):
                self.up.append(block(channels + skips.pop(), level_channels, size))
                channels = level_channels
            if level > 0:
                if config.upsample == "shuffle":
                    self.up.append(SubPixelUpsample(channels, levels[level - 1]))
                    channels = levels[level - 1]
                else:
                    self.up.append(Upsample(channels))
                size *= 2

        self.norm = group_norm(channels, config.norm_groups)
        self.head = zeroed(conv3x3(channels, patch_channels))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """See the class.

        Raises:
            ValueError: labels were given, and this network is unconditional.
        """
        embedding = self.embedding(t)
        if self.num_classes:
            known = torch.full_like(t, -1) if labels is None else labels
            embedding = embedding + self.class_embedding(torch.where(known < 0, self.num_classes, known))
        elif labels is not None:
            raise ValueError("this network is unconditional: call it without labels")
        if augment is not None:
            embedding = embedding + self.augment_embedding(augment)
        embedding = F.silu(embedding)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, Block) else layer(h)
        out = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out


class Block(nn.Module):
    """A residual block, with self-attention after it where `attend`."""

    def __init__(self, channels_in: int, channels_out: int, width: int, config: ModelConfig, attend: bool) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, width, config.norm_groups, config.dropout)
        self.attention = (
            SelfAttention(channels_out, config.norm_groups, config.head_channels) if attend else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))
