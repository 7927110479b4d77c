"""One study in one database, shared by workers, machines and sittings: who takes the next trial, and who has died.

All that must not happen twice at once (count, take over, ask) is done under one lock, which the
system lets go of when its holder dies.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from diffusion.config import Params
from diffusion.locks import is_running as is_alive
from diffusion.locks import machine
from diffusion.locks import this_process as signature
from diffusion.runtime import generator
from diffusion.tuning.space import first_settings, read_space
from diffusion.tuning.store import BUSY_SECONDS, HEARTBEAT_SECONDS, open_storage, quiet

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

COUNTED = ("COMPLETE", "PRUNED")  # states that use up one of `tune.trials`
MAX_KILLS = 10  # of one setting; it may be the setting that kills
WHO = ("host", "pid", "pid.started", "machine")  # attributes of a trial that say whose work it is


class SharedStudy:
    """A study as one process sees it."""

    def __init__(self, name: str, params: Params, url: str) -> None:
        """The study of that name, new or as it was left.

        Raises:
            UserError: the store does not answer, or is of another version.
        """
        import optuna

        from diffusion.tuning.pruner import make_pruner

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name, self.params, self.config, self.space = name, params, params.tune, read_space(params)
        self.storage = open_storage(url)
        self.study: Study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="minimize",
            load_if_exists=True,
            pruner=make_pruner(params.tune),
        )

    def trials(self, *states: str) -> "list[FrozenTrial]":
        """Trials by number, of the named states; of all states if none is named."""
        return [t for t in self.study.get_trials(deepcopy=False) if not states or t.state.name in states]

    def best(self) -> "FrozenTrial | None":
        """The complete trial of least value."""
        return min(self.trials("COMPLETE"), key=lambda trial: trial.values[0], default=None)

    @property
    def finished(self) -> bool:
        """Whether it has `tune.trials` trials, over all sittings."""
        return len(self.trials(*COUNTED)) >= self.config.trials

    def claim(self) -> "Trial | None":
        """The next trial for this process; None if as many are finished or at work as there are to be.

        A trial that somebody left is tried again before a new one is proposed. The first proposal is what params.yaml
        has, so that the best is never worse than that; others of `first_settings` follow, for up to half of the study,
        if they were not tried yet.
        """
        with self.alone():
            self.recover()
            if len(self.trials(*COUNTED, "RUNNING")) >= self.config.trials:
                return None
            firsts = first_settings(self.params, self.space)[: max(1, self.config.trials // 2)]
            tried = [trial.system_attrs.get("fixed_params", trial.params) for trial in self.trials()]
            new = [setting for setting in firsts if setting not in tried]
            if new and not self.trials("WAITING"):
                self.study.enqueue_trial(new[0])
            waiting = self.trials("WAITING")  # asked for first
            self.study.sampler = self._sampler(waiting[0].number if waiting else len(self.trials()))
            with quiet():  # it would say that heartbeats are ours to send, which is so
                trial = self.study.ask()
            self.storage.record_heartbeat(trial._trial_id)  # else nobody could take it over before `beating`
            mine = signature()
            for key, value in {**mine, "stopped": False, "final": False, "reason": ""}.items():
                trial.set_user_attr(key, value)
            return trial

    def recover(self) -> None:
        """Mark trials FAIL whose process is gone, and let them be tried again; the caller is `alone`."""
        import optuna

        here = machine()
        for trial in self.trials("RUNNING"):
            # Of a claim that was cut short there may be no signature: its process let go of the lock by dying.
            whole = set(WHO) <= set(trial.user_attrs)
            if whole and trial.user_attrs["machine"] != here:
                continue  # its heart tells
            if whole and is_alive(trial.user_attrs):
                self.storage.record_heartbeat(trial._trial_id)  # after a suspension its own comes late
                continue
            # Postgres may still complete it, as its worker's last words asked: then it counts.
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        with quiet():
            optuna.storages.fail_stale_trials(self.study)  # of other machines
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
        everyone = self.trials()
        retried = {number for trial in everyone for number in trial.system_attrs.get("retry_history", [])}
        for trial in everyone:
            if trial.state.name == "FAIL" and not trial.user_attrs.get("final") and trial.number not in retried:
                history = [everyone[n] for n in trial.system_attrs.get("retry_history", [])] + [trial]
                if sum(not t.user_attrs.get("stopped") for t in history) <= MAX_KILLS:
                    left = copy.deepcopy(trial)  # it writes into what it is given
                    left.user_attrs = {key: value for key, value in left.user_attrs.items() if key not in WHO}
                    again(self.study, left)

    def tell(self, trial: "Trial", state: str, value: float | None = None, **attributes: object) -> bool:
        """End `trial` (COMPLETE with its value, PRUNED, FAIL); False if it was taken from this process meanwhile.

        A FAIL without the attribute `final` is tried again.
        """
        import optuna

        with self.alone():  # else a trial could be ended here and given to another at once
            if self.trials()[trial.number].state.name != "RUNNING":
                return False
            for key, text in attributes.items():
                trial.set_user_attr(key, text)
            self.study.tell(trial, value, state=optuna.trial.TrialState[state])
            return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other workers of the study out, on every machine."""
        if self.storage.engine.dialect.name == "sqlite":
            with FileLock(f"{self.storage.engine.url.database}.lock", timeout=BUSY_SECONDS):
                yield
        else:
            with self.storage.engine.begin() as connection:  # the lock ends with it
                for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):  # of a machine that is cut off
                    connection.exec_driver_sql(f"SET LOCAL {limit} = '{BUSY_SECONDS}s'")
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({int(self.name[:15], 16)})")
                yield

    @contextmanager
    def beating(self, trial: "Trial") -> Iterator[None]:
        """Tell other machines every HEARTBEAT_SECONDS that `trial` is at work."""
        over = threading.Event()

        def beat() -> None:
            while True:
                with suppress(Exception):  # a store that is away for a moment must not end the training
                    self.storage.record_heartbeat(trial._trial_id)
                if over.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(BUSY_SECONDS)

    def _sampler(self, number: int) -> Any:
        """The sampler for a trial by its number, with random numbers of its own: no sitting or worker repeats any.

        GPs learn nothing from pruned trials and would propose the same again: after one the next is drawn at random.
        """
        from optuna import samplers

        own, config = self.config.seed, self.config
        seed = generator(self.params.seed if own is None else own, "tune", number).initial_seed() % 2**32
        startup = min(10, max(2, config.trials // 3))  # random; Optuna's 10 would leave a short study no search
        make: dict[str, Callable[[], Any]] = {
            "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=startup),
            "random": lambda: samplers.RandomSampler(seed=seed),
            "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=startup),
        }
        ended = self.trials(*COUNTED)
        stuck = config.sampler == "gp" and ended and ended[-1].state.name == "PRUNED"
        with quiet():
            return make["random" if stuck else config.sampler]()
