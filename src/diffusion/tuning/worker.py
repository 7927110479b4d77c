"""A worker of the search: one process that calls `study.optimize`, and what becomes of each trial there.

`python -m diffusion.tuning.worker` reads a pickled Job, the worker's number and its parent's from standard input.
"""

import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from diffusion import paths
from diffusion.config import Params
from diffusion.errors import StopRequest, UserError, outside
from diffusion.tuning.space import read_space
from diffusion.tuning.storage import answering, is_outage
from diffusion.tuning.study import COUNTED, WORKER, finished, make_sampler, open_study, retry_stopped, trials
from diffusion.tuning.trial import Attempt, Objective, PrunedError


@dataclass(frozen=True)
class Job:
    """What a worker is told; it must be picklable."""

    study: str
    params: Params
    url: str  # of the store
    run_id: str | None  # of the study's MLflow run
    prepare: Callable[[Params], Objective]  # called once in a worker


class StoppedError(Exception):
    """The trial is to be tried again: it was asked to stop, or what failed has nothing to do with its values."""


class Worker:
    """What `study.optimize` calls."""

    def __init__(self, job: Job, number: int, asked_to_stop: Callable[[], bool]) -> None:
        """Raises UserError if the store, the data or the reference are missing."""
        self.job, self.number, self.asked_to_stop = job, number, asked_to_stop
        self.study, self.space = open_study(job.study, job.params, job.url), read_space(job.params)
        self.objective = job.prepare(job.params)
        self.folder, self.trial = Path(), -1  # of the present trial
        self.error: Exception | None = None  # that ends the work

    def work(self, after: Callable[[], object] = lambda: None) -> None:
        """Do trials until the study is finished or it is asked to stop; call `after` after each.

        Raises:
            Exception: what a trial raised that is no fault of its values.
        """
        limit = MaxTrialsCallback(self.job.params.tune.trials, states=COUNTED)
        callbacks: list[Callable[[Study, FrozenTrial], Any]] = [self._end, limit, lambda *_: after()]
        while not self.asked_to_stop() and not finished(self.study, self.job.params):
            try:
                self.study.optimize(self._try, catch=(StoppedError,), callbacks=callbacks)
            except (UpdateFinishedTrialError, ValueError):  # Optuna's ways to say that a trial is no longer ours
                if not self._is_lost():
                    raise
                print(f"worker {self.number}: trial {self.trial} was given to another worker", file=sys.stderr)
                continue
            if self.error:
                raise self.error
            return

    def _try(self, trial: Trial) -> float:
        """Optuna's objective: one trial, from the checkpoint of an earlier try if there is one."""
        self.trial, self.error = trial.number, None
        try:
            value = self.objective(self._attempt(trial))
            trial.set_user_attr("reason", "")  # raises if it is no longer ours: Optuna 5.0's own check is an assertion
            return value
        except PrunedError as why:
            trial.set_user_attr("reason", str(why))
            raise TrialPruned(str(why)) from None
        except KeyboardInterrupt:
            self._stopped(trial, None)
        except UserError as error:
            self._stopped(trial, error)
        except UpdateFinishedTrialError:
            raise
        except Exception as error:
            if is_outage(error):
                self._stopped(trial, error)
            if remedy := outside(error):
                self._stopped(trial, UserError(remedy))
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
            raise

    def _stopped(self, trial: Trial, error: Exception | None) -> NoReturn:
        """End the trial so that it is tried again, and the work with `error`."""
        self.error = error
        if not (error and is_outage(error)):
            trial.set_user_attr("reason", "stopped")
        raise StoppedError from error

    def _end(self, study: Study, trial: FrozenTrial) -> None:
        """Optuna's callback after a trial that is told to the store."""
        if trial.state in COUNTED:
            for checkpoint in self.folder.glob("step_*.pt"):  # of no use any more, and large
                checkpoint.unlink(missing_ok=True)
        else:  # it raised StoppedError
            retry_stopped(study, trial)
        if self.asked_to_stop() or trial.state not in COUNTED:
            study.stop()

    def _is_lost(self) -> bool:
        """Whether others marked the present trial FAIL: its heartbeat was late, as after a suspension."""
        known = trials(self.study)[self.trial]
        return known.state == TrialState.FAIL and not known.user_attrs.get("reason")

    def _attempt(self, trial: Trial) -> Attempt:
        trial.set_user_attr(WORKER, trial.number)
        self.study.sampler = make_sampler(self.study, self.job.params, trial.number)  # asked from here on
        values = {dimension.key: dimension.suggest(trial) for dimension in self.space}
        # Another store may have the same study, and another trial of that number: when it began tells them apart.
        # A trial that is tried again has the attributes of its earlier try.
        begun = trial.datetime_start or datetime.now()
        folder = trial.user_attrs.get("folder", f"{self.job.study}-{trial.number:04d}-{begun:%m%d-%H%M%S-%f}")
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        for key, text in {"reason": "", "folder": folder, **process}.items():
            trial.set_user_attr(key, text)
        self.folder = paths.RUNS / folder
        tags = {"optuna.study": self.job.study, "optuna.trial": str(trial.number)}
        if self.job.run_id:
            tags["mlflow.parentRunId"] = self.job.run_id
        return Attempt(
            number=trial.number,
            values=values,
            folder=self.folder,
            tags=tags,
            asked_to_stop=self.asked_to_stop,
            worker=self.number,
            config=self.job.params.tune,
            trial=trial,
        )


def main() -> None:
    """Work until the study is finished, SIGTERM comes, or the parent is gone. Exit status 2: a user's error."""
    job, number, parent = pickle.load(sys.stdin.buffer)
    with StopRequest("make tune") as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
        try:
            with answering():
                Worker(job, number, lambda: stop.asked or os.getppid() != parent).work()
        except UserError as error:
            click.secho(f"worker {number}: error: {error}", fg="red", err=True)
            sys.exit(2)


if __name__ == "__main__":
    main()
