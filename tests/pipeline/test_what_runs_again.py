"""DVC itself on the committed dvc.yaml: what an edit makes stale, what runs then, and what does not."""

import json
import time

import numpy as np
import pytest
from helpers.dvc_project import Project

pytestmark = pytest.mark.xdist_group("dvc")  # its project takes half a minute, for which another worker would wait

# What makes which stages stale by itself; those after them run if what they read has changed.
EDITS = {
    "src/diffusion/tracking/journal.py": set(),
    "src/diffusion/serving/registry.py": set(),
    "src/diffusion/locks.py": set(),
    "src/diffusion/rules.py": set(),
    "src/diffusion/config.py": set(),
    "src/diffusion/report/figures.py": {"report"},
    "src/diffusion/training/loss.py": {"train"},
    "src/diffusion/model/unet.py": {"train", "sample", "report"},
    "src/diffusion/sampling/samplers.py": {"train", "sample", "report"},
    "src/diffusion/metrics/frechet.py": {"reference", "train", "evaluate", "report"},
    "requirements.lock": {"reference", "train", "sample", "evaluate"},
    "data/weights.json": {"weights", "reference", "evaluate"},  # another answer of `make weights`
}
PARAMS = {
    ("sample.num_images", 14): {"sample"},
    ("train.lr", 1e-3): {"train"},
    ("evaluate.reference_split", "test"): {"reference", "evaluate"},
    ("tracking.experiment", "another"): {"train", "sample", "evaluate", "report"},
}


def test_a_second_repro_runs_no_stage(project: Project) -> None:
    assert project.repro() == set()


def test_what_is_stale_after_an_edit(project: Project) -> None:
    found = {}
    for name in EDITS:
        with project.changed(name, "# edited\n"):
            found[name] = project.stale()
    assert found == EDITS
    assert project.stale() == set()


def test_what_is_stale_with_another_value(project: Project) -> None:
    found = {}
    for key, value in PARAMS:
        with project.changed("params.yaml"):
            project.set(**{key: value})
            found[key, value] = project.stale()
    assert found == PARAMS


def test_scores_and_pages_are_shown(project: Project) -> None:
    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert shown["metrics/evaluate.json"]["data"]["fd_lite0_12"] > 0
    assert shown["metrics/train.json"]["data"]["images_seen"] == 16
    assert "fd_lite0_12" in project.dvc("metrics", "diff", "HEAD~1")

    said = project.dvc("plots", "show", "--out", "pages")
    assert "failed to load" not in said
    page = (project.folder / "pages/index.html").read_text()
    assert "loss_smoothed" in page
    assert any((project.folder / "pages").rglob("*.png"))
    assert "val_loss" in (project.folder / "plots/val_loss.csv").read_text()


@pytest.mark.slow
def test_what_depends_on_a_change_runs(project: Project) -> None:
    """One test, because each step starts from the state that the one before left."""
    weights = (project.folder / "models/model.safetensors").read_bytes()
    project.set(**{"sample.num_images": 14, "tracking.experiment": "another"})
    project.edit("src/diffusion/training/loss.py", "# a comment\n")
    assert project.repro("sample") == {"train", "sample"}
    assert len(project.trainings()) == 1  # DVC sees a changed file, the stage a finished training
    with np.load(project.folder / "samples/images.npz") as archive:
        assert len(archive["images"]) == 14

    project.edit("src/diffusion/model/unet.py", "EDITED = True\n")
    assert project.repro("train") == {"train"}
    assert len(project.trainings()) == 2
    assert (project.folder / "models/model.safetensors").read_bytes() == weights  # trained anew, to the same bits


@pytest.mark.slow
def test_a_queued_experiment_runs_the_code_that_was_queued(project: Project) -> None:
    project.dvc("exp", "run", "--queue", "--name", "queued", "-S", "train.lr=0.003")
    project.edit("src/diffusion/training/loss.py", "raise SystemExit('edited since')\n")
    project.dvc("queue", "start")
    deadline = time.monotonic() + 240
    while "Success" not in (status := project.dvc("queue", "status")):
        assert "Failed" not in status, project.dvc("queue", "logs", "queued")
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert "edited since" in project.dvc("repro", "train", check=False)  # which the workspace's own run does
