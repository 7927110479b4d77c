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
from diffusion.locks import only_process
from diffusion.tuning.space import read_space
from diffusion.tuning.storage import answering, is_outage
from diffusion.tuning.study import COUNTED, WORKER, finished, make_sampler, open_study, retry, trials
from diffusion.tuning.trial import Attempt, Line, Objective, PrunedError


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
        self.study, self.space = open_study(job.study, job.params, job.url, number), read_space(job.params)
        self.objective, self.line = job.prepare(job.params), Line(number)
        self.folder, self.trial = Path(), -1  # of the present trial
        self.error: Exception | None = None  # that ends the work

    def work(self, after: Callable[[], object] = lambda: None) -> None:
        """Do trials until the study is finished or it is asked to stop; call `after` after each.

        Raises:
            Exception: what a trial raised that is no fault of its values.
        """
        limit = MaxTrialsCallback(self.job.params.tune.trials, states=COUNTED)
        callbacks: list[Callable[[Study, FrozenTrial], Any]] = [self._end, limit, lambda *_: after()]
        try:
            while not self.asked_to_stop() and not finished(self.study, self.job.params):
                try:
                    self.study.optimize(self._try, catch=(StoppedError,), callbacks=callbacks)
                except (UpdateFinishedTrialError, ValueError):  # Optuna's ways to say that a trial is no longer ours
                    if not self._is_lost():
                        raise
                    print(f"worker {self.number}: trial {self.trial} was given to another worker", file=sys.stderr)
                if self.error:
                    raise self.error
        finally:
            self.line.close()

    def _try(self, trial: Trial) -> float:
        """Optuna's objective: one trial, from the checkpoint of an earlier try if there is one."""
        self.trial, self.error = trial.number, None
        try:
            attempt = self._attempt(trial)
            with only_process(self.folder / "trial.lock", "still has this trial", wait=True):
                value = self.objective(attempt)
            trial.set_user_attr(
                "reason", ""
            )  # raises if it is no longer ours, of which Optuna 5.0 makes an AssertionError
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
        config = self.job.params.tune
        if trial.state in COUNTED:
            for checkpoint in self.folder.glob("step_*.pt"):  # of no use any more, and large
                checkpoint.unlink(missing_ok=True)
        else:  # it raised StoppedError
            retry()(study, trial)
            study.stop()
        if self.asked_to_stop():
            study.stop()
        if config.sampler == "gp":  # GPs learn nothing from pruned trials, and would propose the same again
            name = "random" if trial.state == TrialState.PRUNED else "gp"
            study.sampler = make_sampler(self.job.params, name, len(trials(study)), self.number)

    def _is_lost(self) -> bool:
        """Whether others marked the present trial FAIL: its heartbeat was late, as after a suspension."""
        known = trials(self.study)[self.trial]
        return known.state == TrialState.FAIL and not known.user_attrs.get("reason")

    def _attempt(self, trial: Trial) -> Attempt:
        values = {dimension.key: dimension.suggest(trial) for dimension in self.space}
        trial.set_user_attr("reason", "")  # it may have another of an earlier try
        trial.set_user_attr("pid", os.getpid())
        trial.set_user_attr("host", socket.gethostname())
        trial.set_user_attr(WORKER, trial.number)
        everyone = trials(self.study)
        first = everyone[everyone[trial.number].system_attrs.get("failed_trial", trial.number)]
        # Another store may have the same study, and another trial of that number: when it began tells them apart.
        self.folder = paths.RUNS / f"{self.job.study}-{first.number:04d}-{first.datetime_start:%m%d-%H%M%S-%f}"
        tags = {"optuna.study": self.job.study, "optuna.trial": str(trial.number)}
        if self.job.run_id:
            tags["mlflow.parentRunId"] = self.job.run_id
        return Attempt(
            number=trial.number,
            values=values,
            folder=self.folder,
            tags=tags,
            asked_to_stop=self.asked_to_stop,
            line=self.line,
            config=self.job.params.tune,
            trial=trial,
            reported=set(everyone[trial.number].intermediate_values),
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
