"""One MLflow run for the whole pipeline, and beside it a local journal that is the truth of which MLflow is a copy.

Every call becomes an event that goes to the journal (JSONL) first and then to a background thread, which copies it to
MLflow in batches: a step never waits, and a store that is away costs one warning line. MLflow is given the event's own
time, so sending an event twice changes nothing: it keeps one point for equal (key, step, time, value).
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusion.config import TrackingConfig
from diffusion.tracking import mlproject_run
from diffusion.tracking.journal import JOURNAL, Event, Journal, Status, Tracker, remember, remembered, unsent, warn
from diffusion.tracking.mlflow_store import connect, enter, is_embedded, signature
from diffusion.tracking.mlflow_tracker import JournalledTracker, MlflowTracker
from diffusion.tracking.mlflow_writer import Register, RunWriter
from diffusion.tracking.retry_queue import brief


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
    tags = {**signature(), **tags}
    run_id = run_id or remembered(path)
    earlier, journal, mirror = unsent(path), Journal(path), None
    homeless = [sitting.opened.data for sitting in earlier if sitting.run_id is None]
    if homeless and run_id is None:
        name = homeless[0]["name"]
    all_tags = {key: value for opened in homeless for key, value in opened["tags"].items()} | tags
    if config.enabled:
        try:
            client = connect()
            adopted = (
                mlproject_run.adopt(client, config.experiment, name) if run_id is None and stage == "train" else None
            )
            entered = enter(client, config.experiment, run_id or adopted, name, all_tags)
            mlproject_run.link(client, entered)
            mirror = MlflowTracker(RunWriter(client, entered, register), path, patient=is_embedded(client.tracking_uri))
        except Exception as error:  # not installed, no network, full disk, refused: the answer is the same
            warn(f"no MLflow ({brief(error)}); going on with {path} alone")
    opened = {"stage": stage, "name": name, "run_id": mirror and mirror.run_id, "asked_run_id": run_id, "tags": tags}
    journal.record(Event("open", {**opened, "experiment": config.experiment}, time.time_ns() // 1_000_000))
    if mirror is None:
        return journal
    if mirror.run_id and (stage == "train" or run_id is None):
        remember(path, mirror.run_id)
    missing = [sitting for sitting in earlier if sitting.run_id in (None, mirror.run_id)]
    for event in itertools.chain.from_iterable(sitting.events for sitting in missing):
        if event.kind != "close":  # this sitting's end is the run's
            mirror.record(event, replayed=True)
    return JournalledTracker(journal, mirror, path, complete=len(missing) == len(earlier))


def _ending(error: BaseException) -> tuple[Status, str]:
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED", ""
        if not isinstance(error.code, int) or error.code < 128:  # 128 + n is the exit of signal n
            return "FAILED", f"exit: {error.code}"
    if not isinstance(error, Exception):
        return "KILLED", ""
    return "FAILED", f"{type(error).__name__}: {error}"
