"""An objective for tests of everything around trainings: steps of sleep, a checkpoint that is a file, a formula.

As a command, `python -m helpers.fast_trials '{"tune.trials": 4}'` is `make tune` in the working folder. While
a file named `hold` lies there, trials wait after their first step; one of them finds a file named `outage`, and no
store.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import optuna
from helpers.project import REPO
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

from diffusion import params_file
from diffusion.config import Params
from diffusion.errors import UserError
from diffusion.tuning import search, storage
from diffusion.tuning.storage import storage_url
from diffusion.tuning.trial import Attempt, Objective

STUDY = "00000000c1fa0010"
STEPS = 8
SECONDS = float(os.environ.get("FAST_TRIAL_SECONDS", "0.3"))  # a step
storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 6  # workers are processes that import this file
HOLD, OUTAGE = Path("hold"), Path("outage")


def prepare(params: Params) -> Objective:
    """As `tuning.trial.Trainings`."""
    return objective


def value(rate: float, schedule: str) -> float:
    """Least at a rate of 1e-3."""
    return 10.0 + abs(math.log10(rate) + 3) + len(schedule)


def objective(attempt: Attempt) -> float:
    """Step on from where an earlier try was; steps.txt has a line `process step` for each step done."""
    budget = attempt.config.images_per_trial
    attempt.folder.mkdir(parents=True, exist_ok=True)
    record = attempt.folder / "steps.txt"
    done = len(record.read_text().splitlines()) if record.exists() else 0
    rate, schedule = attempt.values["train.lr"], str(attempt.values["diffusion.schedule"])
    assert isinstance(rate, float)
    for step in range(done, STEPS):
        while step and HOLD.exists() and not attempt.asked_to_stop():
            _meet_outage()
            time.sleep(0.05)
        if attempt.asked_to_stop():
            raise KeyboardInterrupt
        time.sleep(SECONDS)
        with record.open("a") as file:
            file.write(f"{os.getpid()} {step}\n")
        attempt.report((step + 1) * budget // STEPS, value(rate, schedule) + STEPS - step)
    return value(rate, schedule)


def _meet_outage() -> None:
    with contextlib.suppress(FileNotFoundError):
        OUTAGE.unlink()
        raise StorageInternalError("the server closed the connection")


class Store:
    """A study's store as a test looks into it, however often: no connection stays open in between."""

    def __init__(self, url: str) -> None:
        """Of a study that a search makes at some time."""
        self.url = url
        self.study: optuna.Study | None = None

    def trials(self, *states: str) -> list[FrozenTrial]:
        """Trials by number, of the named states or of all; none before there is a study."""
        if self.study is None:
            if not self._has_study():
                return []
            self.study = optuna.load_study(study_name=STUDY, storage=RDBStorage(self.url, {"poolclass": NullPool}))
        return [trial for trial in self.study.trials if not states or trial.state.name in states]

    def _has_study(self) -> bool:
        """Asked without Optuna, which would make tables while the search makes them."""
        try:
            with create_engine(self.url, poolclass=NullPool).connect() as connection:
                return STUDY in connection.exec_driver_sql("SELECT study_name FROM studies").scalars()
        except (OperationalError, ProgrammingError):  # no file, no table
            return False


def main(overrides: str) -> None:
    """Search as params.yaml with `overrides` (JSON) says, without MLflow.

    Exit status 130: it was stopped; 2: a UserError, which is one line.
    """
    from helpers import fast_trials  # not __main__, which workers could not import

    os.dup2(2, 1)  # one record of all that is said, in order
    params = params_file.load(
        REPO / "params.yaml",
        {"tracking.enabled": False, "tune.pruner": "none", **json.loads(overrides)},
    )
    try:
        search.search(STUDY, params, storage_url(params.tune), fast_trials.prepare)
    except KeyboardInterrupt as error:
        print(error)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
