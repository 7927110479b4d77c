"""Figures of the method itself: the network as it is built, the forward process by schedule, solvers compared."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from torch import Tensor, nn

from diffusion.data import grids as pictures
from diffusion.data.pixels import rgb
from diffusion.model.layers import SelfAttention
from diffusion.model.schedules import SCHEDULES, make_schedule
from diffusion.model.unet import Block, UNet
from diffusion.report import figures

KINDS = {
    "convolution": figures.FAINT,
    "residual block": figures.BLUE,
    "residual block with attention": figures.ORANGE,
    "change of size": figures.GREEN,
}


@dataclass(frozen=True)
class Layer:
    """A layer of the network as the data pass it."""

    kind: str  # one of KINDS
    channels: int  # that it gives
    size: int  # height and width that it gives


def traced(net: UNet) -> tuple[list[Layer], list[tuple[int, int]]]:
    """The layers in order, and (from, to) of the skip connections, found by running the network without numbers."""
    ghost = copy.deepcopy(net).to("meta")
    modules = [ghost.stem, *ghost.down, *ghost.middle, *ghost.up, ghost.head]
    layers: list[Layer] = []
    for module in modules:

        def record(module: nn.Module, _: object, output: Tensor) -> None:
            layers.append(Layer(_kind(module), output.shape[1], output.shape[-1]))

        module.register_forward_hook(record)
    with torch.no_grad():
        ghost(torch.empty((1, *net.image_shape), device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    givers = list(range(1 + len(ghost.down)))
    takers = [i for i, m in enumerate(modules) if isinstance(m, Block) and i > len(ghost.down) + len(ghost.middle)]
    return layers, list(zip(reversed(givers), takers, strict=True))


def _kind(module: nn.Module) -> str:
    if isinstance(module, Block):
        attends = isinstance(module.attention, SelfAttention)
        return "residual block with attention" if attends else "residual block"
    return "convolution" if isinstance(module, nn.Conv2d) else "change of size"


def unet_figure(net: UNet) -> Figure:
    """The network's layers from left to right, lower where the image is smaller, with channels and skip connections."""
    layers, skips = traced(net)
    sizes = sorted({layer.size for layer in layers}, reverse=True)
    widest = max(layer.channels for layer in layers)
    figure = Figure(figsize=(max(7.5, 0.52 * len(layers)), 1.1 + 1.15 * len(sizes)), dpi=figures.DPI)
    axes = figure.add_axes((0.02, 0.1, 0.96, 0.74))
    level = {size: -row for row, size in enumerate(sizes)}
    for i, layer in enumerate(layers):
        height = 0.25 + 0.45 * layer.channels / widest
        corner = (i - 0.36, level[layer.size] - height / 2)
        axes.add_patch(Rectangle(corner, 0.72, height, facecolor=KINDS[layer.kind], edgecolor="white"))
        middle = (i, level[layer.size])
        axes.text(*middle, str(layer.channels), ha="center", va="center", color="white", fontsize=8, rotation=90)
    for a, b in skips:
        start, end = (a, level[layers[a].size] + 0.36), (b, level[layers[b].size] + 0.36)
        arrow = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={-min(0.12, 1.1 / (b - a))}",  # no higher than the space between levels
            shrinkA=0,
            shrinkB=0,
            mutation_scale=7,
            linewidth=0.7,
            color=figures.FAINT,
            alpha=0.7,
        )
        axes.add_patch(arrow)
    for size in sizes:
        axes.text(-1.1, level[size], f"{size}x{size}", ha="right", va="center", fontsize=9, color=figures.INK)
    axes.set_xlim(-2.4, len(layers))
    axes.set_ylim(-len(sizes) + 0.4, 1.0)
    axes.axis("off")
    channels, height, width = net.image_shape
    total = sum(p.numel() for p in net.parameters())
    stem = f", {net.patch_size}x{net.patch_size} pixels to channels first" if net.patch_size > 1 else ""
    title = f"{total:,} parameters; images {channels}x{height}x{width}{stem}; the numbers are channels"
    figure.text(0.02, 0.94, "The network", fontsize=12, fontweight="bold", color=figures.INK)
    figure.text(0.02, 0.89, title, fontsize=9, color=figures.FAINT)
    present = [kind for kind in KINDS if any(layer.kind == kind for layer in layers)]
    handles = [Patch(facecolor=KINDS[kind], label=kind) for kind in present]
    figure.legend(
        handles=handles, loc="lower left", ncols=len(handles), fontsize=9, frameon=False, bbox_to_anchor=(0.01, 0)
    )
    return figure


def schedules_noising_figure(image: np.ndarray, num_steps: int, *, columns: int = 11, seed: int = 0) -> Figure:
    """One image uint8 (H, W, C) noised by every schedule with the same noise: a row each, t from left to right."""
    schedules = [make_schedule(name, num_steps) for name in SCHEDULES]
    found = [figures.noising_frames(image[None], schedule, columns, seed) for schedule in schedules]
    frames = np.concatenate([frames for frames, _ in found], axis=1)
    scale, gap, margin, left, head = pictures.zoom(image[None], 64), 4, 20, 90, 76
    picture = pictures.strip(rgb(frames), gap=gap, scale=scale)
    height, width = picture.shape[:2]
    figure = figures.pixel_figure(width + left + margin, height + head + margin)
    figure.figimage(picture, left, margin)
    figures.write_text(
        figure, margin, margin + height + head - 30, "The same noise, added by each schedule", 17, weight="bold"
    )
    pitch = image.shape[0] * scale + gap
    for row, name in enumerate(SCHEDULES):
        centre = margin + height - row * pitch - image.shape[0] * scale / 2
        figures.write_text(figure, margin, centre - 5, name, 14)
    for column, t in enumerate(["$x_0$", *(f"$t={t}$" for t in found[0][1])]):
        centre = left + column * (image.shape[1] * scale + gap) + image.shape[1] * scale / 2
        figures.write_text(figure, centre, margin + height + 10, t, 13, ha="center")
    return figure


def solvers_figure(scores: Mapping[str, float]) -> Figure:
    """fd_lite0 over network evaluations; keys of `scores` are "solver spacing evaluations"."""
    curves: dict[str, dict[int, float]] = {}
    for key, value in scores.items():
        name, _, count = key.rpartition(" ")
        curves.setdefault(name, {})[int(count)] = value
    figure = Figure(figsize=(7.5, 4.6), dpi=figures.DPI, layout="constrained")
    axes = figure.subplots()
    figures.style(axes, "Quality for network evaluations", "network evaluations an image", "fd_lite0, lower is better")
    solvers = list(dict.fromkeys(name.split()[0] for name in curves))
    for name, points in curves.items():
        solver = solvers.index(name.split()[0])
        spacings = [other for other in curves if other.split()[0] == name.split()[0]]
        line = figures.LINE_STYLES[spacings.index(name)]
        xs = sorted(points)
        colour = figures.LINE_COLOURS[solver]
        axes.plot(xs, [points[x] for x in xs], line, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    axes.set_xscale("log")
    ticks = sorted({count for points in curves.values() for count in points if count in (5, 10, 20, 50, 100, 1000)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    best = min(scores.values())
    axes.set_ylim(0.95 * best, min(2.5 * best, 1.05 * max(scores.values())))
    figures.legend(axes, "upper right")
    return figure
