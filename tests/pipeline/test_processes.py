"""Stages whose work several processes share, to the same result."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import run, run_all, write_params
from helpers.preloaded import Command
from helpers.worlds import in_world

from diffusion import params_file, paths
from diffusion.distributed import World
from diffusion.pipeline import evaluate, reference, sample

OVERRIDES = {"sample.sampler": "ddpm", "sample.batch_size": 4, "sample.num_images": 14}


@pytest.fixture
def trained(finished: Path) -> Path:
    write_params(**OVERRIDES)
    return finished


def samples() -> np.ndarray:
    with np.load(paths.SAMPLES_NPZ) as archive:
        return archive["images"]


def png_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (paths.SAMPLES / "png").iterdir()}


@pytest.mark.slow
def test_torchruns_workers_draw_the_same_images(trained: Path) -> None:
    """The stage as users start it."""
    run_all("sample")
    alone, files = samples(), png_files()
    shutil.rmtree(paths.SAMPLES)
    write_params(**OVERRIDES | {"sample.processes": 2})
    process = Command("stages.sample")
    said = process.wait()
    assert process.returncode == 0, said
    assert "1 of 2 processes" in said
    np.testing.assert_array_equal(samples(), alone)
    assert png_files() == files


@pytest.mark.parametrize("stage", ["reference", "train", "sample", "evaluate"])
def test_the_stages_that_share_their_work_are_launched(
    trained: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(f"stages.{stage}.launch", lambda *given: launched.append(given))
    section = "evaluate" if stage == "reference" else stage
    run(stage, f"--{section}.processes", "2")
    assert launched == [(2, f"stages.{stage}", [f"--{section}.processes", "2", "--params", "params.yaml"])]


def stages_of_a_rank(world: World, device: torch.device, folder: Path) -> None:
    """The three stages that ranks share, in a process of `in_world`, which has joined already."""
    os.chdir(folder)
    paths.RUNS = folder / "runs"
    for module in (sample, reference, evaluate):
        module.joined = lambda _: contextlib.nullcontext((world, device))  # type: ignore[attr-defined]
    params = params_file.load("params.yaml")
    sample.sample(params)
    reference.write_references(params)
    evaluate.evaluate(params)


def test_processes_share_the_work_to_the_same_result(trained: Path) -> None:
    """Gloo between them: images to the bit, moments to float64 rounding."""
    run_all("sample", "evaluate")
    alone, files, scores = samples(), png_files(), json.loads(paths.EVALUATE_METRICS.read_text())
    with np.load(paths.REFERENCE / "fd_lite0.npz") as archive:
        mean, cov = archive["mean"], archive["cov"]
    for path in (paths.SAMPLES, paths.REFERENCE):
        shutil.rmtree(path)
    paths.EVALUATE_METRICS.unlink()
    in_world(2, trained / "world", stages_of_a_rank, trained)
    np.testing.assert_array_equal(samples(), alone)
    assert png_files() == files
    with np.load(paths.REFERENCE / "fd_lite0.npz") as archive:
        np.testing.assert_allclose(archive["mean"], mean, rtol=1e-10, atol=1e-12)
        assert np.abs(archive["cov"] - cov).max() <= 1e-10 * np.abs(cov).max()
    shared = json.loads(paths.EVALUATE_METRICS.read_text())
    assert list(shared) == list(scores)
    for name in scores.keys() - {"about"}:
        assert shared[name] == pytest.approx(scores[name], rel=1e-6)
    assert shared["about"] == scores["about"]
