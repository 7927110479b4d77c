"""How a run ends is how its stage did; the server of the README lets its clients in."""

import re
import signal
from pathlib import Path

import pytest
from helpers.project import REPO
from helpers.stores import client_of, open_run

from diffusion.tracking import runs
from diffusion.tracking.journal import read_journal

pytest.importorskip("mlflow")


class TestEnds:
    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (None, "FINISHED", None),
            (ValueError("loss is nan"), "FAILED", "ValueError: loss is nan"),
            (KeyboardInterrupt(), "KILLED", None),
            (SystemExit(128 + signal.SIGTERM), "KILLED", None),
            (SystemExit(2), "FAILED", "exit: 2"),
            (SystemExit(0), "FINISHED", None),
        ],
    )
    def test_status(
        self, database: Path, tmp_path: Path, error: BaseException | None, status: str, message: str | None
    ) -> None:
        tracker = open_run(tmp_path / "run")
        client = client_of(database)
        assert client.get_run(tracker.run_id).info.status == "RUNNING"

        def work() -> None:
            with runs.closing_status(tracker, "train"):
                tracker.metrics({"loss": 1.0}, 1)
                if error is not None:
                    raise error

        if error is None:
            work()
        else:
            with pytest.raises(type(error)) as raised:
                work()
            assert raised.value is error
        run = client.get_run(tracker.run_id)
        assert run.info.status == status
        assert run.data.tags.get("error") == message
        assert run.data.metrics == {"loss": 1.0}
        *_, last = (e for e in read_journal(tmp_path / "run/journal.jsonl") if e.kind == "close")
        assert (last.kind, last.data["status"]) == ("close", status)
        assert run.info.end_time == last.time


def test_the_readmes_server_lets_its_clients_in() -> None:
    """MLflow compares a request's host with its port; 403 for all would be one line and a journal that nobody reads."""
    from mlflow.server.security_utils import is_allowed_host_header

    text = (REPO / "README.md").read_text()
    (hosts,) = re.findall(r'--allowed-hosts "([^"]+)"', text)
    (client,) = re.findall(r"export MLFLOW_TRACKING_URI=http://(\S+)", text)
    assert is_allowed_host_header(hosts.split(","), client)
