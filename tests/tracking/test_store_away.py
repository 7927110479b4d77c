"""Tracking while the store is away, slow or refuses; servers that are killed: test_outage.py."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.stores import (
    SECONDS,
    client_of,
    close_in_time,
    journal_points,
    open_run,
    stored_points,
    wait_for,
    warnings,
)

from diffusion.tracking import mlflow_copy
from diffusion.tracking.journal import unsent

pytest.importorskip("mlflow")


class TestOutage:
    def test_journal_alone_without_mlflow(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "mlflow", None)
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close("FINISHED")
        assert tracker.run_id is None
        assert len(warnings(capsys)) == 1
        assert len(journal_points(tmp_path / "run/journal.jsonl")) == 1

    def test_recovers_with_nothing_lost_and_one_line_each(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from mlflow import MlflowClient

        monkeypatch.setattr(mlflow_copy, "MAX_PAUSE_SECONDS", 0.01)
        real, down, refused = MlflowClient.log_batch, threading.Event(), []

        def log_batch(*args: Any, **kwargs: Any) -> Any:
            if down.is_set():
                refused.append(args)
                raise ConnectionError("nobody there")
            return real(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
        tracker = open_run(tmp_path / "run")
        tracker.metrics({"loss": 1.0}, 1)
        down.set()
        for step in range(2, 1500):
            tracker.metrics({"loss": 1.0 / step}, step)
        wait_for(lambda: len(refused) >= 3)
        down.clear()
        close_in_time(tracker)
        points = stored_points(database, tracker.run_id or "")
        assert len(points) == 1499
        assert points == journal_points(tmp_path / "run/journal.jsonl")
        lines = warnings(capsys)
        assert ["does not answer" in line for line in lines] == [True, False]
        assert "answers again" in lines[1]

    def test_memory_is_bounded_and_nothing_is_lost(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from mlflow import MlflowClient

        monkeypatch.setattr(mlflow_copy, "MAX_WAITING", 100)
        monkeypatch.setattr(mlflow_copy, "MAX_PAUSE_SECONDS", 0.01)
        real, release = MlflowClient.log_batch, threading.Event()

        def log_batch(*args: Any, **kwargs: Any) -> Any:
            assert release.wait(SECONDS)
            return real(*args, **kwargs)

        tracker = open_run(tmp_path / "run")
        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
        for step in range(1000):
            tracker.metrics({"loss": float(step)}, step)
        tracker.params({"kept": 1})
        release.set()
        close_in_time(tracker)
        stored = stored_points(database, tracker.run_id or "")
        assert stored == journal_points(tmp_path / "run/journal.jsonl")
        assert client_of(database).get_run(tracker.run_id).data.params == {"kept": "1"}
        assert warnings(capsys) == []

    def test_close_leaves_a_store_that_never_answers(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from mlflow import MlflowClient

        hung = threading.Event()
        monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 0.2)
        monkeypatch.setattr(mlflow_copy, "UPLOAD_SECONDS", 0.2)
        tracker = open_run(tmp_path / "run")
        monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: hung.wait(SECONDS))
        for step in range(10):
            tracker.metrics({"loss": float(step)}, step)
        close_in_time(tracker)
        hung.set()
        assert len(journal_points(tmp_path / "run/journal.jsonl")) == 10
        (line,) = warnings(capsys)
        assert "tracking: 11 events" in line

    def test_refusals_are_named_once_and_block_nothing(
        self, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tracker = open_run(tmp_path / "run")
        for step in range(3):
            tracker.metrics({"good": float(step)}, step)
            tracker.metrics({"bad$name": float(step)}, step)
        tracker.artifact(tmp_path / "missing.png")
        tracker.close("FINISHED")
        run = client_of(database).get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert [(key, step) for key, step, *_ in stored_points(database, run.info.run_id)] == [
            ("good", step) for step in range(3)
        ]
        lines = warnings(capsys)
        assert sum("refuses metrics" in line for line in lines) == 1
        assert sum("missing.png" in line for line in lines) == 1
        assert "4 events" in lines[-1]
        assert len(lines) == 3

    @pytest.mark.parametrize("bad", ["empty picture", "no permission", "folder"])
    def test_a_file_that_cannot_be_read_is_refused(
        self,
        database: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        bad: str,
    ) -> None:
        (tmp_path / "run").mkdir()
        broken, good = tmp_path / "run/a.png", tmp_path / "run/good.txt"
        broken.write_bytes(b"")
        good.write_text("x")
        real = Path.open

        def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:  # permissions do not stop root
            if path == broken and args[:1] == ("rb",):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        if bad != "empty picture":
            monkeypatch.setattr(Path, "open", refuse)
        tracker = open_run(tmp_path / "run")
        for step in (1, 1):
            if bad == "empty picture":
                tracker.image(broken, "samples", step)
            else:
                tracker.artifact(broken if bad == "no permission" else tmp_path / "run", "files")
        tracker.artifact(good, "notes")
        close_in_time(tracker)
        monkeypatch.setattr(Path, "open", real)
        lines = warnings(capsys)
        assert len(lines) == 2, lines
        assert "MLflow refuses" in lines[0]
        assert "2 events" in lines[1]
        assert [p.read_text() for p in (tmp_path / "ml artifacts").rglob("notes/good.txt")] == ["x"]
        assert unsent(tmp_path / "run/journal.jsonl") == []

    def test_artifact_store_that_is_away_does_not_hold_back_the_curves(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        def away(*_: Any) -> None:
            raise ConnectionError("no bucket")

        monkeypatch.setattr(MlflowClient, "log_artifact", away)
        monkeypatch.setattr(mlflow_copy, "CLOSE_SECONDS", 0.5)
        (tmp_path / "f").write_text("x")
        tracker = open_run(tmp_path / "run")
        tracker.artifact(tmp_path / "f")
        tracker.metrics({"loss": 1.0}, 1)
        close_in_time(tracker)
        run = client_of(database).get_run(tracker.run_id)
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
