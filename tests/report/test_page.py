import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import paths
from diffusion.data import grids
from diffusion.errors import UserError
from diffusion.model.unet import UNet
from diffusion.pipeline.report import report


@pytest.fixture
def outputs(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the earlier stages would have left, with a score whose name needs escaping."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for folder in (paths.IMAGES, paths.SAMPLES, paths.TRAIN_METRICS.parent, paths.LOSS_CSV.parent):
        folder.mkdir(parents=True)
    np.save(paths.TRAIN_IMAGES, pictures)
    np.savez(paths.SAMPLES_NPZ, images=pictures)
    trained = {section: getattr(tiny(), section).model_dump(mode="json") for section in ("diffusion", "model")}
    paths.SAMPLES_CARD.write_text(json.dumps({"fingerprint": "f", "run_id": None, "trained": trained}))
    grids.save_png(pictures[0], paths.SAMPLES / "denoising.png")
    grids.save_png(pictures[0], paths.PREVIEWS / "step_000500.png")
    grids.save_png(pictures[0], paths.PREVIEWS / "step_000500_denoising.png")
    paths.LOSS_CSV.write_text("step,loss,loss_smoothed,lr,grad_norm\n10,0.5,0.5,0.001,1.0\n")
    paths.VAL_LOSS_CSV.write_text("step,val_loss\n10,0.4\n")
    paths.FD_CSV.write_text("step,fd_lite0\n")
    train = {"best_val_loss": 0.4, "images_seen": 640, "images_per_second": 400.0, "train_seconds": 90, "parameters": 7}
    paths.TRAIN_METRICS.write_text(json.dumps(train))
    about = [{"metric": "fd_lite0_12", "measure": "frechet", "samples": 12, "reference": {"split": "<b>train</b>"}}]
    paths.EVALUATE_METRICS.write_text(json.dumps({"fd_lite0_12": 432.1, "about": about}))
    return tmp_path


def test_the_page_holds_scores_and_pictures_and_nothing_from_outside(outputs: Path, tiny) -> None:
    report(tiny(**{"tracking.enabled": False}))
    page = (paths.REPORT / "index.html").read_text()
    for text in ("432.1", "1.5 min", "640", "denoising, step 500", "&lt;b&gt;train&lt;/b&gt;"):
        assert text in page, text
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    for name in ("loss", "schedules", "noising", "real_and_generated", "noising_by_schedule", "unet"):
        assert (paths.REPORT / f"{name}.png").stat().st_size > 1000


def test_distances_and_closest_pairs_are_shown_if_there_are_any(outputs: Path, tiny) -> None:
    paths.FD_CSV.write_text("step,fd_lite0\n10,700.5\n20,650.25\n")
    scores = json.loads(paths.EVALUATE_METRICS.read_text())
    copies = {"metric": "copies_lite0_12", "measure": "copies", "threshold": 3.25, "pairs": [[3, 7, 1.5], [0, 0, 2.5]]}
    scores |= {"copies_lite0_12": 0.25, "about": [*scores["about"], copies]}
    paths.EVALUATE_METRICS.write_text(json.dumps(scores))
    report(tiny(**{"tracking.enabled": False}))
    page = (paths.REPORT / "index.html").read_text()
    for text in ("fd_lite0 during training", "copies_lite0_12 (below 3.25)", "<dt>copies_lite0_12</dt><dd>0.25</dd>"):
        assert text in page, text
    with Image.open(paths.REPORT / "copies_lite0_12.png") as picture:
        shown = np.asarray(picture)
    with np.load(paths.SAMPLES_NPZ) as archive:
        sample = grids.grid(archive["images"][3:4], columns=1, scale=3)
    assert (shown[20:116, 20:116] == sample).all()  # the first pair's sample, above its training image


@pytest.mark.parametrize("path", [paths.LOSS_CSV, paths.EVALUATE_METRICS, paths.SAMPLES / "denoising.png"], ids=str)
def test_a_missing_input_is_one_line(outputs: Path, tiny, path: Path) -> None:
    path.unlink()
    with pytest.raises(UserError, match="dvc repro") as caught:
        report(tiny(**{"tracking.enabled": False}))
    assert "\n" not in str(caught.value)


def test_a_long_training_shows_six_steps_from_first_to_last(outputs: Path, tiny) -> None:
    for step in range(1000, 41_000, 1000):
        for kind in ("", "_denoising"):
            grids.save_png(np.zeros((4, 4, 3), np.uint8), paths.PREVIEWS / f"step_{step:06d}{kind}.png")
    report(tiny(**{"tracking.enabled": False}))
    shown = re.findall(r'alt="samples, step ([\d,]+)"', (paths.REPORT / "index.html").read_text())
    assert len(shown) == 6
    assert (shown[0], shown[-1]) == ("500", "40,000")


def test_an_imported_models_page_is_of_its_own_network_and_shows_no_training(outputs: Path, tiny) -> None:
    """params.yaml and what the last training left are of another network."""
    other = tiny(**{"model.channels": 16, "model.head_channels": 16, "diffusion.schedule": "linear"})
    trained = {section: getattr(other, section).model_dump(mode="json") for section in ("diffusion", "model")}
    card = {"fingerprint": "f", "run_id": None, "weights": "imported", "trained": trained}
    paths.SAMPLES_CARD.write_text(json.dumps(card))
    report(tiny(**{"tracking.enabled": False}))
    page = (paths.REPORT / "index.html").read_text()
    parameters = sum(p.numel() for p in UNet(other.model).parameters())
    for text in ("linear schedule, v prediction", f"<dt>parameters</dt><dd>{parameters:,}</dd>"):
        assert text in page, text
    for text in ("During training", "images seen", "Loss"):
        assert text not in page, text
