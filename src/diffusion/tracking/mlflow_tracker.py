"""What copies a run's events to MLflow in the background, and when it gives up."""

import threading
import time
from pathlib import Path

from diffusion.tracking.journal import Event, Journal, NullTracker, mark_sent, warn
from diffusion.tracking.mlflow_writer import RunWriter
from diffusion.tracking.retry_queue import Lane, brief, is_refusal

GATHER_SECONDS = 1.0  # how long points gather before they are written together
CLOSE_SECONDS = 5.0  # what a store that is away, hangs or is slow may cost when a run is closed
UPLOAD_SECONDS = 300.0  # of a patient tracker, while a file is on its way and nothing has failed
FILES = ("artifact", "image", "model")


class MlflowTracker(NullTracker):
    """Copies events to one MLflow run from two background threads, each in order.

    A call that the store does not answer is repeated with a growing pause; one that it refuses for good (bad name,
    deleted run, missing file) is dropped and named once on stderr. Files have a lane of their own, so that an artifact
    store that is away, or a large file, does not hold back the curves.
    """

    def __init__(self, writer: RunWriter, journal: Path, *, patient: bool) -> None:
        """A `patient` one waits at its end for as long as the store takes events; others CLOSE_SECONDS at most."""
        self.run_id, self._journal, self._patient = writer.run_id, journal, patient
        self._curves, self._files = self._lanes = (Lane(writer.send, self._report), Lane(writer.upload, self._report))
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._end: Event | None = None
        self._talk, self._away = threading.Lock(), False
        self._said: set[str] = set()
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"mlflow-{writer.run_id}", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def record(self, event: Event, *, replayed: bool = False) -> None:
        if event.kind == "close":
            self._end = event
        elif event.kind != "open":
            (self._files if event.kind in FILES else self._curves).push(event, replayed=replayed)

    def finish(self) -> None:
        """Wait for the threads, but not for ever; say what is left."""
        self._closing.set()
        started = time.monotonic()
        for thread in self._threads:
            while thread.is_alive() and not self._is_late(started):
                thread.join(0.1)
        self._abandoned.set()
        for lane in self._lanes:
            lane.stopped = True
        left = self.pending + self.refused
        if left:
            hint = ": `make sync` sends them, or the next stage" if self.pending else ""
            warn(f"{left} events did not reach MLflow run {self.run_id}; they are in {self._journal}{hint}")

    @property
    def pending(self) -> int:
        """Events that the store does not have and would take."""
        return sum(lane.dropped - lane.refused + len(lane.waiting) for lane in self._lanes)

    @property
    def refused(self) -> int:
        """Events that the store will never take."""
        return sum(lane.refused for lane in self._lanes)

    @property
    def sent(self) -> int:
        """Events that the store has taken."""
        return sum(lane.sent for lane in self._lanes)

    def _is_late(self, started: float) -> bool:
        now, failing = time.monotonic(), any(lane.failures for lane in self._lanes)
        if not self._patient or failing:
            return now - started > CLOSE_SECONDS
        uploading = self._files.waiting and not self._curves.waiting
        moved = max(started, *(lane.moved for lane in self._lanes))
        return now - moved > (UPLOAD_SECONDS if uploading else CLOSE_SECONDS)

    def _work(self, lane: Lane) -> None:
        while not self._closing.wait(GATHER_SECONDS):
            lane.drain()
        lane.retry_at = 0.0  # an outage may just have ended
        lane.drain()
        if self._end and lane is self._curves:
            lane.push(self._end)  # the status comes last
        while lane.waiting and not self._abandoned.is_set():
            lane.drain()
            if lane.waiting:
                self._abandoned.wait(0.1)

    def _report(self, event: Event, error: Exception | None) -> None:
        """Say an outage once when it begins and once when it ends (no error), and each kind of refusal once."""
        with self._talk:
            text = ""
            if error is None:
                over = self._away and not any(lane.failures for lane in self._lanes)
                self._away = self._away and not over
                text = "MLflow answers again" if over else ""
            elif is_refusal(error):
                text = f"MLflow refuses {event.kind} ({brief(error)}); kept in {self._journal}"
                text = "" if text in self._said else text
                self._said.add(text)
            elif not self._away:
                self._away = True
                text = f"MLflow does not answer ({brief(error)}); going on, all is kept in {self._journal}"
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

    def is_new(self, key: str, step: int) -> bool:
        return self._journal.is_new(key, step)

    def finish(self) -> None:
        self._journal.finish()
        self._mirror.finish()
        if self._complete and not self._mirror.pending and self._mirror.sent:
            mark_sent(self._path, self._journal.seq)
