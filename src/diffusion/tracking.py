"""One MLflow run for the whole pipeline, and beside it a local journal that is the truth of which MLflow is a copy.

Every call becomes an event that goes to the journal (JSONL) first and then to a background thread, which copies it to
MLflow in batches: a step never waits, and a store that is away costs one warning line. MLflow is given the event's own
time, so sending an event twice changes nothing: it keeps one point for equal (key, step, time, value).
"""

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion import project_run
from diffusion.config import TrackingConfig
from diffusion.journal import (
    JOURNAL,
    Event,
    Journal,
    NullTracker,
    Sitting,
    Status,
    Tracker,
    mark_sent,
    unsent,
    warn,
)
from diffusion.mlflow_store import connect, enter, is_alive, signature
from diffusion.mlflow_writer import RunWriter
from diffusion.outbox import Lane, is_refusal

GATHER_SECONDS = 1.0  # how long points gather before they are written together
CLOSE_SECONDS = 5.0  # close() gives up when the store has not moved for so long
UPLOAD_SECONDS = 60.0  # the same while a file is on its way and nothing has failed
FILES = ("artifact", "image", "model")


class MlflowTracker(NullTracker):
    """Copies events to one MLflow run from a background thread, in order.

    A call that the store does not answer is repeated with a growing pause; one that it refuses for good (bad name,
    deleted run, missing file) is dropped and named once on stderr. Files have a lane of their own, so that an artifact
    store that is away does not hold back the curves.
    """

    def __init__(self, writer: RunWriter, journal: Path) -> None:
        self.run_id, self._journal = writer.run_id, journal
        self._curves, self._files = self._lanes = (Lane(writer.send, self._report), Lane(writer.upload, self._report))
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._end: Event | None = None
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{writer.run_id}", daemon=True)
        self._thread.start()

    def record(self, event: Event, *, replayed: bool = False) -> None:
        if event.kind == "close":
            self._end = event
        elif event.kind != "open":
            (self._files if event.kind in FILES else self._curves).push(event, replayed=replayed)

    def finish(self) -> None:
        """Wait for the thread while it makes progress; abandon it when it does not."""
        self._closing.set()
        started = time.monotonic()
        while self._thread.is_alive() and not self._stalled(started):
            self._thread.join(0.1)
        self._abandoned.set()
        left = self.pending + sum(lane.refused for lane in self._lanes)
        if left:
            hint = ": `make sync` sends them, or the next stage" if self.pending else ""
            warn(f"{left} events did not reach MLflow run {self.run_id}; they are in {self._journal}{hint}")

    @property
    def pending(self) -> int:
        """Events that the store does not have and would take."""
        return sum(lane.dropped - lane.refused + len(lane.waiting) for lane in self._lanes)

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


class JournalledTracker(NullTracker):
    """Journal first, then MLflow; once MLflow has everything, the journal is marked as sent."""

    def __init__(self, journal: Journal, mirror: MlflowTracker, path: Path, *, complete: bool) -> None:
        self.run_id, self._journal, self._mirror = mirror.run_id, journal, mirror
        self._path, self._complete = path, complete

    def record(self, event: Event) -> None:
        self._journal.record(event)
        self._mirror.record(event)

    def keep(self, path: Path, folder: str) -> Path:
        return self._journal.keep(path, folder)

    def finish(self) -> None:
        self._journal.finish()
        self._mirror.finish()
        if self._complete and not self._mirror.pending:
            mark_sent(self._path, self._journal.seq)


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
    config: TrackingConfig, path: Path, *, stage: str, name: str, run_id: str | None, tags: Mapping[str, str]
) -> Tracker:
    tags = {**signature(), **tags}
    memory = path.with_name("mlflow_run_id")
    if run_id is None and memory.exists():
        run_id = memory.read_text().strip()
    earlier, journal, mirror = unsent(path), Journal(path), None
    if config.enabled:
        try:
            client = connect()
            adopted = (
                project_run.adopt(client, config.experiment, name) if run_id is None and stage == "train" else None
            )
            entered = enter(client, config.experiment, run_id or adopted, name, tags)
            project_run.link(client, entered)
            mirror = MlflowTracker(RunWriter(client, entered), path)
        except Exception as error:  # not installed, no network, full disk, refused: the answer is the same
            warn(f"no MLflow ({_brief(error)}); going on with {path} alone")
    opened = {"stage": stage, "name": name, "run_id": mirror and mirror.run_id, "asked_run_id": run_id, "tags": tags}
    journal.record(Event("open", {**opened, "experiment": config.experiment}, time.time_ns() // 1_000_000))
    if mirror is None:
        return journal
    if mirror.run_id and (stage == "train" or run_id is None):
        _remember(memory, mirror.run_id)
    missing = [sitting for sitting in earlier if sitting.run_id in (None, mirror.run_id)]
    for event in itertools.chain.from_iterable(sitting.events for sitting in missing):
        if event.kind != "close":  # this sitting's end is the run's
            mirror.record(event, replayed=True)
    return JournalledTracker(journal, mirror, path, complete=len(missing) == len(earlier))


def _remember(memory: Path, run_id: str) -> None:
    try:
        memory.write_text(run_id + "\n")
    except OSError as error:
        warn(f"{memory} cannot be written ({error.strerror}): if this is resumed, it opens another MLflow run")


def sync(path: Path, client: Any) -> str:
    """Send MLflow what it lacks of a journal: in words what was done, or why it was not.

    Sittings that wrote to no run share the run of the others, or a new one.
    """
    sittings = unsent(path)
    if not sittings:
        return "up to date"
    last = sittings[-1]
    if is_alive(last.opened.data["tags"]) and not any(event.kind == "close" for event in last.events):
        return "in use: its process sends it"
    for run_id in dict.fromkeys(_target(sitting, path, client) for sitting in sittings):
        mirror = MlflowTracker(RunWriter(client, run_id), path)
        for sitting in sittings:
            if _target(sitting, path, client) == run_id:
                for event in sitting.events:
                    mirror.record(event, replayed=True)
                if not any(event.kind == "close" for event in sitting.events):
                    end = [sitting.opened, *sitting.events][-1].time
                    mirror.record(Event("close", {"status": "KILLED", "message": ""}, end))
        mirror.finish()
        if mirror.pending:
            return f"stopped: {mirror.pending} events wait for MLflow"
    mark_sent(path, last.events[-1].seq if last.events else last.opened.seq)
    return f"sent {sum(len(sitting.events) for sitting in sittings)} events"


def _target(sitting: Sitting, path: Path, client: Any) -> str:
    """The run that a sitting's events belong to, made if there is none."""
    memory = path.with_name("mlflow_run_id")
    if sitting.run_id:
        return sitting.run_id
    if not memory.exists():
        opened = sitting.opened.data
        _remember(memory, enter(client, opened["experiment"], opened["asked_run_id"], opened["name"], opened["tags"]))
    return memory.read_text().strip()


def _ending(error: BaseException) -> tuple[Status, str]:
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED", ""
        if not isinstance(error.code, int) or error.code < 128:  # 128 + n is the exit of signal n
            return "FAILED", f"exit: {error.code}"
    if not isinstance(error, Exception):
        return "KILLED", ""
    return "FAILED", f"{type(error).__name__}: {error}"


def _brief(error: Exception) -> str:
    """First line of an error, short."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:157] + "..."
