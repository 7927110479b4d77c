"""What of the U-Net is what in diffusers' UNet2DModel: its parameters, and the config of the networks they share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffusion.model.layers import Downsample, Upsample
from diffusion.model.unet import Block, UNet

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
UNET_FIXED: dict[str, Any] = {  # what this U-Net is, in diffusers' words; their defaults differ in part
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "attn_norm_num_groups": None,
}
SHAPE = ("sample_size", "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
DEFAULTS = {  # diffusers' own, where a folder's config leaves a key out
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "attn_norm_num_groups": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "num_class_embeds": None,
}


def layers(net: UNet) -> Iterator[tuple[str, str]]:
    """(name of a parameter here, name there) for each parameter of `net`; `qkv` stands for three there."""
    names = dict(_modules(net))
    for parameter in net.state_dict():
        module = max((m for m in names if parameter.startswith(m + ".")), key=len)
        yield parameter, names[module] + parameter[len(module) :]


def _modules(net: UNet) -> Iterator[tuple[str, str]]:
    yield from {
        "embedding.mlp.0": "time_embedding.linear_1",
        "embedding.mlp.2": "time_embedding.linear_2",
        "class_embedding": "class_embedding",
        "stem": "conv_in",
        "norm": "conv_norm_out",
        "head": "conv_out",
    }.items()
    yield from _level_modules(net.down, "down", "down_blocks", "downsamplers.0", Downsample)
    yield from _level_modules(net.up, "up", "up_blocks", "upsamplers.0", Upsample)
    yield from _block_modules("middle.0", "mid_block", 0)
    yield from _block_modules("middle.1", "mid_block", 1)


def _level_modules(
    stack: torch.nn.ModuleList, ours: str, theirs: str, resampler: str, kind: type
) -> Iterator[tuple[str, str]]:
    level = block = 0
    for i, layer in enumerate(stack):
        if isinstance(layer, Block):
            yield from _block_modules(f"{ours}.{i}", f"{theirs}.{level}", block)
            block += 1
        elif isinstance(layer, kind):
            yield f"{ours}.{i}.conv", f"{theirs}.{level}.{resampler}.conv"
            level, block = level + 1, 0


def _block_modules(ours: str, theirs: str, number: int) -> Iterator[tuple[str, str]]:
    inside = {"embed": "time_emb_proj", "shortcut": "conv_shortcut"}
    for name in ("norm1", "conv1", "embed", "norm2", "conv2", "shortcut"):
        yield f"{ours}.residual.{name}", f"{theirs}.resnets.{number}.{inside.get(name, name)}"
    for name, there in (("norm", "group_norm"), ("qkv", "qkv"), ("out", "to_out.0")):
        yield f"{ours}.attention.{name}", f"{theirs}.attentions.{number}.{there}"


def split(ours: str, theirs: str, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name there, tensor) of a parameter here: itself, or q, k and v."""
    if ".qkv." not in theirs:
        yield theirs, state[ours]
        return
    for name, part in zip(("to_q", "to_k", "to_v"), state[ours].chunk(3), strict=True):
        yield theirs.replace("qkv", name), part.clone()


def joined(ours: str, theirs: str, found: dict[str, Tensor]) -> Tensor:
    """The parameter `ours`, taken out of what was `found` under diffusers' names of today or of 2022.

    Raises:
        KeyError: it is not there.
    """
    old = {new: name for name, new in OLD_ATTENTION.items()}

    def get(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        stem = next((module.removesuffix(new) + past for new, past in old.items() if module.endswith(new)), module)
        tensor = found.pop(name if name in found else f"{stem}.{kind}")
        return tensor.reshape(len(tensor), -1) if ".attentions." in name and tensor.ndim == 4 else tensor

    if ".qkv." not in theirs:
        return get(theirs)
    return torch.cat([get(theirs.replace("qkv", name)) for name in ("to_q", "to_k", "to_v")])
