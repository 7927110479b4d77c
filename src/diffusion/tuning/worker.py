"""A worker of the search: takes a trial, does it, says how it ended, takes the next one."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from diffusion import paths
from diffusion.config import Params
from diffusion.errors import StopRequest, UserError, outside
from diffusion.tuning.store import answering, is_outage
from diffusion.tuning.study import SharedStudy
from diffusion.tuning.trial import Attempt, Line, LostError, Objective, PrunedError

if TYPE_CHECKING:
    from optuna import Trial

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What a worker is told; it must be picklable."""

    study: str
    params: Params
    url: str  # of the store
    run_id: str | None  # of the study's MLflow run
    prepare: Callable[[Params], Objective]  # called once in a worker


def worker(job: Job, number: int, parent: int) -> None:
    """A worker process: until the study is finished, SIGTERM comes, or its parent is gone.

    Ctrl-C is the parent's to answer, which started this process with it blocked. Exit status 2: an error that the user
    can put right.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what StopRequest puts back
    with StopRequest("make tune") as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            with answering():
                work(job, number, lambda: stop.asked or os.getppid() != parent)
        except UserError as error:
            click.secho(f"worker {number}: error: {error}", fg="red", err=True)
            sys.exit(2)


def work(job: Job, number: int, asked_to_stop: Callable[[], bool], after: Callable[[], object] = float) -> None:
    """Do trials until the study is finished or it is asked to stop; call `after` after each.

    Raises:
        Exception: what a trial raises that is no fault of its values; that trial is marked FAIL.
    """
    shared, line, objective = SharedStudy(job.study, job.params, job.url), Line(number), None
    try:
        while not asked_to_stop() and not shared.finished:
            if objective is None:
                objective = job.prepare(job.params)
            trial = shared.claim()
            if trial is None:  # the last ones are others' work: they may die
                time.sleep(POLL_SECONDS)
                continue
            with shared.beating(trial):
                _do(objective, job, shared, trial, line, asked_to_stop)
            after()
    finally:
        line.close()


def _do(
    objective: Objective, job: Job, shared: SharedStudy, trial: "Trial", line: Line, asked_to_stop: Callable[[], bool]
) -> None:
    """One trial; however it ends, the study knows."""
    told = True
    try:
        attempt = _attempt(job, shared, trial, line, asked_to_stop)
        value = objective(attempt)
    except PrunedError as why:
        told = shared.tell(trial, "PRUNED", reason=str(why))
    except LostError:
        told = False
    except KeyboardInterrupt:  # asked to stop: saved, and tried again another time
        shared.tell(trial, "FAIL", stopped=True)
        return
    except UserError:  # no fault of its values: to be tried again when that is put right
        shared.tell(trial, "FAIL", stopped=True)
        raise
    except BaseException as error:
        if is_outage(error):
            raise  # tried again when this process is gone
        if remedy := outside(error):  # as UserError
            shared.tell(trial, "FAIL", stopped=True)
            raise UserError(remedy) from None
        shared.tell(trial, "FAIL", final=True, reason=f"{type(error).__name__}: {error}")
        raise
    else:
        told = shared.tell(trial, "COMPLETE", value)
    if not told:
        print(f"worker {line.worker}: trial {trial.number} was given to another worker meanwhile", file=sys.stderr)
        return
    for checkpoint in attempt.folder.glob("step_*.pt"):  # of no use any more, and large
        checkpoint.unlink(missing_ok=True)


def _attempt(job: Job, shared: SharedStudy, trial: "Trial", line: Line, asked_to_stop: Callable[[], bool]) -> Attempt:
    everyone = shared.trials()
    known = everyone[trial.number]
    first = everyone[known.system_attrs.get("failed_trial", trial.number)]
    line.know(shared.best())
    tags = {"optuna.study": job.study, "optuna.trial": str(trial.number)}
    if job.run_id:
        tags["mlflow.parentRunId"] = job.run_id
    return Attempt(
        number=trial.number,
        values={dimension.key: dimension.suggest(trial) for dimension in shared.space},
        # Another store may have the same study, and another trial of that number: when it began tells them apart.
        folder=paths.RUNS / f"{job.study}-{first.number:04d}-{first.datetime_start:%m%d-%H%M%S-%f}",
        tags=tags,
        asked_to_stop=asked_to_stop,
        line=line,
        shared=shared,
        trial=trial,
        reported=set(known.intermediate_values),
    )
