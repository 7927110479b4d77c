"""Tracking into real stores: what arrives in a SQLite file, read with sqlite3, is what the journal has."""

import itertools
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.stores import CONFIG, SECONDS, client_of, close_in_time, journal_points, open_run, stored_points, warnings

from diffusion.config import TrackingConfig
from diffusion.tracking import runs
from diffusion.tracking.journal import unsent

pytest.importorskip("mlflow")


class TestStore:
    def test_metric_history_equals_the_journal(self, database: Path, tmp_path: Path) -> None:
        tracker = open_run(tmp_path / "run")
        for step in range(1, 1301):  # more than one batch of 1,000 points
            tracker.metrics({"train/loss": math.sin(step) / 3, "train/lr": 1e-3 / step}, step)
        tracker.metrics({"train/loss": -1e-300, "best/val_loss": math.pi}, 1300)
        tracker.close("FINISHED")
        points = stored_points(database, tracker.run_id or "")
        assert len(points) == 2602
        assert points == journal_points(tmp_path / "run/journal.jsonl")

    def test_non_finite_values_arrive(self, database: Path, tmp_path: Path) -> None:
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"a": math.nan, "b": math.inf, "c": 1.0}, 1)
        tracker.close("FINISHED")
        (_, _, _, a), (_, _, _, b), (_, _, _, c) = stored_points(database, tracker.run_id or "")
        assert math.isnan(a)
        assert b == sys.float_info.max  # what MLflow makes of infinity
        assert c == 1.0

    def test_params_tags_and_files(self, database: Path, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(bytes(range(256)))
        (tmp_path / "figures/inner").mkdir(parents=True)
        (tmp_path / "figures/inner/x.png").write_bytes(b"png")
        tracker = open_run(tmp_path / "run", tags={"data.digest": "d1"})
        tracker.params(
            {"train.lr": 1.5e-3, "flip": True, "path": None, "sizes": [1, 2], "long": "x" * 7000, "t": "eps"}
        )
        tracker.params({f"many.{i}": i for i in range(250)})
        tracker.tags({"git.dirty": "false", "note": "y" * 9000})
        tracker.artifact(tmp_path / "model.bin", "model")
        tracker.artifact(tmp_path / "figures", "figures")
        tracker.close("FINISHED")
        client = client_of(database)
        run = client.get_run(tracker.run_id)
        params = run.data.params
        assert len(params) == 256
        assert {k: params[k] for k in ("train.lr", "flip", "path", "sizes", "t")} == {
            "train.lr": "0.0015",
            "flip": "true",
            "path": "null",
            "sizes": "[1, 2]",
            "t": "eps",
        }
        assert params["long"] == "x" * 6000
        tags = run.data.tags
        assert (tags["data.digest"], tags["git.dirty"], tags["host"]) == (
            "d1",
            "false",
            socket.gethostname(),
        )
        assert run.info.run_name == "lr1-test"
        assert client.get_experiment(run.info.experiment_id).name == "test experiment"
        stored = tmp_path / "ml artifacts" / run.info.run_id / "artifacts"
        assert (stored / "model/model.bin").read_bytes() == bytes(range(256))
        assert (stored / "figures/inner/x.png").read_bytes() == b"png"

    def test_environment_run_id_has_no_effect(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = client_of(database)
        other = client.create_run(client.create_experiment("other")).info
        monkeypatch.setenv("MLFLOW_RUN_ID", other.run_id)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", other.experiment_id)
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close("FINISHED")
        later = runs.attach(CONFIG, tracker.run_id, stage="sample", journal=tmp_path / "run/journal.jsonl")
        later.metrics({"fd": 2.0}, 1)
        later.close("FINISHED")
        assert tracker.run_id == later.run_id != other.run_id
        assert stored_points(database, other.run_id) == []
        assert [key for key, *_ in stored_points(database, tracker.run_id or "")] == ["fd", "loss"]
        assert client.get_run(other.run_id).info.status == "RUNNING"  # untouched

    def test_one_run_over_two_processes(self, database: Path, tmp_path: Path) -> None:
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"train/loss": 0.5}, 10)
        tracker.close("FINISHED")
        script = """
import sys
from pathlib import Path
from diffusion import paths
from diffusion.tracking import runs
from diffusion.config import TrackingConfig
assert "mlflow" not in sys.modules and "torch" not in sys.modules
paths.MLFLOW_DB, journal, run_id = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config = TrackingConfig(enabled=True, experiment="test experiment")
with runs.closing_status(runs.attach(config, run_id, stage="evaluate", journal=journal), "evaluate") as tracker:
    tracker.metrics({"fd_lite0": 400.25}, 10)
"""
        arguments = [str(database), str(tmp_path / "run/journal.jsonl"), str(tracker.run_id)]
        environment = {**os.environ, "MLFLOW_RUN_ID": "0" * 32}
        process = subprocess.run(
            [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert (process.returncode, process.stdout) == (0, "")
        assert process.stderr.startswith("tracking: MLFLOW_RUN_ID not used: a pipeline has its own run")
        assert process.stderr.count("\n") == 1
        points = stored_points(database, tracker.run_id or "")
        assert [(key, step, value) for key, step, _, value in points] == [
            ("fd_lite0", 10, 400.25),
            ("train/loss", 10, 0.5),
        ]
        assert points == journal_points(tmp_path / "run/journal.jsonl")
        assert unsent(tmp_path / "run/journal.jsonl") == []
        assert client_of(database).get_run(tracker.run_id).info.status == "FINISHED"

    def test_resumed_training_goes_on_with_its_run(self, database: Path, tmp_path: Path) -> None:
        client = client_of(database)
        first = open_run(tmp_path / "run")
        first.params({"a": 1})
        first.metrics({"loss": 1.0}, 1)
        first.close("FAILED", "out of memory")
        assert client.get_run(first.run_id).data.tags["error"] == "out of memory"
        second = open_run(tmp_path / "run", run_id=first.run_id, tags={"git.commit": "c2"})
        running = client.get_run(first.run_id)
        assert running.info.status == "RUNNING"
        assert running.data.tags["git.commit"] == "c2"
        assert "error" not in running.data.tags
        second.params({"a": 2, "b": 3})  # MLflow raises for the changed one
        second.metrics({"loss": 0.5}, 2)
        second.close("FINISHED")
        run = client.get_run(first.run_id)
        assert second.run_id == first.run_id
        assert run.data.params == {"a": "1", "b": "3"}
        assert [(step, value) for _, step, _, value in stored_points(database, run.info.run_id)] == [(1, 1.0), (2, 0.5)]
        assert len(client.search_runs([run.info.experiment_id])) == 1

    def test_what_a_later_stage_does_otherwise_is_a_tag(
        self, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """MLflow keeps a parameter's first value; the newest is beside it."""
        client, journal = client_of(database), tmp_path / "run/journal.jsonl"
        run_id = None
        for steps, lines in ((10, 0), (50, 1), (50, 0), (10, 1)):
            tracker = runs.attach(CONFIG, run_id, stage="sample", journal=journal)
            tracker.params({"sample.steps": steps, "sample.eta": 0.0})
            close_in_time(tracker)
            run_id = tracker.run_id
            run = client.get_run(run_id)
            assert run.data.params["sample.steps"] == "10"
            if lines or steps == 50:
                assert run.data.tags["now.sample.steps"] == str(steps)
            else:
                assert "now.sample.steps" not in run.data.tags
            assert "now.sample.eta" not in run.data.tags
            said = warnings(capsys)
            assert len(said) == lines
            assert all(f"sample.steps is {steps} now" in line for line in said)

    def test_a_resumed_training_logs_each_step_once(self, database: Path, tmp_path: Path) -> None:
        """Killed at step 9, it goes on from the checkpoint of step 5; before that it had been rolled back to 7."""
        values = itertools.count(0.5)  # of equal points, which have equal times too, MLflow keeps one
        first = open_run(tmp_path / "run")
        for step in (5, 6, 7, 8, 9, 10, 11, 8, 9):
            first.metrics({"train/loss": next(values), "system/load": next(values)}, step)
        close_in_time(first, "KILLED")
        second = open_run(tmp_path / "run")
        for step in (6, 7, 8, 9, 10, 11):
            second.metrics({"train/loss": next(values)}, step)
        second.metrics({"train/loss": next(values)}, 8)  # a rollback of its own
        second.metrics({"final/loss": 0.1}, 8)
        close_in_time(second)
        points = stored_points(database, second.run_id or "")
        assert points == journal_points(tmp_path / "run/journal.jsonl")
        steps = sorted(step for key, step, *_ in points if key == "train/loss")
        assert steps == [5, 6, 7, 8, 8, 8, 9, 9, 10, 10, 11, 11]
        assert sum(key == "final/loss" for key, *_ in points) == 1

    def test_a_run_that_ends_well_has_no_error(self, database: Path, tmp_path: Path) -> None:
        """Even if another process failed in it meanwhile."""
        tracker = open_run(tmp_path / "run")
        other = runs.attach(CONFIG, tracker.run_id, stage="sample", journal=tmp_path / "other/journal.jsonl")
        other.close("FAILED", "no room")
        client = client_of(database)
        assert client.get_run(tracker.run_id).data.tags["error"] == "no room"
        tracker.close("FINISHED")
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert "error" not in run.data.tags

    def test_another_experiment_is_for_new_runs(
        self, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = open_run(tmp_path / "run")
        close_in_time(first)
        assert warnings(capsys) == []
        other = TrackingConfig(enabled=True, experiment="another")
        later = runs.open_run(other, name="n", run_folder=tmp_path / "run")
        close_in_time(later)
        assert later.run_id == first.run_id
        (line,) = warnings(capsys)
        assert f"run {first.run_id} stays in experiment {CONFIG.experiment}; another is for new ones" in line

    def test_a_linked_run_says_which_model_it_is_of(self, database: Path, tmp_path: Path) -> None:
        card = {"name": "lr2e-3-cosine", "fingerprint": "f00d", "data_digest": "d1", "origin": {"git.commit": "c0ffee"}}
        journal = tmp_path / "journal.jsonl"
        tracker = runs.attach(CONFIG, "0" * 32, stage="sample", journal=journal, card=card)
        close_in_time(tracker)
        run = client_of(database).get_run(tracker.run_id)
        assert run.info.run_name == "lr2e-3-cosine"
        expected = {"git.commit": "c0ffee", "data.digest": "d1", "fingerprint": "f00d", "linked_run_id": "0" * 32}
        assert expected.items() <= run.data.tags.items()

    @pytest.mark.parametrize("lost", ["0" * 32, "not an id ' OR 1", "deleted"])
    def test_unknown_run_is_replaced_by_one_linked_run(self, database: Path, tmp_path: Path, lost: str) -> None:
        client = client_of(database)
        if lost == "deleted":
            lost = client.create_run(client.create_experiment("old")).info.run_id
            client.delete_run(lost)
        journal = tmp_path / "journal.jsonl"
        first = runs.attach(CONFIG, lost, stage="sample", journal=journal)
        first.close("FINISHED")
        run = client.get_run(first.run_id)
        assert first.run_id != lost
        assert run.data.tags["linked_run_id"] == lost
        second = runs.attach(CONFIG, lost, stage="evaluate", journal=journal)
        second.close("FINISHED")
        if lost.isalnum():
            assert second.run_id == first.run_id

    def test_experiment_made_by_another_process_meanwhile(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        theirs = client_of(database).create_experiment("test experiment")
        real = MlflowClient.get_experiment_by_name
        answers: Iterator[Callable[..., Any]] = iter([lambda *_: None])
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda *a: next(answers, real)(*a))
        tracker = open_run(tmp_path / "run")
        tracker.close("FINISHED")
        assert client_of(database).get_run(tracker.run_id).info.experiment_id == theirs

    @pytest.mark.slow
    def test_first_use_by_two_processes_at_once(self, database: Path, tmp_path: Path) -> None:
        new = tmp_path / "fresh/mlflow.db"
        new.parent.mkdir()
        shutil.copyfile(database, f"{new}.new")
        with closing(sqlite3.connect(f"{new}.new")) as torn:  # what a process left that was killed while it made tables
            torn.execute("DROP TABLE metrics")
        script = """
import sys
from pathlib import Path
from diffusion import paths
from diffusion.tracking import runs
from diffusion.config import TrackingConfig
paths.MLFLOW_DB, paths.MLFLOW_ARTIFACTS, folder = map(Path, sys.argv[1:])
config = TrackingConfig(enabled=True, experiment="test experiment")
with runs.closing_status(runs.open_run(config, name="n", run_folder=folder), "train") as tracker:
    tracker.metrics({"loss": 1.0}, 1)
"""
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(new), str(tmp_path / "files"), str(tmp_path / name)])
            for name in "ab"
        ]
        assert [process.wait(SECONDS) for process in processes] == [0, 0]
        client = client_of(new)
        (experiment,) = client.search_experiments(filter_string="name = 'test experiment'")
        runs = client.search_runs([experiment.experiment_id])
        assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"loss": 1.0})] * 2

    def test_moved_checkout_is_said_once(
        self, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        client_of(database).create_experiment("test experiment", artifact_location=(tmp_path / "old place").as_uri())
        (tmp_path / "f").write_text("x")
        tracker = open_run(tmp_path / "run")
        tracker.artifact(tmp_path / "f")
        tracker.close("FINISHED")
        (line,) = warnings(capsys)
        assert str(tmp_path / "old place") in line
        assert client_of(database).get_run(tracker.run_id).info.status == "FINISHED"
