"""The Optuna study that all workers share, and how a trial survives its worker.

A worker is a process that calls `study.optimize`. Optuna's thread writes a heartbeat into the store while a trial
runs; one whose heartbeat is older than GRACE_SECONDS is marked FAIL by whoever looks next, and RETRY puts it into the
queue again with the same values. A trial that was stopped (Ctrl-C) is put there at once. Whoever takes it from the
queue trains on from the checkpoint of the first try.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from diffusion.config import Params
from diffusion.runtime import generator
from diffusion.tuning import storage
from diffusion.tuning.pruner import make_pruner
from diffusion.tuning.space import first_settings, read_space

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)  # states that use up one of `tune.trials`
MAX_RETRIES = 10  # of one setting: it may be the setting that kills
WORKER = "worker_of"  # a trial's number, from the moment that its worker has its values


def open_study(name: str, params: Params, url: str, worker: int = 0) -> Study:
    """The study of that name, new or as it was left, as worker number `worker` of this machine sees it.

    Raises:
        UserError: the store does not answer, or is of another version.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=storage.open_storage(url, retry()),
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        pruner=make_pruner(params.tune),
    )
    study.sampler = make_sampler(params, params.tune.sampler, len(study.trials), worker)
    return study


def retry() -> RetryHeartbeatStaleTrialCallback:
    """What puts a failed trial into the queue again; it keeps what was reported."""
    with storage.quiet():
        return RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES, inherit_intermediate_values=True)


def make_sampler(params: Params, name: str, trials: int, worker: int) -> BaseSampler:
    """Optuna's sampler of that name. Its seed depends on the trials so far, so that none repeats another's proposals.

    Machines that begin together are told apart by their names.
    """
    config = params.tune
    own = params.seed if config.seed is None else config.seed
    seed = generator(own, f"tune {socket.gethostname()} {worker}", trials).initial_seed() % 2**32
    startup = min(10, max(2, config.trials // 3))  # random; Optuna's 10 would leave a short study no search
    make: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(seed=seed, n_startup_trials=startup),
        "random": lambda: RandomSampler(seed=seed),
        "gp": lambda: GPSampler(seed=seed, n_startup_trials=startup),
    }
    with storage.quiet():
        return make[name]()


def enqueue_first(study: Study, params: Params) -> None:
    """Put what params.yaml has first, so that the best is never worse; others of `first_settings` for half the study.

    What was tried, or waits already, is not put there again.
    """
    for setting in first_settings(params, read_space(params))[: max(1, params.tune.trials // 2)]:
        study.enqueue_trial(setting, skip_if_exists=True)


def trials(study: Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials by number, of the given states; of all states if none is given."""
    return study.get_trials(deepcopy=False, states=states or None)


def finished(study: Study, params: Params) -> bool:
    """Whether the study has `tune.trials` trials that count."""
    return len(trials(study, *COUNTED)) >= params.tune.trials


def best(study: Study) -> FrozenTrial | None:
    """The complete trial of least value."""
    return min(trials(study, TrialState.COMPLETE), key=lambda trial: trial.values[0], default=None)


def retry_lost(study: Study) -> None:
    """Mark trials FAIL whose worker is gone, and queue them again.

    Optuna does so for trials that have a heartbeat. One whose worker died before the first has none: while its values
    were sought.
    """
    with storage.quiet():
        optuna.storages.fail_stale_trials(study)
    late = datetime.now() - timedelta(seconds=storage.GRACE_SECONDS)
    for trial in trials(study, TrialState.RUNNING):
        begun: Any = trial.datetime_start
        if trial.user_attrs.get(WORKER) != trial.number and begun < late:
            with suppress(UpdateFinishedTrialError, ValueError):  # another process did it just now
                study.tell(trial.number, state=TrialState.FAIL)
                retry()(study, study.trials[trial.number])
