"""One MLflow run for the whole pipeline: opened by `train`, entered again by later stages, closed with the truth.

Every call becomes a line of the journal (journal.py), which a thread copies to MLflow (mlflow_copy.py): a step never
waits, and a store that is away costs one warning line.
"""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusion.config import TrackingConfig
from diffusion.errors import UserError, brief
from diffusion.tracking import mlproject_run
from diffusion.tracking.journal import JOURNAL, Journal, end_dead, remembered, unsent
from diffusion.tracking.mlflow_copy import CopiedJournal
from diffusion.tracking.mlflow_store import answers, connect, enter
from diffusion.tracking.mlflow_writer import Register, RunWriter
from diffusion.tracking.tracker import Event, Status, Tracker, now, warn


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    run_folder: Path,  # the journal goes here
    run_id: str | None = None,  # of the training that is resumed
    tags: Mapping[str, str] | None = None,
    register: Register | None = None,  # what writes models to MLflow
) -> Tracker:
    """Open the pipeline's run, or go on with `run_id` if the store knows it; its status becomes RUNNING.

    Never raises because of MLflow: without it there is one warning line and the journal alone.
    """
    return _open(
        config, run_folder / JOURNAL, stage="train", name=name, run_id=run_id, tags=tags or {}, register=register
    )


def attach(
    config: TrackingConfig,
    run_id: str | None,
    *,
    stage: str,
    journal: Path,
    card: Mapping[str, Any] = MappingProxyType({}),  # the model's, or one that has copies of what it says
    register: Register | None = None,  # what writes models to MLflow
) -> Tracker:
    """Let a later stage write to the run that `train` opened; RUNNING until it is closed again.

    Where the store does not know the id (the model came from another machine) the stages share a new run that is
    tagged `linked_run_id` and gets its name and tags from `card`. Otherwise as `open_run`.
    """
    known = {"data.digest": card.get("data_digest"), "fingerprint": card.get("fingerprint"), **card.get("origin", {})}
    tags = {key: str(value) for key, value in known.items() if value is not None}
    name = card.get("name") or card.get("fingerprint") or stage
    return _open(config, journal, stage=stage, name=name, run_id=run_id, tags=tags, register=register)


@contextmanager
def closing_status(tracker: Tracker, stage: str) -> Iterator[Tracker]:
    """Close with the truth: FINISHED, KILLED (Ctrl-C or a signal's exit), or FAILED with the message as tag `error`.

    How long the stage took becomes the tag seconds.<stage>.
    """
    start = time.perf_counter()
    ending: tuple[Status, str] = ("FINISHED", "")
    try:
        yield tracker
    except BaseException as error:
        ending = _ending(error)
        raise
    finally:
        tracker.tags({f"seconds.{stage}": f"{time.perf_counter() - start:.1f}"})
        tracker.close(*ending)


def _open(
    config: TrackingConfig,
    path: Path,
    *,
    stage: str,
    name: str,
    run_id: str | None,
    tags: Mapping[str, str],
    register: Register | None,
) -> Tracker:
    run_id = run_id or remembered(path)
    opened = {"stage": stage, "name": name, "asked_run_id": run_id, "tags": {"host": socket.gethostname(), **tags}}
    journal: Journal | None = None
    if config.enabled:
        try:
            journal = _copied(config, path, opened, register)
        except Exception as error:  # not installed, no network, full disk, refused: the answer is the same
            reason = str(error) if isinstance(error, UserError) else brief(f"{type(error).__name__}: {error}", 160)
            warn(f"no MLflow ({reason}); only {path} records this")
    journal = journal or Journal(path)
    about = {**opened, "run_id": journal.run_id, "experiment": config.experiment, "enabled": config.enabled}
    journal.record(Event("open", about, now()))
    return journal


def _copied(config: TrackingConfig, path: Path, opened: Mapping[str, Any], register: Register | None) -> CopiedJournal:
    """The journal with its run entered in MLflow, which also gets what earlier sessions could not send."""
    client = connect()
    if not answers(client):
        raise ConnectionError("the server does not answer")
    run_id, name, tags = opened["asked_run_id"], opened["name"], opened["tags"]
    end_dead(path)
    earlier = [session for session in unsent(path) if session.is_closed]  # others are at work
    homeless = [session.opened.data for session in earlier if session.run_id is None]
    if homeless and run_id is None:
        name = homeless[0]["name"]
    for missed in reversed(homeless):
        tags = {**missed["tags"], **tags}
    if run_id is None and opened["stage"] == "train":
        run_id = mlproject_run.adopt(client, config.experiment, name)
    entered = enter(client, config.experiment, run_id, name, tags)
    mlproject_run.link(client, entered)
    mine = [session for session in earlier if session.run_id in (None, entered)]
    return CopiedJournal(path, RunWriter(client, entered, register), mine)


def _ending(error: BaseException) -> tuple[Status, str]:
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED", ""
        if not isinstance(error.code, int) or error.code < 128:  # 128 + n is the exit of signal n
            return "FAILED", f"exit: {error.code}"
    if not isinstance(error, Exception):
        return "KILLED", ""
    return "FAILED", f"{type(error).__name__}: {error}"
