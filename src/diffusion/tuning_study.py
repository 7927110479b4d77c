"""One study in one database, shared by workers, machines and sittings: who takes the next trial, and who has died.

SQLite or Postgres. All that must not happen twice at once (count, take over, ask) is done under one lock, which the
system lets go of when its holder dies.
"""

import copy
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from diffusion import paths
from diffusion.config import Params, TuneConfig
from diffusion.errors import UserError
from diffusion.mlflow_store import is_alive, signature
from diffusion.runtime import generator
from diffusion.tuning_space import first_settings, read_space

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

COUNTED = ("COMPLETE", "PRUNED")  # states that use up one of `tune.trials`
SQLITE_WORKERS = 4
BUSY_SECONDS = 60  # for another process to finish its write
HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # how another machine knows that a trial's worker lives
MAX_KILLS = 10  # of one setting; it may be the setting that kills
OTHER_STORE = (
    "set tune.storage: postgresql://USER:PASSWORD@HOST/DATABASE, or run `make tune STORAGE=postgresql://...` "
    "(one database for all machines; driver: pip install psycopg2-binary)"
)


def storage_url(config: TuneConfig) -> str:
    """SQLAlchemy's URL of the store: OPTUNA_STORAGE, Optuna's own variable, or `tune.storage`, or optuna/study.db.

    Raises:
        UserError: it names another kind of store, its driver is missing, or SQLite is to take too many workers.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    variable = os.environ.get("OPTUNA_STORAGE")
    text = variable or config.storage or f"sqlite:///{paths.OPTUNA_DB.as_posix()}"
    source = f"{'OPTUNA_STORAGE' if variable else 'tune.storage'} = {shown(text)}"
    try:
        url = make_url(text)
    except ArgumentError:
        raise UserError(f"{source}: {OTHER_STORE}") from None
    if url.drivername in ("postgres", "postgresql"):
        if find_spec("psycopg2") is None:
            raise UserError("a Postgres store needs a driver: pip install psycopg2-binary")
        return url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    if url.drivername.startswith("postgresql+"):
        return text
    if url.drivername.partition("+")[0] != "sqlite":
        raise UserError(f"{source} is neither SQLite nor Postgres: {OTHER_STORE}")
    if not url.database or url.database.startswith((":memory:", "file:")):
        raise UserError(f"{source} names no file, so that workers could not share it: give sqlite:///FOLDER/FILE")
    if config.workers > SQLITE_WORKERS:
        raise UserError(
            f"tune.workers = {config.workers} is more than {SQLITE_WORKERS}: SQLite locks its whole file for each "
            f"write; {OTHER_STORE}"
        )
    return f"sqlite:///{url.database}"


def shown(url: str) -> str:
    """A store's URL without its password, which may stand in its query too."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:
        return "what is no URL"


class SharedStudy:
    """A study as one process sees it."""

    def __init__(self, name: str, params: Params, url: str) -> None:
        """The study of that name, new or as it was left.

        Raises:
            UserError: the store does not answer, or is of another version.
        """
        import optuna

        from diffusion.tuning_pruner import make_pruner

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name, self.params, self.config, self.space = name, params, params.tune, read_space(params)
        self.storage = _open_storage(url)
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
        has, so that the best is never worse than that; others of `first_settings` follow, for up to half of the study.
        """
        with self.alone():
            self.recover()
            if len(self.trials(*COUNTED, "RUNNING")) >= self.config.trials:
                return None
            firsts = first_settings(self.params, self.space)[: max(1, self.config.trials // 2)]
            proposed = sum("failed_trial" not in trial.system_attrs for trial in self.trials())
            if proposed < len(firsts) and not self.trials("WAITING"):
                self.study.enqueue_trial(firsts[proposed])
            waiting = self.trials("WAITING")  # asked for first
            self.study.sampler = self._sampler(waiting[0].number if waiting else len(self.trials()))
            with quiet():  # it would say that heartbeats are ours to send, which is so
                trial = self.study.ask()
            self.storage.record_heartbeat(trial._trial_id)  # else nobody could take it over before `beating`
            for key, value in {**signature(), "stopped": False, "final": False, "reason": ""}.items():
                trial.set_user_attr(key, value)
            return trial

    def recover(self) -> None:
        """Mark trials FAIL whose process is gone, and let them be tried again; the caller is `alone`."""
        import optuna

        for trial in self.trials("RUNNING"):
            # Of a claim that was cut short there may be no signature: its process let go of the lock by dying.
            if not ({"host", "pid"} <= set(trial.user_attrs) and is_alive(trial.user_attrs)):
                # Postgres may still complete it, as its worker's last words asked: then it counts.
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            elif trial.user_attrs["host"] == signature()["host"]:
                self.storage.record_heartbeat(trial._trial_id)  # after a suspension its own comes late
        with quiet():
            optuna.storages.fail_stale_trials(self.study)  # of other machines
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
        everyone = self.trials()
        retried = {number for trial in everyone for number in trial.system_attrs.get("retry_history", [])}
        for trial in everyone:
            if trial.state.name == "FAIL" and not trial.user_attrs.get("final") and trial.number not in retried:
                history = [everyone[n] for n in trial.system_attrs.get("retry_history", [])] + [trial]
                if sum(not t.user_attrs.get("stopped") for t in history) <= MAX_KILLS:
                    again(self.study, copy.deepcopy(trial))  # it writes into what it is given

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


def _open_storage(url: str) -> "RDBStorage":
    from optuna.storages import RDBStorage

    sqlite = url.startswith("sqlite")
    if sqlite:
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(3):
        try:
            with quiet():
                storage = RDBStorage(url, options, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)
            if sqlite:
                with storage.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # stays with the file
            return storage
        except Exception as error:  # the driver's, SQLAlchemy's or Optuna's own
            reason = " ".join(str(error).split())[:200]
            time.sleep(attempt)  # another machine may be making the tables at this moment
    raise UserError(f"the store {shown(url)} cannot be used ({reason}): start it, or name another in tune.storage")


@contextmanager
def answering() -> Iterator[None]:
    """Turn the errors of a store that goes away meanwhile into one line.

    Raises:
        UserError: in place of SQLAlchemy's and Optuna's.
    """
    try:
        yield
    except Exception as error:
        if not is_outage(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the store does not answer ({reason}); `make tune` goes on when it does") from None


def is_outage(error: BaseException) -> bool:
    """Whether the store does not answer: no fault of a trial."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, StorageInternalError | SQLAlchemyError | Timeout)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings: heartbeats, some samplers and charts are experimental, few trials make odd axes."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
