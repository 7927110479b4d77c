"""The real train stage while a real `mlflow server` dies, hangs or is not there: nothing is lost, nothing doubled."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import run, write_params
from helpers.stores import (
    client_of,
    close_in_time,
    free_port,
    journal_points,
    open_run,
    server,
    stored_points,
    sync,
    wait_for,
    warnings,
)

from diffusion import paths
from diffusion.config import TrackingConfig
from diffusion.pipeline import train
from diffusion.tracking import mlflow_copy, mlflow_store, mlflow_writer, runs
from diffusion.tracking.journal import remembered

pytest.importorskip("mlflow")

STEPS, MIDDLE = 40, 20
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def impatient(workspace: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(mlflow_copy, "MAX_PAUSE_SECONDS", 0.2)
    every = {"log_every": 1, "validate_every": 10, "preview_every": STEPS, "checkpoint_every": STEPS}
    write_params(**{"tracking.enabled": True, "train.steps": STEPS, **{f"train.{k}": v for k, v in every.items()}})
    assert run("prepare").exit_code == 0


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `act` happen in the training, before what is logged of `step`."""
    real = train._show

    def show(record: Any, *args: Any) -> None:
        if record.step == step:
            act()
        real(record, *args)

    monkeypatch.setattr(train, "_show", show)


def in_close(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `act` happen after the first points that are written while the run is being closed."""
    monkeypatch.setattr(mlflow_copy, "GATHER_SECONDS", 1000.0)  # all waits for the end
    monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 60.0)  # until there was something to see
    monkeypatch.setattr(mlflow_copy, "POINTS_PER_BATCH", 100)
    real = mlflow_writer.RunWriter.write

    def send(self: Any, batch: Any) -> None:
        real(self, batch)
        if batch[0].kind == "metrics":
            act()
            monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 1.0)

    monkeypatch.setattr(mlflow_writer.RunWriter, "write", send)


def trained() -> tuple[str, Path]:
    """The stage itself: its output, and the journal that it left."""
    result = run("train")
    assert result.exit_code == 0, result.output
    (journal,) = paths.RUNS.glob("*/journal.jsonl")
    return result.output, journal


def check(database: Path, journal: Path, served: Path) -> None:
    """The store holds one run with exactly the journal's points, the stage's files and its end."""
    client = client_of(database)
    experiment = client.get_experiment_by_name("cifar10-diffusion")
    (found,) = client.search_runs([experiment.experiment_id])
    points = stored_points(database, found.info.run_id)
    assert points == journal_points(journal)
    assert len({point[:2] for point in points}) == len(points)  # no (key, step) twice
    assert sum(key == "train/loss" for key, *_ in points) == STEPS
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == str(STEPS)
    assert next(served.rglob("model/model.safetensors")).read_bytes() == paths.MODEL.read_bytes()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before the first batch", marks=pytest.mark.slow),
        "in the middle",
        pytest.param("during close", marks=pytest.mark.slow),
    ],
)
def test_a_server_is_killed(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    served, port = tmp_path / "served", free_port()  # a server comes back where it was
    with server(database, served, port=port, command=moment == "in the middle") as (uri, kill):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

        def arrived(points: int) -> bool:
            (journal,) = paths.RUNS.glob("*/journal.jsonl")
            return len(stored_points(database, remembered(journal) or "")) >= points

        def kill_in_the_middle() -> None:
            wait_for(lambda: arrived(MIDDLE))
            kill()

        with monkeypatch.context() as patch:
            if moment == "before the first batch":
                at_step(1, kill, patch)
            elif moment == "in the middle":
                at_step(MIDDLE, kill_in_the_middle, patch)
            else:
                in_close(kill, patch)
            said, journal = trained()
    run_id = remembered(journal)
    assert run_id
    stored = stored_points(database, run_id)
    assert (len(stored) == 0) == (moment == "before the first batch")
    assert set(stored) < set(journal_points(journal))
    lines = [line for line in said.splitlines() if line.startswith("tracking:")]
    assert len(lines) == 2, lines  # the outage, and what is left
    assert re.search(r"events did not reach MLflow run \w+", lines[1])
    with server(database, served, port=port) as (uri, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        if moment == "in the middle":  # the next stage sends it, or `make sync`
            monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 60.0)
            tracker = runs.attach(
                TrackingConfig(enabled=True, experiment="cifar10-diffusion"), run_id, stage="sample", journal=journal
            )
            tracker.close("FINISHED")
        else:
            assert sync(journal).startswith("sent")
        check(database, journal, served)
        assert sync(journal) == "up to date"
        lines = [line for line in journal.read_text().splitlines(keepends=True) if '"sent"' not in line]
        journal.write_text("".join(lines))  # as a power cut may leave it
        assert sync(journal).startswith("sent")  # again, which changes nothing
        check(database, journal, served)


@pytest.mark.slow
def test_a_server_hangs(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers; awake again, it also does what it was asked meanwhile."""
    served = tmp_path / "served"
    with server(database, served) as (uri, send):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with monkeypatch.context() as patch:
            at_step(MIDDLE, lambda: send(signal.SIGSTOP), patch)
            said, journal = trained()
        send(signal.SIGCONT)
        lines = [line for line in said.splitlines() if line.startswith("tracking:")]
        assert len(lines) <= 2, lines
        assert "events did not reach MLflow" in lines[-1]
        client = mlflow_store.connect()
        assert sync(journal, client).startswith("sent")
        check(database, journal, served)


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["write", "_upload"])
def test_a_slow_server_is_waited_for(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slow: str,
) -> None:
    """A backlog of calls that take 2 s each, or a file that takes 7: it answers /health all the time."""
    monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 5.0)
    real, seconds = getattr(mlflow_writer.RunWriter, slow), {"write": 2, "_upload": 7}[slow]

    def late(self: Any, given: Any) -> None:
        time.sleep(seconds)
        real(self, given)

    journal = tmp_path / "run/journal.jsonl"
    (tmp_path / "f").write_text("a file")
    with server(database, tmp_path / "served") as (uri, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setattr(mlflow_writer.RunWriter, slow, late)
        tracker = open_run(tmp_path / "run")
        tracker.artifact(tmp_path / "f", "notes")
        for step in range(4):
            tracker.metrics({"loss": 1.0}, step)
            tracker.tags({f"tag {step}": "x"})
        close_in_time(tracker)
        assert sync(journal) == "up to date"
    assert stored_points(database, tracker.run_id or "") == journal_points(journal)
    assert [p.read_text() for p in (tmp_path / "served").rglob("notes/f")] == ["a file"]
    assert ["waiting for MLflow" in line for line in warnings(capsys)] == [True] * (slow == "_upload")
