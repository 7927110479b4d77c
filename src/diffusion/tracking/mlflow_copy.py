"""From the journal to MLflow: Copy sends what MLflow does not have, for a thread beside a stage and for `make sync`.

Events keep the time at which they happened, so that sending one twice changes nothing: MLflow keeps one point for equal
(key, step, time, value). A session that MLflow has as a whole is marked in the journal; of one that was cut short, all
is sent again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion.errors import brief
from diffusion.tracking.journal import Journal, Session, end_dead, is_written, note, parse, remembered, sessions, unsent
from diffusion.tracking.mlflow_store import answers, enter, has_run, is_refusal
from diffusion.tracking.mlflow_writer import POINTS_PER_BATCH, Register, RunWriter
from diffusion.tracking.tracker import Event, warn

GATHER_SECONDS = 1.0  # how long points gather before they are written together
MAX_PAUSE_SECONDS = 30.0  # between two tries of a store that is away
CLOSE_SECONDS = 5.0  # what a store that is away or hangs may cost when a run is closed
UPLOAD_SECONDS = 300.0  # how long a file may take where the store answers otherwise
MAX_WAITING = 20_000  # events in memory; the others wait in the file
FILES = ("artifact", "image", "model")


class Copy:
    """Events on their way to one run: those that MLflow does not take wait for the next `send`.

    What MLflow refuses for good (bad name, deleted run, missing file) is said once and stays in the journal.
    """

    def __init__(self, writer: RunWriter, journal: Path) -> None:
        self.writer, self.journal = writer, journal
        self.waiting: list[Event] = []
        self.added = self.taken = self.refused = 0  # events
        self.failures = 0  # calls of send() in a row that ended with an error
        self.error: Exception | None = None  # why the last one left some
        self.moved = time.monotonic()  # when MLflow last took one
        self._said: set[str] = set()

    def add(self, events: Iterable[Event]) -> None:
        """Let more events wait."""
        before = len(self.waiting)
        self.waiting += events
        self.added += len(self.waiting) - before

    def send(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Try everything once: first curves and texts, which are small, then files, last the run's end.

        Once a small call fails, the rest is not tried; a file store that is away holds back nothing but files.
        """
        batches = deque(_batches(sorted(self.waiting, key=_turn)))
        self.waiting, self.error, away = [], None, False
        while batches:
            batch = batches.popleft()
            if away or stopped():
                self.waiting += batch
                continue
            try:
                self.writer.write(batch)
            except Exception as error:
                if not is_refusal(error):
                    self.waiting += batch
                    self.error, away = error, batch[0].kind not in FILES
                elif len(batch) > 1:  # find the bad one among the good
                    batches.extendleft([event] for event in reversed(batch))
                else:
                    self.refused += 1
                    self._say(f"MLflow refuses {batch[0].kind} ({_words(error)}); kept in {self.journal}")
            else:
                self.taken += len(batch)
                self.moved = time.monotonic()
        if not stopped():
            self._say_outage()

    def _say_outage(self) -> None:
        if self.error is None:
            if self.failures:
                warn("MLflow answers again")
            self.failures = 0
            return
        if not self.failures:
            warn(f"MLflow does not answer ({_words(self.error)}); going on, all is kept in {self.journal}")
        self.failures += 1

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warn(text)


class CopiedJournal(Journal):
    """A journal, and a thread that copies its lines to MLflow while they are written: a step never waits for it."""

    def __init__(self, path: Path, writer: RunWriter, earlier: Iterable[Session] = ()) -> None:
        """`earlier` sessions of the journal go to the same run, but for their ends: this session's is the run's."""
        self._position = path.stat().st_size if path.exists() else 0
        super().__init__(path)
        self.run_id: str | None = writer.run_id
        self._earlier = list(earlier)
        self._copy = Copy(writer, path)
        self._copy.add(event for session in self._earlier for event in session.events if event.kind != "close")
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{writer.run_id}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for MLflow while it takes events, or is at work on one; say what is left."""
        super().finish()
        self._closing.set()
        ended, told = time.monotonic(), False
        while self._thread.is_alive():
            idle = time.monotonic() - max(ended, self._copy.moved)
            if idle > CLOSE_SECONDS:
                if self._copy.failures or idle > UPLOAD_SECONDS or not answers(self._copy.writer.client):
                    break
                if not told:
                    warn("waiting for MLflow, which is at work (after Ctrl-C `make sync` sends the rest)")
                    told = True
            self._thread.join(1.0 if told else 0.1)
        self._abandoned.set()
        left = self._copy.added - self._copy.taken + (len(self._read()) if self._thread.is_alive() else 0)
        if left:
            hint = ": `make sync` sends them, or the next stage" if left > self._copy.refused else ""
            warn(f"{left} events did not reach MLflow run {self.run_id}; they are in {self._path}{hint}")

    def _work(self) -> None:
        while True:
            closing, full = self._closing.is_set(), len(self._copy.waiting) > MAX_WAITING
            if not full:
                self._copy.add(self._read())
            self._copy.send(self._abandoned.is_set)
            if self._abandoned.is_set():
                return
            if closing and not full and not self._copy.waiting:
                break
            pause = min(GATHER_SECONDS * 2**self._copy.failures, MAX_PAUSE_SECONDS)
            self._abandoned.wait(0.1) if closing else self._closing.wait(pause)
        if self._copy.taken:
            note(self._path, "sent", [self.session, *(session.opened.session for session in self._earlier)])

    def _read(self) -> list[Event]:
        """This session's lines since the last call; others may write to the same file."""
        if not self._path.exists():  # it could not be made
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            whole = file.read().rpartition(b"\n")[0]
        self._position += len(whole)
        return [event for event in parse(whole) if event.session == self.session and event.kind != "open"]


def sync(path: Path, client: Any, register: Register) -> str:
    """Send MLflow what it lacks of a journal: in words what was done, or why it was not. `register` writes models."""
    left = unsent(path)
    if not left:
        private = any(session.is_private for session in sessions(path))
        return "up to date" + (", but for what was recorded with tracking.enabled: false, which stays here" * private)
    if is_written(path):
        return "in use: its process sends it"
    end_dead(path)
    left = unsent(path)
    _give_run(path, [session for session in left if session.run_id is None], client)
    taken = refused = 0
    for run_id in dict.fromkeys(session.run_id for session in left):
        assert run_id
        if not has_run(client, run_id):
            return f"not sent: this store has no run {run_id} (is MLFLOW_TRACKING_URI set?)"
        mine = [session for session in left if session.run_id == run_id]
        copy = Copy(RunWriter(client, run_id, register), path)
        copy.add(event for session in mine for event in session.events)
        copy.send()
        if copy.error:
            return f"stopped: {copy.added - copy.taken} events wait for MLflow"
        if copy.taken:
            note(path, "sent", [session.opened.session for session in mine])
        taken, refused = taken + copy.taken, refused + copy.refused
    if not taken:
        return "not sent: MLflow refuses every event"
    return f"sent {taken} events" + (f", {refused} were refused" if refused else "")


def _give_run(path: Path, homeless: list[Session], client: Any) -> None:
    """The journal's run for sessions that wrote to none; a new one if it has none."""
    if not homeless:
        return
    first = homeless[0].opened.data
    tags = {key: value for session in homeless for key, value in session.opened.data["tags"].items()}
    run_id = enter(client, first["experiment"], remembered(path) or first["asked_run_id"], first["name"], tags)
    for session in homeless:
        session.run_id = run_id
    note(path, "run", [session.opened.session for session in homeless], run_id=run_id)


def _turn(event: Event) -> int:
    """Order of sending."""
    return 2 if event.kind == "close" else int(event.kind in FILES)


def _batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Metrics that follow each other together, up to MLflow's limit of points; other events one by one."""
    batch, points = list[Event](), 0
    for event in events:
        size = len(event.data["values"]) if event.kind == "metrics" else POINTS_PER_BATCH
        if batch and points + size > POINTS_PER_BATCH:
            yield batch
            batch, points = [], 0
        batch.append(event)
        points += size
    if batch:
        yield batch


def _words(error: Exception) -> str:
    return brief(f"{type(error).__name__}: {error}", 160)
