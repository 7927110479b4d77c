"""One MLflow run for the whole pipeline, and beside it a local journal that is the truth of which MLflow is a copy.

Every call becomes an event that goes to the journal (JSONL) first and then to a background thread, which copies it to
MLflow in batches: a step never waits, and a store that is away costs one warning line. MLflow is given the event's own
time, so sending an event twice changes nothing: it keeps one point for equal (key, step, time, value).
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from filelock import FileLock

from diffusion import paths
from diffusion.config import TrackingConfig
from diffusion.journal import JOURNAL, Event, Journal, NullTracker, Status, Tracker, warn
from diffusion.outbox import POINTS_PER_BATCH, Lane, is_refusal

GATHER_SECONDS = 1.0  # how long points gather before they are written together
CLOSE_SECONDS = 5.0  # close() gives up when the store has not moved for so long
UPLOAD_SECONDS = 60.0  # the same while a file is on its way and nothing has failed
CREATE_SECONDS = 120.0  # for another process to make the database
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}  # else `make ui` opens on pages for LLMs
PAIRS_PER_BATCH = 100  # MLflow's limits
PARAM_CHARS = 6000
TAG_CHARS = 8000


class MlflowTracker(NullTracker):
    """Copies events to one MLflow run from a background thread, in order.

    A call that the store does not answer is repeated with a growing pause; one that it refuses for good (bad name,
    deleted run, missing file) is dropped and named once on stderr. Files have a lane of their own, so that an artifact
    store that is away does not hold back the curves.
    """

    def __init__(self, client: Any, run_id: str, journal: Path) -> None:
        self.run_id = run_id
        self._client, self._journal = client, journal
        self._curves, self._files = self._lanes = (Lane(self._send, self._report), Lane(self._upload, self._report))
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._end: Event | None = None
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{run_id}", daemon=True)
        self._thread.start()

    def record(self, event: Event) -> None:
        if event.kind == "close":
            self._end = event
        elif event.kind != "open":
            (self._files if event.kind == "artifact" else self._curves).push(event)

    def finish(self) -> None:
        """Wait for the thread while it makes progress; abandon it when it does not."""
        self._closing.set()
        started = time.monotonic()
        while self._thread.is_alive() and not self._stalled(started):
            self._thread.join(0.1)
        self._abandoned.set()
        left = sum(lane.dropped + len(lane.waiting) for lane in self._lanes)
        if left:
            warn(f"{left} events did not reach MLflow run {self.run_id}; they are in {self._journal}")

    def _stalled(self, started: float) -> bool:
        failing = any(lane.failures for lane in self._lanes)
        since = started if failing else max(started, *(lane.moved for lane in self._lanes))
        uploading = self._files.waiting and not self._curves.waiting and not failing
        return time.monotonic() - since > (UPLOAD_SECONDS if uploading else CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._closing.wait(GATHER_SECONDS):
            for lane in self._lanes:
                lane.drain()
        for lane in self._lanes:
            lane.retry_at = 0.0  # an outage may just have ended
            lane.drain()
        if self._end:
            self._curves.push(self._end)  # the status comes last
        while not self._abandoned.is_set():
            for lane in self._lanes:
                lane.drain()
            if not any(lane.waiting for lane in self._lanes):
                return
            self._abandoned.wait(0.1)

    def _report(self, event: Event, error: Exception | None) -> None:
        """Say an outage once when it begins and once when it ends (no error), and each kind of refusal once."""
        failing = sum(lane.failures for lane in self._lanes)
        text = ""
        if error is None:
            text = "MLflow answers again" if not failing else ""
        elif is_refusal(error):
            text = f"MLflow refuses {event.kind} ({_brief(error)}); kept in {self._journal}"
            text = "" if text in self._said else text
            self._said.add(text)
        elif failing == 1:
            text = f"MLflow does not answer ({_brief(error)}); going on, all is kept in {self._journal}"
        if text and not self._abandoned.is_set():
            warn(text)

    def _send(self, batch: list[Event]) -> None:
        """Write metric events, or one event of another kind."""
        from mlflow.entities import Metric, Param, RunTag

        kind, data = batch[0].kind, batch[0].data
        if kind == "metrics":
            points = [Metric(k, v, e.time, e.data["step"]) for e in batch for k, v in e.data["values"].items()]
            self._log("metrics", points, POINTS_PER_BATCH)
        elif kind == "params":
            known = self._client.get_run(self.run_id).data.params  # a second, different value would be refused
            new = [Param(key, _text(value)[:PARAM_CHARS]) for key, value in data.items() if key not in known]
            self._log("params", new, PAIRS_PER_BATCH)
        elif kind == "tags":
            self._log("tags", [RunTag(key, value[:TAG_CHARS]) for key, value in data.items()], PAIRS_PER_BATCH)
        elif kind == "close":
            if data["message"]:
                self._client.set_tag(self.run_id, "error", data["message"][:TAG_CHARS])
            self._client.set_terminated(self.run_id, data["status"], batch[0].time)

    def _log(self, kind: str, entities: list[Any], most: int) -> None:
        for start in range(0, len(entities), most):
            self._client.log_batch(self.run_id, **{kind: entities[start : start + most]}, synchronous=True)

    def _upload(self, batch: list[Event]) -> None:
        path, folder = Path(batch[0].data["path"]), batch[0].data["folder"] or None
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder)


class JournalledTracker(NullTracker):
    """Journal first, then MLflow."""

    def __init__(self, journal: Journal, mirror: MlflowTracker) -> None:
        self.run_id = mirror.run_id
        self._sinks = (journal, mirror)

    def record(self, event: Event) -> None:
        for sink in self._sinks:
            sink.record(event)

    def finish(self) -> None:
        for sink in self._sinks:
            sink.finish()


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    run_folder: Path,  # the journal goes here
    run_id: str | None = None,  # of the training that is resumed
    tags: Mapping[str, str] | None = None,
) -> Tracker:
    """Open the pipeline's run, or go on with `run_id` if the store knows it; its status becomes RUNNING.

    Never raises because of MLflow: without it there is one warning line and the journal alone.
    """
    return _open(config, run_folder / JOURNAL, stage="train", name=name, run_id=run_id, tags=tags or {})


def attach(config: TrackingConfig, run_id: str | None, *, stage: str, journal: Path) -> Tracker:
    """Let a later stage write to the run that `train` opened; RUNNING until it is closed again.

    Where the store does not know the id (the model came from another machine) the stages share a new run that is
    tagged `linked_run_id`. Otherwise as `open_run`.
    """
    return _open(config, journal, stage=stage, name=stage, run_id=run_id, tags={})


@contextmanager
def closing_status(tracker: Tracker) -> Iterator[Tracker]:
    """Close with the truth: FINISHED, KILLED (Ctrl-C or a signal's exit), or FAILED with the message as tag `error`."""
    try:
        yield tracker
    except BaseException as error:
        tracker.close(*_ending(error))
        raise
    tracker.close("FINISHED")


def _open(
    config: TrackingConfig, path: Path, *, stage: str, name: str, run_id: str | None, tags: Mapping[str, str]
) -> Tracker:
    tags = {"host": socket.gethostname(), "pid": str(os.getpid()), **tags}
    journal, mirror = Journal(path), None
    if config.enabled:
        try:
            client = _client()
            mirror = MlflowTracker(client, _enter(client, config.experiment, run_id, name, tags), path)
        except Exception as error:  # not installed, no network, full disk, refused: the answer is the same
            warn(f"no MLflow ({_brief(error)}); going on with {path} alone")
    opened = {"stage": stage, "name": name, "run_id": mirror and mirror.run_id, "asked_run_id": run_id, "tags": tags}
    journal.record(Event("open", {**opened, "experiment": config.experiment}, time.time_ns() // 1_000_000))
    return JournalledTracker(journal, mirror) if mirror else journal


def _client() -> Any:
    """MLflow's client of the store; quiet, and quick to give up, unless the user's environment says otherwise."""
    wishes = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    for key, value in wishes.items():  # read when mlflow is imported
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces every retry
    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or prepare_store())


def prepare_store() -> str:
    """URI of the repository's own store, its tables made if need be."""
    _create_database(paths.MLFLOW_DB.absolute())
    return _sqlite(paths.MLFLOW_DB.absolute())


def _create_database(path: Path) -> None:
    """Let MLflow make its tables aside, then move the file into place.

    Two processes that make them in one file at once, or one that is killed meanwhile, leave a database that MLflow
    (3.17) never opens again.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=CREATE_SECONDS):
        if not path.exists():
            new = Path(f"{path}.new")
            new.unlink(missing_ok=True)
            MlflowClient(_sqlite(new)).search_experiments(max_results=1)
            new.replace(path)


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path.as_posix()}"


def _enter(client: Any, experiment: str, run_id: str | None, name: str, tags: Mapping[str, str]) -> str:
    """Id of the run to write to, its status RUNNING."""
    from mlflow.entities import RunTag

    experiment_id = _experiment(client, experiment)
    run = _known(client, experiment_id, run_id) if run_id else None
    if run is None:
        link = {"linked_run_id": run_id} if run_id else {}
        return str(client.create_run(experiment_id, run_name=name, tags={**tags, **link}).info.run_id)
    found = run.info.run_id
    client.update_run(found, status="RUNNING")
    client.log_batch(found, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
    if "error" in run.data.tags:
        client.delete_tag(found, "error")
    return str(found)


def _known(client: Any, experiment_id: str, run_id: str) -> Any | None:
    """The run, or one that stands for it here; None if the store has neither."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_refusal(error):
            raise
    else:
        if run.info.lifecycle_stage == "active":
            return run
    if not re.fullmatch(r"[\w-]+", run_id):  # it would not survive the quotes
        return None
    return next(iter(client.search_runs([experiment_id], f"tags.linked_run_id = '{run_id}'", max_results=1)), None)


def _experiment(client: Any, name: str) -> str:
    """Id of the experiment, created if need be; in a database of our own its files go below paths.MLFLOW_ARTIFACTS."""
    local = not client.tracking_uri.startswith(("http:", "https:", "databricks"))
    found = client.get_experiment_by_name(name)
    if found is None:
        if local:
            paths.MLFLOW_ARTIFACTS.mkdir(parents=True, exist_ok=True)
        try:
            location = paths.MLFLOW_ARTIFACTS.absolute().as_uri() if local else None
            return str(client.create_experiment(name, artifact_location=location, tags=TRAINING_PAGES))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process may have been first
            if found is None:
                raise
    location = urlparse(found.artifact_location)
    if local and location.scheme in ("", "file"):
        folder = Path(url2pathname(location.path))
        if folder != paths.MLFLOW_ARTIFACTS.absolute() and not folder.exists():
            warn(f"experiment {name} keeps its files in {folder}, which is gone (moved?): they are written there anew")
    return str(found.experiment_id)


def _ending(error: BaseException) -> tuple[Status, str]:
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED", ""
        if not isinstance(error.code, int) or error.code < 128:  # 128 + n is the exit of signal n
            return "FAILED", f"exit: {error.code}"
    if not isinstance(error, Exception):
        return "KILLED", ""
    return "FAILED", f"{type(error).__name__}: {error}"


def _text(value: object) -> str:
    """A parameter as params.yaml spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _brief(error: Exception) -> str:
    """First line of an error, short."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:157] + "..."
