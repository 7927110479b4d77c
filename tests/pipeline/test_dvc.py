"""DVC itself on the committed dvc.yaml: what re-runs, what does not, and what a killed run leaves."""

import json
import os

import numpy as np
import pytest
from helpers.dvc_project import Project

from diffusion.metrics.selftest import random_weights

pytestmark = pytest.mark.slow


ALL = {"prepare", "weights", "reference", "train", "sample", "evaluate", "report"}


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
