"""The Optuna study that all workers share, and how a trial survives its worker.

A worker is a process that calls `study.optimize`. Optuna's thread writes a heartbeat into the store while a trial
runs; one whose heartbeat is older than GRACE_SECONDS is marked FAIL by whoever looks next, and RETRY puts it into the
queue again with the same values. A trial that was stopped (Ctrl-C) is put there at once. Whoever takes it from the
queue trains on from the checkpoint of the first try.
"""

from contextlib import suppress
from datetime import datetime, timedelta

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
WORKER = "worker"  # attribute of a trial that was begun: its number (a retry has the attribute of the first try too)


def open_study(name: str, params: Params, url: str) -> Study:
    """The study of that name, new or as it was left.

    Raises:
        UserError: the store does not answer, or is of another version.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        storage=storage.open_storage(url, retry()),
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        pruner=make_pruner(params.tune),
    )


def retry() -> RetryHeartbeatStaleTrialCallback:
    """What puts a failed trial into the queue again; it keeps what was reported."""
    with storage.quiet():
        return RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES, inherit_intermediate_values=True)


def make_sampler(study: Study, params: Params, number: int) -> BaseSampler:
    """The sampler for the trial of that number, with random numbers of its own: no worker or machine repeats any.

    GPs learn nothing from pruned trials and would propose the same again: after one the next is drawn at random.
    """
    config = params.tune
    own = params.seed if config.seed is None else config.seed
    seed = generator(own, "tune", number).initial_seed() % 2**32
    startup = min(10, max(2, config.trials // 3))  # random; Optuna's 10 would leave a short study no search
    ended = trials(study, *COUNTED)
    if config.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup)
    if config.sampler == "random" or (ended and ended[-1].state == TrialState.PRUNED):
        return RandomSampler(seed=seed)
    with storage.quiet():
        return GPSampler(seed=seed, n_startup_trials=startup)


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

    Optuna does so for trials that have a heartbeat; here also for those whose worker died before the first.
    """
    with storage.quiet():
        optuna.storages.fail_stale_trials(study)
    late = datetime.now() - timedelta(seconds=storage.GRACE_SECONDS)
    for trial in trials(study, TrialState.RUNNING):
        if trial.user_attrs.get(WORKER) != trial.number and trial.datetime_start and trial.datetime_start < late:
            with suppress(UpdateFinishedTrialError, ValueError):  # another process did it just now
                study.tell(trial.number, state=TrialState.FAIL)
                retry()(study, study.trials[trial.number])


def retry_stopped(study: Study, trial: FrozenTrial) -> None:
    """Queue a trial again that was stopped, however often: MAX_RETRIES counts kills alone, since the last stop."""
    trial.system_attrs["retry_history"] = []
    retry()(study, trial)
