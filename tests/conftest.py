"""Shrunk settings and tiny data that the tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import isolation
from helpers.cifar10_world import world as world  # a fixture
from helpers.commands import run_all, write_params
from helpers.dvc_project import project as project  # a fixture
from helpers.dvc_project import reproduced as reproduced  # a fixture
from helpers.misbehaving import serve as serve  # a fixture
from helpers.project import REPO, TINY, write_images
from helpers.studies import place as place  # a fixture

from diffusion import config, params_file, paths
from diffusion.data.dataset import Dataset
from diffusion.tracking import mlflow_copy


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The suite passes without a network: what downloads runs only when it is asked for."""
    if "network" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="downloads packages: ask for it with -m network"))


BEFORE = pytest.StashKey[isolation.State]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(
        session.config, "workerinput"
    ):  # pytest-xdist's workers start and end within the controller's session
        session.config.stash[BEFORE] = isolation.snapshot()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The session fails if anything in the repository's folder is not as it was."""
    if BEFORE in session.config.stash:
        changed = isolation.differences(session.config.stash[BEFORE], isolation.snapshot())
        if changed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print("", "The tests did not leave the repository alone:", *changed, sep="\n")


@pytest.fixture(scope="session", autouse=True)
def _session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where fixtures work that several tests share."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        isolation.enter(tmp_path_factory.mktemp("session"), patch)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own with a store of its own, whatever the repository's folder holds."""
    isolation.enter(tmp_path, monkeypatch)


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
def workspace(tmp_path: Path) -> Path:
    """An empty project folder with downloaded images: 60 for training, 30 for testing."""
    write_images(paths.CIFAR10)
    return tmp_path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)` is a folder that `make(folder)` filled, once a session for all of its worker processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed half way
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def finished_once(once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            isolation.enter(folder, patch)
            write_images(paths.CIFAR10)
            write_params()
            run_all()

    return once("finished", make)


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A project folder in which every stage has run: params.yaml, shrunk, without MLflow."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(once: Callable[..., Path]) -> Path:
    """Creating the tables takes seconds, copying them does not."""

    def make(folder: Path) -> None:
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    return once("empty database", make) / "mlflow.db"


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copyfile(empty_database, paths.MLFLOW_DB)
    monkeypatch.setattr(paths, "MLFLOW_ARTIFACTS", tmp_path / "ml artifacts")
    monkeypatch.setattr(mlflow_copy, "GATHER_SECONDS", 0.02)
    return paths.MLFLOW_DB
