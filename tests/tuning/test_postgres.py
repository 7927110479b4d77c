"""Where users outgrow one machine: a tracking server with Postgres behind it, which also keeps the files."""

import math
from contextlib import closing
from pathlib import Path

import pytest
from helpers.postgres import needs_postgres
from helpers.postgres import server as postgres_server
from helpers.stores import close_in_time, free_port, journal_points, open_run, server, sync, wait_for

from diffusion.tracking import mlflow_copy

pytest.importorskip("mlflow")
pytestmark = [pytest.mark.postgres, pytest.mark.slow, needs_postgres]

Point = tuple[str, int, int, float]


def rows(url: str, query: str, *values: str) -> list[tuple]:
    """What lies in the database, read without MLflow."""
    import psycopg2

    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()


def stored_points(url: str, run_id: str) -> list[Point]:
    query = "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = %s"
    return sorted((k, s, t, math.nan if is_nan else v) for k, s, t, v, is_nan in rows(url, query, run_id))


def test_a_server_that_is_killed_and_started_again_has_all_of_the_journal(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_copy, "MAX_PAUSE_SECONDS", 0.5)
    for name in ("early", "late"):
        (tmp_path / name).write_text(f"a {name} file")
    served, journal, port = tmp_path / "served", tmp_path / "run/journal.jsonl", free_port()
    with postgres_server(tmp_path / "postgres") as url:
        backend = url.replace("postgresql:", "postgresql+psycopg2:")
        with server(backend, served, port) as (uri, kill):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            tracker = open_run(tmp_path / "run", tags={"data.digest": "d1"})
            run_id = tracker.run_id
            assert run_id
            tracker.params({"train.lr": 2e-3})
            tracker.artifact(tmp_path / "early", "notes")
            for step in range(1000):
                tracker.metrics({"loss": math.cos(step), "lr": 1e-3 / (step + 1)}, step)
            wait_for(lambda: len(stored_points(url, run_id)) == 2000)
            wait_for(lambda: any(served.rglob("notes/early")))
            kill()
        for step in range(1000, 1500):  # nobody listens
            tracker.metrics({"loss": math.cos(step)}, step)
        with server(backend, served, port):
            wait_for(lambda: len(stored_points(url, run_id)) == 2500)
            tracker.artifact(tmp_path / "late", "notes")
            tracker.metrics({"best/val_loss": -1e-300, "what": math.inf}, 1500)
            close_in_time(tracker)
            assert stored_points(url, run_id)[:-1] == journal_points(journal)[:-1]
            assert stored_points(url, run_id)[-1][3] > 1e308  # what MLflow makes of infinity
            assert sync(journal) == "up to date"
        assert rows(url, "SELECT status FROM runs WHERE run_uuid = %s", run_id) == [("FINISHED",)]
        assert rows(url, "SELECT value FROM params WHERE run_uuid = %s", run_id) == [("0.002",)]
        assert ("d1",) in rows(url, "SELECT value FROM tags WHERE run_uuid = %s AND key = 'data.digest'", run_id)
    assert {path.name: path.read_text() for path in served.rglob("notes/*")} == {
        "early": "a early file",
        "late": "a late file",
    }
    assert not (tmp_path / "ml artifacts").exists()  # the server keeps the files
