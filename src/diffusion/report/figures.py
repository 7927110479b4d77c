"""Every chart of the project; diagrams.py, which draws with what is here, alone imports matplotlib too.

Figures are built and drawn without pyplot, so nothing is global and no display is needed. A function NAME_figure
returns the Figure; the function beside it writes it to a PNG file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from diffusion.config import DiffusionConfig
from diffusion.data import grids as pictures
from diffusion.data.pixels import rgb, to_tensor, to_uint8
from diffusion.model.process import q_sample
from diffusion.model.schedules import SCHEDULES, NoiseSchedule, configured_schedule, make_schedule

DPI = 144
INK, FAINT, GRID = "#1f2328", "#59636e", "#e3e6ea"
BLUE, ORANGE, GREEN, LIGHT_BLUE = "#0072B2", "#D55E00", "#009E73", "#B5D8EC"  # Okabe & Ito 2008: colour-blind-safe
LINE_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", INK)
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))  # a second cue beside colour
LOG_FROM = 4.0  # a range of this ratio or more is drawn on a logarithmic axis

Row = Mapping[str, float]


def loss_figure(loss_rows: Sequence[Row], val_rows: Sequence[Row]) -> Figure:
    """Training loss, raw and smoothed, and validation loss over steps; the best validation step is marked.

    loss_rows: `step, loss, loss_smoothed`; val_rows: `step, val_loss`. Either may be empty.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, "Training and validation loss", "training step", "loss")
    if loss_rows:
        steps = _column(loss_rows, "step")
        axes.plot(steps, _column(loss_rows, "loss"), color=LIGHT_BLUE, linewidth=0.7, label="training, single batches")
        axes.plot(steps, _column(loss_rows, "loss_smoothed"), color=BLUE, linewidth=1.8, label="training, smoothed")
    if val_rows:
        steps, losses = _column(val_rows, "step"), _column(val_rows, "val_loss")
        marker = "o" if len(steps) <= 60 else ""
        axes.plot(steps, losses, color=ORANGE, linewidth=1.8, marker=marker, markersize=3.5, label="validation (EMA)")
        if np.isfinite(losses).any():
            _mark_best(axes, steps, losses)
    _choose_scale(axes, [_column(loss_rows, "loss"), _column(val_rows, "val_loss")])
    axes.margins(x=0.02)
    if loss_rows or val_rows:
        legend(axes, "upper right")
    return figure


def loss_curve(loss_rows: Sequence[Row], val_rows: Sequence[Row], path: Path) -> None:
    """Write `loss_figure` to `path`."""
    save(loss_figure(loss_rows, val_rows), path)


def distance_figure(rows: Sequence[Row]) -> Figure:
    """fd_lite0 of a few samples over the steps of a training; rows: `step, fd_lite0`."""
    figure = Figure(figsize=(7.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, "Distance to the training images", "training step", "fd_lite0 of a few samples, lower is better")
    axes.plot(_column(rows, "step"), _column(rows, "fd_lite0"), color=GREEN, linewidth=1.8, marker="o", markersize=3.5)
    return figure


def schedules_figure(used: DiffusionConfig) -> Figure:
    """alpha-bar and log-SNR over t for every noise schedule with as many steps as `used`, whose own is marked."""
    figure = Figure(figsize=(7.5, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    style(left, "Signal left in $x_t$", "diffusion step $t$", r"$\bar\alpha_t$")
    style(right, "Signal-to-noise ratio", "diffusion step $t$", r"log SNR $= \ln\,\bar\alpha_t / (1 - \bar\alpha_t)$")
    for name, colour, line in zip(SCHEDULES, LINE_COLOURS, LINE_STYLES, strict=False):
        mine = name == used.schedule
        schedule = configured_schedule(used) if mine else make_schedule(name, used.num_steps)
        alpha_bar = schedule.alphas_cumprod.numpy()
        with np.errstate(divide="ignore"):  # without terminal signal it ends at minus infinity, which is not drawn
            log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
        label = f"{name} (this run)" if mine else name
        for axes, values in ((left, alpha_bar), (right, log_snr)):
            axes.plot(np.arange(len(values)), values, line, color=colour, linewidth=2.4 if mine else 1.5, label=label)
    legend(right, "lower left")
    return figure


def schedules(used: DiffusionConfig, path: Path) -> None:
    """Write `schedules_figure` to `path`."""
    save(schedules_figure(used), path)


def noising_frames(
    images: np.ndarray, schedule: NoiseSchedule, columns: int, seed: int
) -> tuple[np.ndarray, list[int]]:
    """uint8 (columns, N, H, W, C) and the step t of each column but the first, which holds the images themselves.

    The steps are even up to the last, and a row has one noise for all of them.
    """
    steps = np.linspace(0, schedule.num_steps - 1, columns).round().astype(int).tolist()[1:]
    x0 = to_tensor(images)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    noisy = [to_uint8(q_sample(schedule, x0, torch.full((len(x0),), t), eps)).numpy() for t in steps]
    return np.stack([images, *noisy]), steps


def noising_figure(images: np.ndarray, schedule: NoiseSchedule, *, columns: int = 9, seed: int = 0) -> Figure:
    """The forward process on uint8 (N, H, W, C): one row an image, one column a step, headed by t and alpha-bar."""
    scale = pictures.zoom(images, 96)
    frames, steps = noising_frames(images, schedule, columns, seed)
    gap, margin, head = 4, 20, 84
    picture = pictures.strip(rgb(frames), gap=gap, scale=scale)
    height, width = picture.shape[:2]
    figure = pixel_figure(width + 2 * margin, height + head + margin)
    figure.figimage(picture, margin, margin)
    top = margin + height
    write_text(figure, margin, top + head - 30, "Forward process: noise added step by step", 17, weight="bold")
    pitch = images.shape[2] * scale + gap
    heads = [r"$x_0$", *(f"$t={t}$" for t in steps)]
    alpha_bars = [1.0, *schedule.alphas_cumprod[steps].tolist()]
    for i, (above, alpha_bar) in enumerate(zip(heads, alpha_bars, strict=True)):
        centre = margin + i * pitch + images.shape[2] * scale / 2
        write_text(figure, centre, top + 28, above, 13, ha="center")
        write_text(figure, centre, top + 8, rf"$\bar\alpha={_short(alpha_bar)}$", 13, ha="center", color=FAINT)
    return figure


def noising_strip(images: np.ndarray, schedule: NoiseSchedule, path: Path) -> None:
    """Write `noising_figure` to `path`."""
    save(noising_figure(images, schedule), path)


def comparison_figure(real: np.ndarray, generated: np.ndarray, scores: str, *, columns: int = 8) -> Figure:
    """The first columns^2 of both sets, uint8 (N, H, W, C), side by side; `scores` stands under the second's title."""
    shown = [rgb(images[: columns**2]) for images in (real, generated)]
    grids = [pictures.grid(images, columns=columns, scale=pictures.zoom(images)) for images in shown]
    margin, head, between = 20, 68, 36
    height = max(picture.shape[0] for picture in grids)
    figure = pixel_figure(2 * margin + between + sum(g.shape[1] for g in grids), height + head + margin)
    x = margin
    for picture, title, below in zip(grids, ("Real", "Generated"), ("training set", scores), strict=True):
        figure.figimage(picture, x, margin + height - picture.shape[0])
        write_text(figure, x, margin + height + head - 30, title, 17, weight="bold")
        write_text(figure, x, margin + height + 12, below, 14, color=FAINT)
        x += picture.shape[1] + between
    return figure


def comparison(real: np.ndarray, generated: np.ndarray, scores: str, path: Path) -> None:
    """Write `comparison_figure` to `path`."""
    save(comparison_figure(real, generated, scores), path)


def pairs_figure(above: np.ndarray, below: np.ndarray, labels: Sequence[str], *, columns: int = 8) -> Figure:
    """Pairs of images, uint8 (N, H, W, C) each, one above the other, with a label under each pair."""
    scale, gap, margin, foot = pictures.zoom(above, 96), 8, 20, 30
    height, width = (side * scale for side in above.shape[1:3])
    rows, columns = -(-len(labels) // columns), min(columns, len(labels))
    tall = 2 * height + foot
    figure = pixel_figure(2 * margin + columns * (width + gap) - gap, 2 * margin + rows * tall)
    for i, label in enumerate(labels):
        x, bottom = margin + i % columns * (width + gap), margin + (rows - 1 - i // columns) * tall
        pair = rgb(np.stack([above[i], below[i]]))
        figure.figimage(pictures.grid(pair, columns=1, gap=0, scale=scale), x, bottom + foot)
        write_text(figure, x + width / 2, bottom + foot - 18, label, 13, ha="center", color=FAINT)
    return figure


def pairs(above: np.ndarray, below: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Write `pairs_figure` to `path`."""
    save(pairs_figure(above, below, labels), path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG: whole or not at all, equal bytes for equal figures."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pictures.save_png(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3]), path)


def style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels, grid and colours that all charts share; x counts something."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(x_label, fontsize=10, color=INK)
    axes.set_ylabel(y_label, fontsize=10, color=INK)
    axes.tick_params(which="both", labelsize=9, labelcolor=FAINT, color=GRID, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c9d0")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def legend(axes: Axes, place: Literal["upper right", "lower left"]) -> None:
    """The legend that all charts share."""
    axes.legend(loc=place, fontsize=9, labelcolor=INK, frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.4)


def _mark_best(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    best = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
    label = f"best validation: {losses[best]:.4g} at step {steps[best]:,.0f}"
    axes.plot(
        steps[best : best + 1],
        losses[best : best + 1],
        linestyle="none",
        marker="*",
        markersize=13,
        color=ORANGE,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=5,
        label=label,
    )


def _choose_scale(axes: Axes, series: Sequence[np.ndarray]) -> None:
    """Logarithmic y where the values span several times their smallest, with round numbers as ticks."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() < LOG_FROM * values.min():
        return
    axes.set_yscale("log")
    close = values.max() < 30 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if close else (1, 2, 5), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss (logarithmic)")


def pixel_figure(width: int, height: int) -> Figure:
    """A figure of exactly width x height pixels, on which `figimage` places pictures without resampling."""
    return Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI)  # Agg truncates to whole pixels


def write_text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    pixels: int,
    *,
    color: str = INK,
    weight: Literal["normal", "bold"] = "normal",
    ha: Literal["left", "center"] = "left",
) -> None:
    """Text of height `pixels` with its baseline at pixel (x, y) from the lower left corner."""
    size = pixels * 72 / DPI
    figure.text(x, y, text, transform=None, fontsize=size, color=color, fontweight=weight, ha=ha, va="baseline")


def _short(alpha_bar: float) -> str:
    """alpha-bar in TeX with three decimals, or as a power of ten where those would be zeros."""
    if alpha_bar in (0.0, 1.0):
        return f"{alpha_bar:.0f}"
    if alpha_bar >= 0.0005:
        return f"{alpha_bar:.3f}"
    mantissa, exponent = f"{alpha_bar:.0e}".split("e")
    return rf"{mantissa}\cdot10^{{{int(exponent)}}}"


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows], dtype=np.float64)
