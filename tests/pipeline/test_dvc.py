"""DVC itself on the committed dvc.yaml: what re-runs, what does not, and what a killed run leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, TINY
from ruamel.yaml import YAML

from diffusion import config
from diffusion.metrics.selftest import random_weights

pytestmark = pytest.mark.slow


def ran(said: str) -> set[str]:
    """Stages that DVC says it runs."""
    return set(re.findall(r"Running stage '(\w+)'", said))


class Project:
    """A git clone of the working tree with tiny images and shrunk params, where `dvc` runs as users run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
        )
        for name in tracked.stdout.splitlines():
            if (REPO / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        tree = config.to_dict(config.load(REPO / "params.yaml", {**TINY, "train.steps": 4, "tracking.enabled": False}))
        YAML().dump(tree, folder / "params.yaml")
        rng = np.random.default_rng(0)
        (folder / "data/cifar10").mkdir(parents=True)
        for split, count in (("train", 60), ("test", 30)):
            coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            np.savez(folder / f"data/cifar10/{split}.npz", images=coarse.repeat(8, 1).repeat(8, 2), labels=labels)
        self.git("init", "-q")
        for key, value in (("user.name", "t"), ("user.email", "t@example.org")):  # `dvc exp apply` wants them too
            self.git("config", key, value)
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.dvc("commit", "-f", "download")  # stands for a download: the real digests cannot be had from tiny images

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def dvc(self, *arguments: str, check: bool = True) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dvc", *arguments]
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    def repro(self) -> set[str]:
        """Stages that ran, besides the one that looks for weights every time."""
        found = ran(self.dvc("repro"))
        assert "weights" in found
        return found - {"weights"}

    def set(self, **values: Any) -> None:
        path = self.folder / "params.yaml"
        tree = YAML().load(path)
        for key, value in values.items():
            section, name = key.split("__")
            tree[section][name] = value
        YAML().dump(tree, path)

    def edit(self, module: str) -> None:
        path = self.folder / f"src/diffusion/{module}.py"
        path.write_text(path.read_text() + "\n# edited\n")


ALL = {"prepare", "reference", "train", "sample", "evaluate", "report"}


@pytest.fixture(scope="module")
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    if "PYTEST_XDIST_WORKER" in os.environ:  # else each worker makes a project, and the tests lose their order
        assert all(item.nodeid.endswith("@dvc") for item in request.session.items if item.path == request.path)
    made = Project(tmp_path_factory.mktemp("project"))
    assert made.repro() == ALL
    return made


@pytest.mark.xdist_group("dvc")
def test_what_runs_again(project: Project) -> None:
    """One test, because each step starts from the state that the one before left."""
    assert project.repro() == set()

    project.set(sample__num_images=14)
    assert project.repro() == {"sample", "evaluate", "report"}
    with np.load(project.folder / "samples/images.npz") as archive:
        assert len(archive["images"]) == 14

    project.edit("figures")
    assert project.repro() == {"report"}

    weights = (project.folder / "models/model.safetensors").read_bytes()
    project.edit("unet")
    assert {"train", "sample", "evaluate"} <= project.repro()
    assert len(list((project.folder / "runs").glob("*/lock"))) == 2  # another fingerprint, another run folder
    assert (project.folder / "models/model.safetensors").read_bytes() == weights  # trained anew, to the same bits

    project.set(evaluate__reference_split="test")
    assert project.repro() == {"reference", "evaluate", "report"}

    random_weights(project.folder / "mine.pth")
    project.set(evaluate__inception="auto", evaluate__inception_weights="mine.pth", evaluate__inception_images=12)
    project.set(evaluate__measures=["kid"])
    assert project.repro() == {"reference", "evaluate", "report"}
    assert project.repro() == set()
    random_weights(project.folder / "mine.pth", seed=1)  # under the same name
    assert project.repro() == {"reference", "evaluate", "report"}
    project.set(evaluate__inception="off", evaluate__measures=["frechet"])
    assert project.repro() == {"reference", "evaluate", "report"}

    project.set(tracking__experiment="another")  # the stage runs, but the finished training is not repeated
    assert "train" in project.repro()
    assert "reference" not in project.repro()


@pytest.mark.xdist_group("dvc")
def test_metrics_plots_and_experiments(project: Project) -> None:
    with np.load(project.folder / "samples/images.npz") as archive:
        score = f"fd_lite0_{len(archive['images'])}"
    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert shown["metrics/evaluate.json"]["data"][score] > 0
    assert shown["metrics/train.json"]["data"]["images_seen"] == 16
    assert score in project.dvc("metrics", "diff", "HEAD")

    project.dvc("plots", "show", "--out", "pages")
    page = (project.folder / "pages/index.html").read_text()
    assert "loss_smoothed" in page
    assert any((project.folder / "pages").rglob("*.png"))

    assert "val_loss" in (project.folder / "plots/val_loss.csv").read_text()
    ran = project.dvc("exp", "run", "-n", "faster", "-S", "train.lr=0.003")
    assert "Running stage 'train'" in ran
    table = project.dvc("exp", "show", "--csv")
    assert "faster" in table
    assert "0.003" in table


@pytest.mark.xdist_group("dvc")
def test_a_misspelt_key_stops_the_run(project: Project) -> None:
    said = project.dvc("exp", "run", "-S", "+train.lrr=0.002", check=False)
    assert "unknown key train.lrr: did you mean train.lr?" in said
    assert "Traceback" not in said
