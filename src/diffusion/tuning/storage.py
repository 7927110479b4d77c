"""Where a study is kept: an SQLite file or a Postgres database, and what becomes of its errors."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from diffusion import paths
from diffusion.config import TuneConfig
from diffusion.errors import UserError, brief, checked_url

SQLITE_WORKERS = 4
BUSY_SECONDS = 60  # for another process to finish its write
HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # between heartbeats of a trial; without one for so long it is retried
OTHER_STORE = (
    "set tune.storage: postgresql://USER:PASSWORD@HOST/DATABASE, or run `make tune STORAGE=postgresql://...` "
    "(one database for all machines; driver: pip install psycopg2-binary)"
)


def storage_url(config: TuneConfig) -> str:
    """SQLAlchemy's URL of the store: OPTUNA_STORAGE, Optuna's own variable, or `tune.storage`, or optuna/study.db.

    Raises:
        UserError: it is no URL, or SQLite is to take too many workers, or no file.
    """
    name = "OPTUNA_STORAGE" if os.environ.get("OPTUNA_STORAGE") else "tune.storage"
    text = os.environ.get("OPTUNA_STORAGE") or config.storage or f"sqlite:///{paths.OPTUNA_DB.as_posix()}"
    try:
        url = make_url(checked_url(name, text))
    except ArgumentError:
        raise UserError(f"{name} is no URL: {OTHER_STORE}") from None
    if url.get_backend_name() != "sqlite":
        return text.replace("postgresql://", "postgresql+psycopg2://", 1)  # SQLAlchemy's own choice changes
    if not url.database or url.database.startswith((":memory:", "file:")):
        raise UserError(
            f"{name} = {text} names no file, so that workers could not share it: give sqlite:///FOLDER/FILE"
        )
    if config.workers > SQLITE_WORKERS:
        raise UserError(
            f"tune.workers = {config.workers} is more than {SQLITE_WORKERS}: SQLite locks its whole file for each "
            f"write; {OTHER_STORE}"
        )
    return f"sqlite:///{url.database}"


class Storage(RDBStorage):
    """Optuna's, whose heartbeat goes on after an outage: in Optuna's own the thread would end with a traceback."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError, SQLAlchemyError):
            super().record_heartbeat(trial_id)


def open_storage(url: str, retry: RetryHeartbeatStaleTrialCallback) -> Storage:
    """The store at `storage_url`'s address, its tables made if need be.

    Raises:
        UserError: it does not answer, is none, or is of another version.
    """
    sqlite = url.startswith("sqlite")
    if sqlite:
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(3):
        try:
            with quiet():
                storage = Storage(
                    url,
                    options,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=retry,
                )
            if sqlite:
                with storage.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # stays with the file
            return storage
        except Exception as error:  # the driver's, SQLAlchemy's or Optuna's own
            reason = brief(error)
            time.sleep(attempt)  # another machine may be making the tables at this moment
    raise UserError(f"the store {url} cannot be used ({reason}): start it, or name another in tune.storage")


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
        raise UserError(f"the store does not answer ({brief(error, 160)}); `make tune` goes on when it does") from None


def is_outage(error: BaseException) -> bool:
    """Whether the store does not answer: no fault of a trial."""
    return isinstance(error, StorageInternalError | SQLAlchemyError)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings: heartbeats, some samplers and charts are experimental, few trials make odd axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
