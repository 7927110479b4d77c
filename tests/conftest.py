"""Shrunk settings and tiny data that the tests share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.cifar10_world import world as world  # a fixture
from helpers.misbehaving import serve as serve  # a fixture
from helpers.project import REPO, TINY
from helpers.studies import place as place  # a fixture

from diffusion import config, params_file, paths
from diffusion.data.dataset import Dataset
from diffusion.tracking import mlflow_tracker


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The suite passes without a network: what downloads runs only when it is asked for."""
    if "network" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="downloads packages: ask for it with -m network"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """pytest-xdist runs a worker a core; the MLflow store and DVC stay away from the repository."""
    torch.set_num_threads(1)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture
def tiny() -> Callable[..., config.Params]:
    """Load params.yaml, shrunk, with further overrides by dotted key."""

    def make(recipe: str = "params.yaml", **overrides: Any) -> config.Params:
        return params_file.load(REPO / recipe, {**TINY, **overrides})

    return make


@pytest.fixture
def tiny_data() -> Dataset:
    """40 training and 12 validation images of smooth random colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (52, 4, 4, 3), dtype=np.uint8)
    images = torch.from_numpy(coarse.repeat(8, axis=1).repeat(8, axis=2))
    return Dataset(images, torch.arange(40), torch.arange(40, 52), "tiny", torch.arange(52) % 10)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with downloaded images: 60 for training, 30 for testing."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUNS", "WEIGHTS", "DOWNLOADS", "MLFLOW_DB", "MLFLOW_ARTIFACTS"):
        monkeypatch.setattr(paths, name, tmp_path / getattr(paths, name).relative_to(paths.ROOT))
    rng = np.random.default_rng(0)
    paths.CIFAR10.mkdir(parents=True)
    for path, count in ((paths.CIFAR10_TRAIN, 60), (paths.CIFAR10_TEST, 30)):
        coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        np.savez(path, images=coarse.repeat(8, 1).repeat(8, 2), labels=np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes seconds, copying them does not: once a session, for all of its worker processes."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    path = (tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.mktemp("mlflow")) / "empty.db"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("MLFLOW_") and name not in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL"):
            monkeypatch.delenv(name)
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_database, path)
    monkeypatch.setattr(paths, "MLFLOW_DB", path)
    monkeypatch.setattr(paths, "MLFLOW_ARTIFACTS", tmp_path / "ml artifacts")
    monkeypatch.setattr(mlflow_tracker, "GATHER_SECONDS", 0.02)
    return path
