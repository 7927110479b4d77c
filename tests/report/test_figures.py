from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.config import DiffusionConfig
from diffusion.model.schedules import SCHEDULES, make_schedule
from diffusion.report import figures

LOSSES = [{"step": 10.0 * i, "loss": 1.0 / i, "loss_smoothed": 1.1 / i} for i in range(1, 20)]
VALIDATION = [{"step": 50.0, "val_loss": 0.4}, {"step": 100.0, "val_loss": 0.2}, {"step": 150.0, "val_loss": 0.3}]


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.array(line.get_xydata()) for line in axes.get_lines()}


def test_the_loss_figure_shows_its_data_and_the_best_step() -> None:
    drawn = lines(figures.loss_figure(LOSSES, VALIDATION).axes[0])
    by_kind = {name.split(":")[0]: xy for name, xy in drawn.items()}
    np.testing.assert_allclose(by_kind["training, single batches"], [[r["step"], r["loss"]] for r in LOSSES])
    np.testing.assert_allclose(by_kind["training, smoothed"], [[r["step"], r["loss_smoothed"]] for r in LOSSES])
    np.testing.assert_allclose(by_kind["validation (EMA)"], [[r["step"], r["val_loss"]] for r in VALIDATION])
    np.testing.assert_allclose(by_kind["best validation"], [[100.0, 0.2]])


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1.0, "loss": float("nan"), "loss_smoothed": float("nan")}]], ids=["none", "nan"]
)
def test_a_loss_figure_without_values_can_be_drawn(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    figures.loss_curve(rows, [], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 500


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedules_figure_shows_alpha_bar_and_log_snr(zero: bool) -> None:
    config = DiffusionConfig(schedule="cosine", num_steps=100, zero_terminal_snr=zero, prediction="v")
    left, right = figures.schedules_figure(config).axes
    for name in SCHEDULES:
        mine = name == "cosine"
        label = f"{name} (this run)" if mine else name
        alpha_bar = make_schedule(name, 100, zero_terminal_snr=zero and mine).alphas_cumprod.numpy()
        np.testing.assert_allclose(lines(left)[label][:, 1], alpha_bar)
        last = 99 if zero and mine else 100
        expected = np.log(alpha_bar[:last] / (1 - alpha_bar[:last]))
        np.testing.assert_allclose(lines(right)[label][:last, 1], expected, rtol=1e-6)
    assert float(lines(left)["cosine (this run)"][-1, 1] == 0.0) == zero
    assert right.get_ylim()[0] > -40


def test_the_noising_frames_are_the_forward_process() -> None:
    """Signal and noise of a column add up to x_t: subtracting the scaled image leaves one noise for all columns."""
    schedule = make_schedule("linear", 1000)
    pictures = np.random.default_rng(0).integers(100, 156, (2, 32, 32, 3), dtype=np.uint8)
    frames, steps = figures.noising_frames(pictures, schedule, columns=5, seed=0)
    assert steps == [250, 500, 749, 999]
    np.testing.assert_array_equal(frames[0], pictures)
    noises = []
    for frame, t in zip(frames[1:], steps, strict=True):
        alpha_bar = float(schedule.alphas_cumprod[t])
        x_t = frame / 127.5 - 1
        noises.append((x_t - alpha_bar**0.5 * (pictures / 127.5 - 1)) / (1 - alpha_bar) ** 0.5)
    inside = np.all([(f > 0) & (f < 255) for f in frames[1:]], axis=0)  # clamped pixels say nothing
    for noise in noises[1:]:
        np.testing.assert_allclose(noise[inside], noises[0][inside], atol=0.02)
    assert abs(np.std(noises[0][inside])) > 0.4


def test_the_noising_figure_heads_every_column_with_t_and_alpha_bar() -> None:
    """alpha-bar of the linear schedule ends at 4.04e-5 (Ho et al. 2020, with betas 1e-4 .. 0.02 over 1,000 steps)."""
    pictures = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    figure = figures.noising_figure(pictures, make_schedule("linear", 1000), columns=3)
    _, *heads = [text.get_text() for text in figure.texts]
    assert heads[0::2] == ["$x_0$", "$t=500$", "$t=999$"]
    assert heads[1::2] == [rf"$\bar\alpha={value}$" for value in ("1", "0.078", r"4\cdot10^{-5}")]
    figure = figures.noising_figure(pictures, make_schedule("linear", 1000, zero_terminal_snr=True), columns=3)
    assert figure.texts[-1].get_text() == r"$\bar\alpha=0$"


def test_pictures_are_placed_without_resampling(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    figures.comparison(pictures, pictures[::-1], "fd_lite0 1.0", tmp_path / "c.png")
    page = np.asarray(Image.open(tmp_path / "c.png"))
    wanted = pictures[0].repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(page, wanted.shape)[:, :, 0]
    corner = (windows[:, :, 0, 0] == wanted[0, 0]).all(axis=-1) & (windows[:, :, -1, -1] == wanted[-1, -1]).all(axis=-1)
    found = sum(bool((windows[y, x] == wanted).all()) for y, x in zip(*np.nonzero(corner), strict=True))
    assert found == 2  # once among the real, once among the generated


def test_equal_figures_are_equal_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("a", "b"):
        config = DiffusionConfig(schedule="cosine", num_steps=50, zero_terminal_snr=False, prediction="v")
        figures.schedules(config, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
