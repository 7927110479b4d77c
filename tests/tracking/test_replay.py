"""What MLflow missed reaches it later, once each, and runs of dead processes are closed; against real stores."""

import math
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers.preloaded import Command
from helpers.stores import (
    CONFIG,
    client_of,
    close_in_time,
    journal_points,
    open_run,
    stored_points,
    sync,
)

from diffusion.config import TrackingConfig
from diffusion.tracking import mlflow_copy, mlflow_store, runs
from diffusion.tracking.journal import is_written, remembered, sessions
from diffusion.tracking.mlflow_writer import RunWriter

pytest.importorskip("mlflow")


def refuse(*_: Any, **__: Any) -> None:
    raise LookupError("never")


class TestReplay:
    """What the store missed reaches it later, exactly once."""

    def test_the_next_stage_sends_what_an_absent_server_missed(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        tracker = open_run(tmp_path / "run")
        tracker.params({"train.lr": 0.1})
        for step in range(50):
            tracker.metrics({"loss": math.cos(step)}, step)
        close_in_time(tracker)
        assert tracker.run_id is None
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        journal = tmp_path / "run/journal.jsonl"
        later = runs.attach(CONFIG, None, stage="sample", journal=journal)
        later.metrics({"sample/seconds": 3.0}, 50)
        close_in_time(later)
        assert stored_points(database, later.run_id or "") == journal_points(journal)
        run = client_of(database).get_run(later.run_id)
        assert run.data.params["train.lr"] == "0.1"
        assert run.info.status == "FINISHED"
        again = runs.attach(CONFIG, None, stage="evaluate", journal=journal)
        close_in_time(again)
        assert again.run_id == later.run_id  # remembered beside the journal

    @pytest.mark.parametrize("by", ["the next stage", "sync"])
    def test_the_run_is_named_and_tagged_as_the_training_was(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
    ) -> None:
        """The server was away during two sessions of it; the later one is of another commit."""
        journal = tmp_path / "run/journal.jsonl"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        for commit in ("c1", "c2"):
            close_in_time(open_run(tmp_path / "run", tags={"git.commit": commit, f"only.{commit}": "x"}))
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        if by == "sync":
            assert sync(journal) == "sent 2 events"
            run_id = remembered(journal)
        else:
            later = runs.attach(CONFIG, None, stage="sample", journal=journal)
            close_in_time(later)
            run_id = later.run_id
        run = client_of(database).get_run(run_id)
        assert run.info.run_name == "lr1-test"
        assert {"git.commit": "c2", "only.c1": "x", "only.c2": "x"}.items() <= run.data.tags.items()

    def test_sync_makes_one_run_of_sessions_without_any(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        journal = tmp_path / "run/journal.jsonl"
        for value in (1.0, 2.0):
            tracker = open_run(tmp_path / "run")
            tracker.metrics({"loss": value}, int(value))
            close_in_time(tracker)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        sync(journal)
        run_id = remembered(journal)
        assert stored_points(database, run_id) == journal_points(journal)
        client = client_of(database)
        experiment = client.get_experiment_by_name(CONFIG.experiment)
        assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [run_id]
        assert client.get_run(run_id).info.run_name == "lr1-test"

    def fail_while_sending(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A session whose store goes away after its run was opened: the run's id."""

        def down(*_: Any) -> None:
            raise ConnectionError("nobody there")

        with monkeypatch.context() as patch:
            patch.setattr(mlflow_copy, "CLOSE_SECONDS", 0.2)
            patch.setattr(RunWriter, "write", down)
            tracker = open_run(folder)
            for step in range(20):
                tracker.metrics({"loss": float(step)}, step)
            close_in_time(tracker)
        assert tracker.run_id
        return tracker.run_id

    @pytest.mark.parametrize("deleted", [True, False])
    def test_a_store_that_does_not_know_the_run_is_sent_nothing(
        self,
        database: Path,
        empty_database: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        deleted: bool,
    ) -> None:
        journal, other = tmp_path / "run/journal.jsonl", tmp_path / "other.db"
        shutil.copyfile(empty_database, other)
        run_id = self.fail_while_sending(tmp_path / "run", monkeypatch)
        if deleted:
            client_of(database).delete_run(run_id)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
        said = sync(journal)
        assert said == f"not sent: this store has no run {run_id} (is MLFLOW_TRACKING_URI set?)"
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if deleted:
            client_of(database).restore_run(run_id)
        assert sync(journal) == "sent 21 events"
        assert stored_points(database, run_id) == journal_points(journal)

    def test_refused_events_are_not_counted_as_sent(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        journal = tmp_path / "run/journal.jsonl"
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"good": 1.0}, 1)
        tracker.metrics({"bad$name": 1.0}, 1)
        close_in_time(tracker)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        client = mlflow_store.connect()
        with monkeypatch.context() as patch:
            patch.setattr(type(client), "log_batch", refuse)
            patch.setattr(type(client), "set_terminated", refuse)
            assert sync(journal, client) == "not sent: MLflow refuses every event"
        assert sync(journal, client) == "sent 2 events, 1 were refused"
        assert sync(journal, client) == "up to date"


class TestDeadRuns:
    def start(self, name: str) -> tuple[Command, str]:
        process = Command("helpers.unfinished", name)
        process.wait_for("\n")
        return process, process.said.split()[0]

    def test_the_run_of_a_killed_process_is_closed_by_the_next_one_and_gone_on_with_by_its_own(
        self, database: Path, tmp_path: Path
    ) -> None:
        """And that of a process which is alive is left alone."""
        (dead, dead_id), (alive, alive_id) = self.start("runs/dead"), self.start("runs/alive")
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        client = client_of(database)

        def states() -> list[str]:
            return [client.get_run(run_id).info.status for run_id in (dead_id, alive_id)]

        assert states() == ["RUNNING", "RUNNING"]
        close_in_time(open_run(tmp_path / "runs/other"))
        assert states() == ["KILLED", "RUNNING"]
        again = open_run(tmp_path / "runs/dead")
        assert again.run_id == dead_id
        assert states() == ["RUNNING", "RUNNING"]
        close_in_time(again)
        assert states() == ["FINISHED", "RUNNING"]
        assert stored_points(database, dead_id) == journal_points(tmp_path / "runs/dead/journal.jsonl")
        alive.send_signal(signal.SIGKILL)
        alive.wait()

    def test_a_journal_is_written_until_its_process_ends(self, database: Path, tmp_path: Path) -> None:
        """Whatever the number of that process and the name of its machine: the system lets go of its lock."""
        journal = tmp_path / "run/journal.jsonl"
        process, run_id = self.start("run")
        assert is_written(journal)
        assert sync(journal) == "in use: its process sends it"
        beside = runs.attach(CONFIG, run_id, stage="sample", journal=journal)  # takes nothing of what goes on
        close_in_time(beside)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_written(journal)
        assert [session.is_closed for session in sessions(journal)] == [False, True]
        assert sync(journal).startswith("sent")
        assert [session.sent for session in sessions(journal)] == [True, True]
        assert client_of(database).get_run(run_id).info.status == "KILLED"


class TestPrivate:
    """What was recorded with tracking.enabled: false is for this machine only, whoever asks later."""

    def test_it_is_never_sent(self, database: Path, tmp_path: Path) -> None:
        journal = tmp_path / "run/journal.jsonl"
        off = TrackingConfig(enabled=False, experiment=CONFIG.experiment)
        private = runs.open_run(off, name="secret", run_folder=tmp_path / "run")
        private.metrics({"loss": 1.0}, 1)
        private.close("FINISHED")
        said = sync(journal)
        assert said == "up to date, but for what was recorded with tracking.enabled: false, which stays here"
        assert client_of(database).get_experiment_by_name(CONFIG.experiment) is None
        later = runs.attach(CONFIG, None, stage="sample", journal=journal)
        later.metrics({"sample/seconds": 2.0}, 1)
        close_in_time(later)
        assert [key for key, *_ in stored_points(database, later.run_id or "")] == ["sample/seconds"]
        assert client_of(database).get_run(later.run_id).info.run_name == "sample"


def test_runs_of_other_folders_are_left_alone(database: Path, tmp_path: Path) -> None:
    """Another machine's, or another container's of the same name and process numbers: their journals are not here."""
    client = client_of(database)
    tags = {"host": socket.gethostname(), "pid": "1"}
    run = client.create_run(client.create_experiment(CONFIG.experiment), tags=tags).info.run_id
    close_in_time(open_run(tmp_path / "run"))
    assert client.get_run(run).info.status == "RUNNING"
