"""The real stage commands, shrunk, on synthetic images, in a folder of their own."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run, run_all, wait_for_checkpoint, write_params
from helpers.preloaded import Command
from helpers.project import REPO
from PIL import Image
from safetensors.numpy import load_file

from diffusion import params_file, paths

RECIPES = [f"params/{p.name}" for p in sorted(REPO.glob("params/*.yaml")) if p.name != "laptop.yaml"]


def test_every_stage_writes_its_outputs(finished: Path) -> None:
    outputs_are_complete()


def test_the_laptop_recipe_is_the_default() -> None:
    assert params_file.load(REPO / "params/laptop.yaml") == params_file.load(REPO / "params.yaml")


@pytest.mark.parametrize(
    "recipe", [r if "conditional" in r else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES]
)
def test_every_recipe_runs_through_every_stage(workspace: Path, recipe: str) -> None:
    write_params(recipe)
    run_all()
    outputs_are_complete()


def outputs_are_complete() -> None:
    metrics = json.loads(paths.TRAIN_METRICS.read_text())
    assert metrics["images_seen"] == 8 * 4
    assert metrics["best_step"] in (4, 8)
    for key in ("images_per_second", "train_seconds", "parameters", "best_val_loss"):
        assert metrics[key] > 0, key
    with np.load(paths.SAMPLES_NPZ) as archive:
        samples, labels = archive["images"], archive.get("labels")
    assert (samples.dtype, samples.shape) == (np.uint8, (12, 32, 32, 3))
    if params_file.load("params.yaml").model.num_classes:
        assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert (paths.SAMPLES / "guidance.png").stat().st_size > 500
    else:
        assert labels is None
    for i in range(12):
        np.testing.assert_array_equal(np.asarray(Image.open(paths.SAMPLES / f"png/{i:05d}.png")), samples[i])
    assert json.loads(paths.EVALUATE_METRICS.read_text())["fd_lite0_12"] > 0
    for picture in (paths.SAMPLES / "grid.png", paths.SAMPLES / "denoising.png", paths.REPORT / "index.html"):
        assert picture.stat().st_size > 500


def test_images_of_ones_own_run_through_every_stage(workspace: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        picture = Path("photos", "ab"[i % 2], f"{i}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(picture)
    shape = {"model.image_size": 16, "model.image_channels": 1, "model.attention_resolutions": [8]}
    write_params(**shape, **{"data.source": "photos", "evaluate.reference_images": 50})
    run_all("download", "prepare", "reference", "train", "sample", "evaluate", "report")
    with np.load(paths.SAMPLES_NPZ) as archive:
        samples = archive["images"]
    assert (samples.dtype, samples.shape) == (np.uint8, (12, 16, 16, 1))
    picture = Image.open(paths.SAMPLES / "png/00003.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), samples[3, ..., 0])
    assert json.loads(paths.EVALUATE_METRICS.read_text())["fd_lite0_12"] > 0


def test_curves_and_previews_are_complete(finished: Path) -> None:
    with paths.LOSS_CSV.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert all(float(row["loss"]) > 0 for row in rows)
    with paths.VAL_LOSS_CSV.open() as file:
        values = {int(row["step"]): float(row["val_loss"]) for row in csv.DictReader(file)}
    assert list(values) == [4, 8]
    metrics = json.loads(paths.TRAIN_METRICS.read_text())
    assert metrics["best_val_loss"] == min(values.values()) == values[metrics["best_step"]]
    names = [f"step_{step:06d}{kind}.png" for step in (4, 8) for kind in ("", "_denoising")]
    assert sorted(p.name for p in paths.PREVIEWS.iterdir()) == sorted(names)


def test_save_png_false_saves_no_png(finished: Path) -> None:
    write_params(**{"sample.save_png": False})
    shutil.rmtree(paths.SAMPLES)  # as DVC does
    run_all("sample")
    assert not (paths.SAMPLES / "png").exists()
    assert paths.SAMPLES_NPZ.exists()


@pytest.mark.parametrize(
    "signal_number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM))],
    ids=["SIGKILL", "SIGINT", "SIGTERM"],
)
def test_a_killed_training_resumes_to_the_same_model(workspace: Path, signal_number: int) -> None:
    steps = {"steps": 60, "preview_every": 60, "validate_every": 30, "checkpoint_every": 6}
    write_params(**{f"train.{key}": value for key, value in steps.items()})
    run_all("prepare")
    process = Command("stages.train")
    wait_for_checkpoint(12, process)
    process.send_signal(signal_number)
    said = process.wait()
    if signal_number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert re.search(r"stopped at step \d+; `dvc repro` goes on from there", said)
    assert "Traceback" not in said
    assert not paths.MODEL.exists()

    again = run("train")
    assert "resuming at step" in again.output
    assert again.exit_code == 0
    resumed = load_file(paths.MODEL)

    for path in paths.RUNS.iterdir():
        path.rename(workspace / f"old-{path.name}")
    run_all("train")  # the whole of it
    for name, weight in load_file(paths.MODEL).items():
        np.testing.assert_array_equal(weight, resumed[name])


def test_a_full_gpu_is_one_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    write_params()
    run_all("prepare")
    monkeypatch.setattr("diffusion.training.loop.Trainer.step", full)
    result = run("train")
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("error: the GPU's memory is full")
    assert "lower train.micro_batch" in result.output


def test_a_finished_training_is_not_trained_again(finished: Path) -> None:
    """Also if what decides no weights has changed; DVC has deleted the outputs of a stage that it runs."""
    write_params(**{"tracking.experiment": "another"})
    weights = paths.MODEL.read_bytes()
    seconds = json.loads(paths.TRAIN_METRICS.read_text())["train_seconds"]
    paths.MODEL.unlink()
    paths.LOSS_CSV.unlink()
    run_all("train")
    assert paths.MODEL.read_bytes() == weights
    assert json.loads(paths.TRAIN_METRICS.read_text())["train_seconds"] == seconds
    assert len(paths.LOSS_CSV.read_text().splitlines()) == 5


@pytest.mark.parametrize("stage", ["prepare", "reference", "train", "sample", "evaluate"])
def test_a_missing_input_is_one_line_and_nothing_is_written(workspace: Path, stage: str) -> None:
    write_params()
    for path in (paths.CIFAR10_TRAIN, paths.CIFAR10_TEST):
        path.unlink()
    result = run(stage)
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert result.output.startswith("error: ")
    for path in (paths.PREPARED, paths.REFERENCE, paths.MODEL, paths.SAMPLES_NPZ, paths.EVALUATE_METRICS):
        assert not path.exists()


@pytest.mark.parametrize(
    "stage", ["download", "prepare", "weights", "reference", "train", "sample", "evaluate", "report"]
)
def test_a_bad_key_stops_every_stage_before_any_work(workspace: Path, stage: str) -> None:
    write_params()
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("  lr:", "  lrr:", 1))
    before = sorted(workspace.rglob("*"))
    result = run(stage)
    assert result.exit_code == 2
    assert result.output == "error: params.yaml: unknown key train.lrr: did you mean train.lr?\n"
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    "stage", ["download", "prepare", "weights", "reference", "train", "sample", "evaluate", "report"]
)
def test_help_says_what_a_stage_does(stage: str) -> None:
    result = run(stage, "--help")
    assert result.exit_code == 0
    assert "--params" in result.output
    assert len(result.output.split("Options:")[0].split()) > 8


@pytest.mark.slow
def test_the_pipeline_is_one_mlflow_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back through MLflow's own client; train, sample and evaluate run twice."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")  # must have no effect
    schedules = {"train.lr": 2e-3, "train.lr_schedule": "linear", "diffusion.schedule": "cosine"}
    write_params(**{"tracking.enabled": True, "tracking.experiment": "test", **schedules})
    run_all()
    run_all("train", "sample", "evaluate")
    client = MlflowClient(f"sqlite:///{paths.MLFLOW_DB}")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == json.loads(paths.MODEL_CARD.read_text())["run_id"]
    assert found.info.run_name == "lr2e-3-linear-cosine-v"
    assert json.loads(paths.MODEL_CARD.read_text())["name"] == found.info.run_name
    assert json.loads(paths.SAMPLES_CARD.read_text())["made_by"]["name"] == found.info.run_name
    expected = {"train.lr": "0.002", "model.channels": "16", "sample.num_images": "12", "evaluate.inception": "off"}
    assert expected.items() <= found.data.params.items()
    assert found.data.tags["data.digest"] == json.loads(paths.DATA_CARD.read_text())["digest"]
    trained = json.loads(paths.TRAIN_METRICS.read_text())
    assert found.data.metrics["best/val_loss"] == pytest.approx(trained["best_val_loss"])
    assert found.data.metrics["evaluate/fd_lite0_12"] == json.loads(paths.EVALUATE_METRICS.read_text())["fd_lite0_12"]
    with paths.LOSS_CSV.open() as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(p.step, p.value) for p in points] == [(step, pytest.approx(loss)) for step, loss in rows]
    folders = {
        "model": "model.safetensors",
        "samples": "grid.png",
        "curves": "loss.csv",
        "report": "loss.png",
        "": "params.yaml",
    }
    for folder, name in folders.items():
        assert (f"{folder}/" if folder else "") + name in {
            f.path for f in client.list_artifacts(found.info.run_id, folder)
        }
    pictures = [file.path.split("+") for file in client.list_artifacts(found.info.run_id, "images")]
    assert {(name, step) for name, _, step, *_ in pictures} >= {("images/samples", "4"), ("images/denoising", "4")}
    (data,) = found.inputs.dataset_inputs
    assert data.dataset.digest == found.data.tags["data.digest"][:36]
    version = client.get_model_version_by_alias("test", "champion")
    assert version.run_id == found.info.run_id
    assert float(version.tags["fd_lite0_12"]) == found.data.metrics["evaluate/fd_lite0_12"]

    def fail(*_: object) -> None:
        raise ValueError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("diffusion.pipeline.report.write_page", fail)
        with pytest.raises(ValueError, match="no room"):
            run("report")
    failed = client.get_run(found.info.run_id)
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "ValueError: no room")
    run_all("report")
    again = client.get_run(found.info.run_id)
    assert again.info.status == "FINISHED"
    assert "error" not in again.data.tags


def test_a_stage_with_another_clones_library_refuses(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment may be shared: what is installed in place is then the library of whoever installed it."""
    write_params()
    monkeypatch.setattr("stages.LIBRARY", workspace / "other/src/diffusion")
    result = run("prepare")
    assert result.exit_code == 2
    assert result.output == (
        f"error: this is a stage of {REPO} and the library of {workspace}/other/src/diffusion: set PYTHONPATH=src\n"
    )
    assert not paths.IMAGES.exists()
