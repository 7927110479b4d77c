"""The search in several processes, killed, stopped, on several machines; trials are simulated, all else is real."""

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import fast_trials
from helpers.fast_trials import Store
from helpers.postgres import needs_postgres
from helpers.postgres import server as postgres_server
from helpers.preloaded import Command
from optuna.trial import FrozenTrial

SECONDS = 600.0  # a test that waits longer has failed


class Search:
    """A search in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, storage: str = "", **overrides: Any) -> None:
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("OPTUNA_STORAGE", storage)
            self.process = Command("helpers.fast_trials", json.dumps(overrides))

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [
            p for p in psutil.Process(self.process.pid).children() if "diffusion.tuning.worker" in " ".join(p.cmdline())
        ]

    def wait(self) -> int | None:
        """Exit status."""
        self.process.wait(SECONDS)
        return self.process.returncode


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "tuning/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def until(true: Callable[[], Any], *searches: Search) -> Any:
    """Wait for it while the searches last; what it returned."""
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        assert all(search.process.returncode is None for search in searches), [s.process.said for s in searches]
        time.sleep(0.2)
    return found


def at_work(store: Store, count: int, *searches: Search) -> list[FrozenTrial]:
    """The trials of `count` workers that are all in the middle of one: they are on `hold`, so they stay there."""

    def found() -> list[FrozenTrial]:
        running = [trial for trial in store.trials("RUNNING") if trial.intermediate_values]
        return running if len(running) == count else []

    trials: list[FrozenTrial] = until(found, *searches)
    return trials


def lose_a_worker(store: Store, count: int, number: int, *searches: Search) -> FrozenTrial:
    """Send a signal to one of `count` workers, wait until its trial is queued again; that trial."""
    victim = at_work(store, count, *searches)[-1]
    os.kill(int(victim.user_attrs["pid"]), number)

    def queued() -> bool:
        return any(victim.number in t.system_attrs.get("retry_history", []) for t in store.trials())

    until(queued, *searches)
    return victim


def steps(folder: Path) -> list[list[int]]:
    """The steps that were done in `folder`, over all tries of each trial, in the order they were done in."""
    records = sorted((folder / "runs").glob("*/steps.txt"))
    return [[int(line.split()[1]) for line in record.read_text().splitlines()] for record in records]


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """Trials wait after their first step until it is gone: whoever starts late is waited for."""
    path = tmp_path / fast_trials.HOLD
    path.touch()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/optuna/study.db")


def test_a_killed_workers_trial_goes_on_in_another_and_ctrl_c_ends_all_of_them(
    tmp_path: Path, hold: Path, store: Store
) -> None:
    """One worker is killed and one asked to stop (`kill PID`): both are replaced, before Ctrl-C and afterwards."""
    first = Search(tmp_path, **{"tune.trials": 3, "tune.workers": 2})
    killed, asked = (lose_a_worker(store, 2, number, first) for number in (signal.SIGKILL, signal.SIGTERM))
    at_work(store, 2, first)
    workers = first.workers()
    assert len(workers) == 2
    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal does
    assert first.wait() == 130
    assert not any(worker.is_running() for worker in workers)
    said = first.process.said
    assert "was killed (signal 9); another takes its place" in said
    assert "was asked to stop; another takes its place" in said
    assert "of 3 trials; `make tune` goes on from there" in said
    assert "Traceback" not in said
    assert "\r" not in said
    assert not [row for row in rows(tmp_path) if row["state"] == "RUNNING"]

    hold.unlink()
    assert Search(tmp_path, **{"tune.trials": 3, "tune.workers": 1}).wait() == 0
    table = rows(tmp_path)
    assert [row["state"] for row in table].count("COMPLETE") == 3
    assert not [row for row in table if row["state"] == "RUNNING"]
    assert {row["reason"] for row in table} == {"", "stopped", "its worker was killed"}
    for victim in (killed, asked):
        again = [row for row in table if row["retry_of"] == (table[victim.number]["retry_of"] or str(victim.number))]
        assert {row["train.lr"] for row in again} == {table[victim.number]["train.lr"]}
    done = steps(tmp_path)
    assert done.count(list(range(fast_trials.STEPS))) == 3
    assert all(trial == list(range(len(trial))) for trial in done), "a step was done twice"


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start_ends_all_of_them(tmp_path: Path, hold: Path) -> None:
    search = Search(tmp_path, **{"tune.trials": 5, "tune.workers": 2})
    workers = until(lambda: found if len(found := search.workers()) == 2 else [], search)
    os.killpg(search.process.pid, signal.SIGINT)
    assert search.wait() == 130
    assert not any(worker.is_running() for worker in workers)
    assert "Traceback" not in search.process.said


@pytest.mark.slow
def test_an_outage_that_one_worker_meets_ends_the_search_and_the_other_hands_back(
    tmp_path: Path, hold: Path, store: Store
) -> None:
    search = Search(tmp_path, **{"tune.trials": 3, "tune.workers": 2})
    at_work(store, 2, search)
    (tmp_path / fast_trials.OUTAGE).touch()
    assert search.wait() == 2
    assert sorted((t.state.name, t.user_attrs["reason"]) for t in store.trials()) == [
        ("FAIL", ""),
        ("FAIL", "stopped"),
        ("WAITING", ""),
        ("WAITING", "stopped"),
    ]
    said = [line for line in search.process.said.splitlines() if "error: " in line]
    number = said[0].removeprefix("worker ")[0]
    assert said == [
        f"worker {number}: error: the store does not answer (the server closed the connection); "
        "`make tune` goes on when it does",
        f"error: worker {number} failed, see above; `make tune` goes on when that is put right",
    ]
    assert "Traceback" not in search.process.said

    hold.unlink()
    assert Search(tmp_path, **{"tune.trials": 3, "tune.workers": 1}).wait() == 0
    assert steps(tmp_path) == [list(range(fast_trials.STEPS))] * 3, "a step was done twice"


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent(tmp_path: Path, hold: Path, store: Store) -> None:
    search = Search(tmp_path, **{"tune.trials": 40, "tune.workers": 2})
    at_work(store, 2, search)
    workers = search.workers()
    search.process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, SECONDS)
    assert not alive
    left = [(trial.state.name, trial.user_attrs["reason"]) for trial in store.trials() if trial.user_attrs]
    assert left == [("FAIL", "stopped")] * 2 + [("WAITING", "stopped")] * 2, "trials were not handed back"


@pytest.mark.slow
@pytest.mark.postgres
@needs_postgres
def test_two_machines_with_two_workers_each_share_one_study(tmp_path: Path) -> None:
    """In Postgres; a worker is killed on the way, and its own machine takes over."""
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
        (place / fast_trials.HOLD).touch()
    with postgres_server(tmp_path / "postgres") as url:
        store = Store(url.replace("postgresql:", "postgresql+psycopg2:"))
        machines = [Search(place, url, **{"tune.trials": 7, "tune.workers": 2}) for place in places]
        lose_a_worker(store, 4, signal.SIGKILL, *machines)
        for place in places:
            (place / fast_trials.HOLD).unlink()
        assert [machine.wait() for machine in machines] == [0, 0], [m.process.said for m in machines]
        found = store.trials()
    states = [trial.state.name for trial in found]
    assert 7 <= states.count("COMPLETE") <= 10, "at most one more for each other worker"
    assert (states.count("FAIL"), states.count("RUNNING")) == (1, 0)
    done = [steps(place) for place in places]
    assert min(len(trials) for trials in done) >= 2, "one machine did it all"
    assert all(trial == list(range(len(trial))) for trial in done[0] + done[1]), "a step was done twice"
