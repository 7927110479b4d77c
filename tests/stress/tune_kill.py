"""Kill test of the search: three workers, twelve trials, a random SIGKILL every few seconds, at times of all at once.

The real workers, store, recovery and tables; only what a trial computes is simulated (helpers/fast_trials.py). Prints
figures; exit status 0 only if all that is promised holds. OPTUNA_STORAGE names another store than SQLite.

    python tests/stress/tune_kill.py
"""

import collections
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))

from helpers.fast_trials import Store  # noqa: E402


@click.command()
@click.option("--trials", default=12, show_default=True)
@click.option("--workers", default=3, show_default=True)
@click.option("--every", default=3.0, show_default=True, help="Mean seconds between two kills.")
@click.option("--seed", default=0, show_default=True)
def main(trials: int, workers: int, every: float, seed: int) -> None:
    """Kill workers at random until the study is finished."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), trials, workers, every, random.Random(seed))
    print(json.dumps(figures, indent=2))
    sys.exit(0 if figures["all_hold"] else 1)


def run(folder: Path, trials: int, workers: int, every: float, chance: random.Random) -> dict:
    """One study, from the first search to the last; what was found."""
    overrides = json.dumps({"tune.trials": trials, "tune.workers": workers})
    command = [sys.executable, "-m", "helpers.fast_trials", overrides]
    environment = {**os.environ, "PYTHONPATH": f"{REPO}/src:{REPO}/tests", "DVC_ROOT": str(folder)}
    environment["FAST_TRIAL_SECONDS"] = "0.8"
    kills: collections.Counter[str] = collections.Counter()
    url = os.environ.get("OPTUNA_STORAGE") or f"sqlite:///{folder}/optuna/study.db"
    store, start, status = Store(url), time.monotonic(), None
    while status != 0 and time.monotonic() - start < 1200:
        kills["starts"] += 1
        search = subprocess.Popen(command, cwd=folder, env=environment)
        status = _harass(search, store, every, chance, kills)
    return {
        "seconds": round(time.monotonic() - start, 1),
        **kills,
        **_found(folder, store, trials, workers, kills["kills"]),
    }


def _harass(
    search: "subprocess.Popen[bytes]",
    store: Store,
    every: float,
    chance: random.Random,
    kills: "collections.Counter[str]",
) -> int:
    """Kill workers amid their trials, in one case of eight the whole search, until it ends; its exit status."""
    while True:
        try:
            return search.wait(chance.expovariate(1 / every))
        except subprocess.TimeoutExpired:
            victims = _at_work(store)
            if not victims:  # they are starting
                continue
            if chance.random() < 1 / 8:
                search.send_signal(signal.SIGKILL)  # its workers see that it is gone, and stop
                kills["kills_of_all"] += 1
                return search.wait()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(chance.choice(victims), signal.SIGKILL)
                kills["kills"] += 1


def _at_work(store: Store) -> list[int]:
    """Processes that are in the middle of a trial, on this machine."""
    pids = [int(t.user_attrs["pid"]) for t in store.trials("RUNNING") if t.params]
    return [pid for pid in pids if psutil.pid_exists(pid)]


def _found(folder: Path, store: Store, trials: int, workers: int, kills: int) -> dict:
    """What the table and the trials' own records say."""
    with (folder / "tuning/trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    states = collections.Counter(row["state"] for row in rows)
    first = {row["number"]: row["retry_of"] or row["number"] for row in rows}  # a trial's tries have one first
    finished = collections.Counter(first[row["number"]] for row in rows if row["state"] in ("COMPLETE", "PRUNED"))
    begun = set(first.values())
    records = [path.read_text().splitlines() for path in (folder / "runs").glob("*/steps.txt")]
    twice = sum(len(lines) - len({line.split()[1] for line in lines}) for lines in records)
    waiting = {first[row["number"]] for row in rows if row["state"] == "WAITING"}  # queued when enough were done
    proposed = {tuple(sorted(trial.params.items())) for trial in store.trials() if trial.params}
    checks = {
        "workers_were_killed": kills > 0,
        "finished_is_what_was_asked_for": trials <= sum(finished.values()) < trials + workers,
        "none_running": states["RUNNING"] == 0,
        "none_lost": begun == set(finished) | waiting,
        "none_twice": max(finished.values()) == 1 and twice == 0,
        "none_proposed_twice": len(proposed) == len(begun),
    }
    return {"states": dict(states), "steps_done_twice": twice, **checks, "all_hold": all(checks.values())}


if __name__ == "__main__":
    main()
