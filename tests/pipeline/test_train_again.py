"""The train stage a second time: what it exports is the training's, whoever exports it when, and nothing is lost."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.commands import run, run_all, wait_for_checkpoint, write_params
from helpers.locked import interrupt, locked
from helpers.preloaded import Command

from diffusion import paths
from diffusion.tracking import runs
from diffusion.tracking.journal import JOURNAL, note, remembered, sessions
from diffusion.tracking.tracker import Tracker
from diffusion.training import checkpoint, previews


def commit(message: str) -> None:
    """Of the working folder, which becomes a repository."""
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *name, "commit", "-q", "--allow-empty", "-m", message], check=True)


def run_folder() -> Path:
    (folder,) = [path.parent for path in paths.RUNS.glob("*/identity.json")]
    return folder


def test_an_exported_model_is_the_trainings_whoever_exports_it(workspace: Path) -> None:
    """Another commit, device name, dvc.lock, micro-batch, and with no tracker: not a byte is another."""
    commit("one")
    write_params()
    run_all("prepare", "train")
    journal = run_folder() / JOURNAL
    note(journal, "run", [sessions(journal)[0].opened.session], run_id="a1b2")  # as `make sync` leaves it
    run_all("train")
    card, weights, metrics = paths.MODEL_CARD.read_bytes(), paths.MODEL.read_bytes(), paths.TRAIN_METRICS.read_bytes()
    assert json.loads(card)["run_id"] == "a1b2"
    assert re.fullmatch("[0-9a-f]{40}", json.loads(card)["origin"]["git.commit"])

    commit("two")
    Path("dvc.lock").write_text("another state\n")
    shutil.rmtree("models")
    write_params(**{"train.micro_batch": 2, "train.checkpoint_every": 5, "sample.steps": 3})
    run_all("train")
    assert paths.MODEL_CARD.read_bytes() == card
    assert paths.MODEL.read_bytes() == weights
    assert paths.TRAIN_METRICS.read_bytes() == metrics


def test_a_checkpoint_of_an_earlier_version_is_exported_too(workspace: Path) -> None:
    write_params()
    run_all("prepare", "train")
    weights, folder = paths.MODEL.read_bytes(), run_folder()
    state = checkpoint.latest(folder)
    assert state is not None
    del state["config"], state["origin"]
    for path in folder.glob("step_*.pt"):
        path.unlink()
    checkpoint.save(state, folder, 8)
    shutil.rmtree("models")
    run_all("train")
    assert paths.MODEL.read_bytes() == weights
    assert json.loads(paths.MODEL_CARD.read_text())["origin"]["device"].startswith("cpu")


def test_a_training_that_starts_anew_says_which_file_changed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params()
    run_all("prepare")
    assert "starts anew" not in run("train").output
    first = run_folder().name
    changed = {"training/loss.py": "edited"}
    whole = checkpoint.deciding.__globals__["code_digests"]
    monkeypatch.setattr("diffusion.training.identity.code_digests", lambda *a, **k: {**whole(*a, **k), **changed})
    output = run("train").output
    assert f"train: starts anew: since runs/{first} the code changed: training/loss.py\n" in output
    assert "starts anew" not in run("train").output  # it is finished now
    Path("requirements.lock").write_text("a pin\n")
    assert "requirements.lock changed since" in run("train").output


def test_no_tracker_a_journal_or_mlflow_give_the_same_bytes(
    workspace: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What code_digest.HARMLESS and HARMLESS_ROOMS say of tracking."""
    write_params()
    run_all("prepare")
    found = []
    for tracked in ("mlflow", "journal", "none"):
        with monkeypatch.context() as patch:
            if tracked == "none":
                patch.setattr(runs, "open_run", lambda *_, **__: Tracker())
            result = run("train", "--tracking.enabled", "true" if tracked == "mlflow" else "false")
        assert result.exit_code == 0, result.output
        folder = run_folder()
        assert bool(remembered(folder / JOURNAL)) == (tracked == "mlflow")
        assert (folder / "journal.jsonl").exists() == (tracked != "none")
        found.append((paths.MODEL.read_bytes(), paths.LOSS_CSV.read_bytes(), paths.VAL_LOSS_CSV.read_bytes()))
        shutil.rmtree(paths.RUNS)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("which", ["run", "workspace"])
def test_a_second_trainer_waits_and_finds_the_work_done(workspace: Path, which: str) -> None:
    write_params()
    run_all("prepare", "train")
    lock = {"run": run_folder() / "lock", "workspace": paths.TRAIN_LOCK}[which]
    weights = paths.MODEL.read_bytes()
    shutil.rmtree("models")
    with locked(lock):
        result = run("train")
    assert result.exit_code == 0
    assert "waiting for another process (" in result.output
    assert "resuming at step 8 of 8" in result.output
    assert paths.MODEL.read_bytes() == weights


def test_waiting_can_be_stopped(workspace: Path) -> None:
    write_params()
    run_all("prepare")
    with locked(paths.TRAIN_LOCK, then=interrupt):
        result = run("train")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert not paths.MODEL.exists()


def test_what_outlived_a_killed_dvc_is_waited_for(workspace: Path) -> None:
    """The first trainer is killed at last; the second goes on where it was."""
    write_params(**{"train.steps": 100_000, "train.preview_every": 100_000, "train.validate_every": 100_000})
    run_all("prepare")
    first = Command("stages.train")
    try:
        wait_for_checkpoint(3, first)
        second = Command("stages.train")
        second.wait_for(f"waiting for another process ({first.pid}), which is training the same\n")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second.wait_for("resuming at step")
    second.send_signal(signal.SIGINT)
    assert "stopped at step" in second.wait()


def test_previews_of_other_code_are_drawn_again_where_their_weights_are_there(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params()
    run_all("prepare", "train")
    old = {path.name: path.read_bytes() for path in paths.PREVIEWS.iterdir()}
    assert len(old) == 4
    drawn: list[int] = []
    write = previews.write_previews

    def noting(trainer: previews.Trainer) -> list[Path]:
        drawn.append(trainer.progress.step)
        return write(trainer)

    monkeypatch.setattr("diffusion.pipeline.train.write_previews", noting)
    assert "previews" not in run("train").output
    assert drawn == []

    monkeypatch.setattr(previews, "code_digests", lambda *_: {"sampling/samplers.py": "edited"})
    assert "train: previews of steps 4 stay as other code or params made them\n" in run("train").output
    assert drawn == [8]
    assert {path.name: path.read_bytes() for path in paths.PREVIEWS.iterdir()} == old  # the edit was none
    run_all("train")
    assert drawn == [8]

    run("train", "--train.preview_images", "5")
    assert drawn == [8, 8]
    name = "step_000008.png"
    assert (paths.PREVIEWS / name).read_bytes() != old[name]
    assert (paths.PREVIEWS / "step_000004.png").read_bytes() == old["step_000004.png"]
