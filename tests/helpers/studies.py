"""Searches for tests: a project folder, its tables, trials that are stopped. Trainings are real, scores a formula."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fast_trials

from diffusion import config, paths
from diffusion.data.dataset import Dataset
from diffusion.metrics.reference import Reference
from diffusion.training import loop
from diffusion.training.loop import Trainer
from diffusion.training.progress import Record
from diffusion.tuning import search, trial
from diffusion.tuning.storage import storage_url
from diffusion.tuning.trial import Attempt

SPACE = {
    "train.lr": {"low": 2e-4, "high": 5e-3, "log": True},
    "train.lr_schedule": ["constant", "cosine", "linear"],
    "diffusion.schedule": ["linear", "cosine", "sigmoid"],
}
TUNE = {
    "tracking.enabled": False,
    "tune.images_per_trial": 32,
    "tune.sample_images": 4,
    "tune.trials": 3,
    "tune.workers": 1,
    "tune.pruner": "none",
    "tune.space": SPACE,
}


class StubExtractor:
    metric = "fd_lite0"

    def __init__(self, precision: str = "fp32") -> None:
        """In the place of EfficientNetLite0."""

    def describe(self) -> dict[str, str]:
        return {"name": "stub"}


@pytest.fixture
def place(tmp_path: Path, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a reference; the score is a formula of the setting, least at lr 1e-3."""
    monkeypatch.setattr(Dataset, "load", lambda: tiny_data)
    monkeypatch.setattr(search, "EfficientNetLite0", StubExtractor)
    monkeypatch.setattr(trial, "EfficientNetLite0", StubExtractor)
    monkeypatch.setattr(trial.Trainings, "_score", formula)
    monkeypatch.setattr(search, "plot_figures", lambda study: None)  # seconds; they have a test of their own
    write_reference(images=20)
    return tmp_path


def write_reference(images: int) -> None:
    key = {"split": "train", "images": images, "extractor": {"name": "stub"}}
    Reference(np.zeros(2), np.eye(2), key).save(paths.REFERENCE / "fd_lite0.npz")


def formula(_: object, trainer: Trainer, attempt: Attempt, *rest: Any) -> float:
    assert trainer.progress.step == trainer.config.train.steps, "scored before the training's end"
    return fast_trials.value(trainer.config.train.lr, trainer.config.diffusion.schedule)


def table() -> list[dict[str, str]]:
    with paths.TRIALS_CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def states() -> list[str]:
    return [row["state"] for row in table()]


def studies() -> list[str]:
    import optuna

    return optuna.get_all_study_names(f"sqlite:///{paths.OPTUNA_DB}")


def name_of(params: config.Params) -> str:
    reference = Reference.load(paths.REFERENCE / "fd_lite0.npz", {"name": "stub"})
    return search.study_name(params, Dataset.load().identity, reference)


def stop_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes after the fifth step of trial number `trials` (from 0) of the search."""
    seen: list[Path] = []

    def interrupted(trainer: Trainer) -> Iterator[Record]:
        seen.append(trainer.folder)
        for record in loop.train(trainer):
            if len(seen) > trials and record.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    monkeypatch.setattr(trial, "train", interrupted)


def search_at_once(params: config.Params) -> None:
    """`search.tune` without trainings: the study that it would have, steps that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_trials, "SECONDS", 0.0)
        search.search(name_of(params), params, storage_url(params.tune), fast_trials.prepare)


def fast_trials_at_once(params: config.Params) -> Callable[[Attempt], float]:
    return lambda attempt: 1.0
