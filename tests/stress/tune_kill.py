"""Kill test of the search: three workers, twelve trials, a random SIGKILL every few seconds, at times of all at once.

The real workers, store, recovery and tables; only what a trial computes is simulated (tests/fast_trials.py). Prints
figures; exit status 0 only if all that is promised holds. OPTUNA_STORAGE names another store than SQLite.

    PYTHONPATH=src:. python tests/stress/tune_kill.py
"""

import collections
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
NAME = f"{0xC1FA10:016x}"
SITTING = """
import sys
import fast_trials
from diffusion import config, tuning
from diffusion.tuning_study import storage_url

if __name__ == "__main__":
    params = config.load({params!r}, {overrides!r})
    fast_trials.SECONDS = 0.2
    tuning.search({name!r}, params, storage_url(params.tune), fast_trials.prepare)
"""


@click.command()
@click.option("--trials", default=12, show_default=True)
@click.option("--workers", default=3, show_default=True)
@click.option("--every", default=5.0, show_default=True, help="Mean seconds between two kills.")
@click.option("--seed", default=0, show_default=True)
def main(trials: int, workers: int, every: float, seed: int) -> None:
    """Kill workers at random until the study is finished."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), trials, workers, every, random.Random(seed))
    print(json.dumps(figures, indent=2))
    sys.exit(0 if figures["all_hold"] else 1)


def run(folder: Path, trials: int, workers: int, every: float, chance: random.Random) -> dict:
    """One study, from the first sitting to the last; what was found."""
    overrides = {"tune.trials": trials, "tune.workers": workers, "tune.pruner": "none", "tracking.enabled": False}
    script = folder / "sitting.py"
    script.write_text(SITTING.format(params=str(REPO / "params.yaml"), overrides=overrides, name=NAME))
    environment = {**os.environ, "PYTHONPATH": f"{REPO}/src:{REPO}/tests", "DVC_ROOT": str(folder)}
    kills: collections.Counter[str] = collections.Counter()
    start, status = time.monotonic(), None
    while status != 0 and time.monotonic() - start < 600:
        kills["sittings"] += 1
        sitting = subprocess.Popen([sys.executable, str(script)], cwd=folder, env=environment)
        status = _harass(sitting, every, chance, kills)
    return {"seconds": round(time.monotonic() - start, 1), **kills, **_found(folder, trials)}


def _harass(
    sitting: "subprocess.Popen[bytes]", every: float, chance: random.Random, kills: "collections.Counter[str]"
) -> int:
    """Kill workers of a sitting, in one case of eight the whole sitting, until it ends; its exit status."""
    while True:
        try:
            return sitting.wait(chance.expovariate(1 / every))
        except subprocess.TimeoutExpired:
            victims = [p for p in psutil.Process(sitting.pid).children() if "spawn_main" in " ".join(p.cmdline())]
            if chance.random() < 1 / 8:
                sitting.send_signal(signal.SIGKILL)  # its workers see that it is gone, and stop
                kills["kills_of_all"] += 1
                return sitting.wait()
            if victims:
                chance.choice(victims).send_signal(signal.SIGKILL)
                kills["kills"] += 1


def _found(folder: Path, trials: int) -> dict:
    """What the table and the trials' own records say."""
    with (folder / "tuning/trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    states = collections.Counter(row["state"] for row in rows)
    first = {row["number"]: row["retry_of"] or row["number"] for row in rows}  # a trial's tries have one first
    finished = collections.Counter(first[row["number"]] for row in rows if row["state"] in ("COMPLETE", "PRUNED"))
    begun = set(first.values())
    records = [path.read_text().splitlines() for path in (folder / "runs").glob("*/steps.txt")]
    twice = sum(len(lines) - len({line.split()[1] for line in lines}) for lines in records)
    rates = {row["train.lr"] for row in rows}
    checks = {
        "finished_is_what_was_asked_for": sum(finished.values()) == trials,
        "none_running": states["RUNNING"] == states["WAITING"] == 0,
        "none_lost": begun == set(finished),
        "none_twice": max(finished.values()) == 1 and twice == 0,
        "none_proposed_twice": len(rates) == len(begun),
    }
    return {"states": dict(states), "steps_done_twice": twice, **checks, "all_hold": all(checks.values())}


if __name__ == "__main__":
    main()
