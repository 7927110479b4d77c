"""The local journal of a run: the truth of which MLflow is a copy, and the queue of what MLflow does not have yet."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from diffusion.atomic import fsync, replacing
from diffusion.tracking.tracker import Event, Tracker, now, warn

JOURNAL = "journal.jsonl"
CURVES = ("train/", "val/", "best/")  # of training, a point a step


class Journal(Tracker):
    """Append-only JSONL file, a line an event: {"kind", "data", "time", "session"}; non-finite metrics are strings.

    Every line is handed to the operating system at once, so a killed process loses none. A file that another session
    left is continued, after a torn last line on a line of its own. The process has the file locked (shared) while it
    writes: whatever ends it, a power cut too, others can tell.
    """

    def __init__(self, path: Path) -> None:
        self.session = f"{time.time_ns():x}-{os.getpid()}"
        self._path, self._lock, self._fd = path, threading.Lock(), -1
        self._reached: dict[str, int] = {}  # newest step of each curve that earlier sessions left
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes() if path.exists() else b""
            for event in parse(old):
                if event.kind == "metrics":  # the last step, not the largest: a rollback does steps again
                    curves = [key for key in event.data["values"] if key.startswith(CURVES)]
                    self._reached |= dict.fromkeys(curves, event.data["step"])
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._fd, fcntl.LOCK_SH)
            if old and not old.endswith(b"\n"):
                os.write(self._fd, b"\n")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror}): this session is not recorded")

    def record(self, event: Event) -> None:
        with self._lock:
            if self._fd < 0:
                return
            try:
                os.write(self._fd, line(replace(event, session=self.session)))  # one write: lines never mix
            except OSError as error:
                warn(f"{self._path} cannot be written ({error.strerror}): this session's record ends here")
                self._end()

    def keep(self, path: Path, folder: str) -> Path:
        """A copy beside the journal, unless it lies there already: later stages replace what they wrote."""
        home = self._path.parent
        if self._closed or not path.exists() or path.absolute().is_relative_to(home.absolute()):
            return path
        kept = home / "artifacts" / folder / path.name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, kept, dirs_exist_ok=True, copy_function=_copy) if path.is_dir() else _copy(path, kept)
        except OSError as error:
            warn(f"{path} cannot be kept for a later upload ({error.strerror})")
            return path
        return kept

    def is_new(self, key: str, step: int) -> bool:
        """A training that was killed goes on from its checkpoint, and does again the steps after it."""
        if step <= self._reached.get(key, -1):
            return False
        self._reached.pop(key, None)
        return True

    def finish(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                fsync(fd)
            except OSError as error:
                warn(f"{self._path} may lack its end on the disk ({error.strerror})")
            os.close(fd)


@dataclass
class Session:
    """What one process wrote into a journal, from its open event on."""

    opened: Event
    run_id: str | None  # MLflow's; None if it had none
    events: list[Event] = field(default_factory=list)
    sent: bool = False  # MLflow has it all

    @property
    def is_closed(self) -> bool:
        """Whether its end was recorded; else it goes on, or its process was killed."""
        return any(event.kind == "close" for event in self.events)

    @property
    def shares_run(self) -> bool:
        """Whether its run is the journal's: not that of a later stage whose store did not know the run it asked for."""
        return bool(self.opened.data["stage"] == "train" or self.opened.data["asked_run_id"] is None)

    @property
    def is_private(self) -> bool:
        """Whether it is for this machine only: tracking.enabled was false."""
        return not self.opened.data.get("enabled", True)


def sessions(path: Path) -> list[Session]:
    """The sessions of a journal, in order; none if there is no file; torn lines are left out."""
    found: dict[str, Session] = {}
    for event in read_journal(path):
        if event.kind == "open":
            found[event.session] = Session(event, event.data["run_id"])
        elif event.session in found and event.kind == "sent":
            found[event.session].sent = True
        elif event.session in found and event.kind == "run":
            found[event.session].run_id = event.data["run_id"]
        elif event.session in found:
            found[event.session].events.append(event)
    return list(found.values())


def unsent(path: Path) -> list[Session]:
    """The sessions of a journal that MLflow is to have and may lack."""
    return [session for session in sessions(path) if not session.sent and not session.is_private]


def end_dead(path: Path) -> list[Session]:
    """Record of the sessions whose process was killed that they have ended; those of them that MLflow is to have."""
    dead = [session for session in unsent(path) if not session.is_closed]
    if not dead or is_written(path):
        return []
    note(path, "close", [session.opened.session for session in dead], status="KILLED", message="")
    return dead


def is_written(path: Path) -> bool:
    """Whether a process is at work on the journal, or none can tell."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def note(path: Path, kind: Literal["run", "sent", "close"], names: Iterable[str], **data: str) -> None:
    """Add a line to each of these sessions: "sent": MLflow has it; "run": it belongs to `run_id`; "close": its end."""
    try:
        with path.open("ab") as file:
            file.writelines(line(Event(kind, data, now(), name)) for name in names)
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}): the same is sent again next time, which changes nothing")


def remembered(path: Path) -> str | None:
    """MLflow's id of the run that a journal's sessions share; None if they have none yet."""
    found = [session.run_id for session in sessions(path) if session.run_id and session.shares_run]
    return found[-1] if found else None


def _copy(source: str | Path, target: str | Path) -> None:
    with Path(source).open("rb") as old, replacing(Path(target)) as new:
        shutil.copyfileobj(old, new)


def read_journal(path: Path) -> list[Event]:
    """The events of a journal in order, metric values as floats; none if there is no file; torn lines are left out."""
    return list(parse(path.read_bytes())) if path.exists() else []


def parse(journal: bytes) -> Iterator[Event]:
    """The events of whole lines."""
    session = ""
    for text in journal.split(b"\n"):
        try:
            found = json.loads(text)
            number = found.pop("seq", None)  # of a journal of version 0.1, whose sessions have no names
            event = Event(**found)
        except (ValueError, TypeError, AttributeError):  # empty, or its writer was killed
            continue
        if number is not None:
            session = str(number) if event.kind == "open" else session
            event = replace(event, session=session)
        if event.kind == "metrics":
            values = {key: float(value) for key, value in event.data["values"].items()}
            event = replace(event, data={**event.data, "values": values})
        yield event


def line(event: Event) -> bytes:
    """An event as a line of JSON, which has no NaN and no infinity."""
    data = event.data
    if event.kind == "metrics":
        data = {**data, "values": {k: v if math.isfinite(v) else str(v) for k, v in data["values"].items()}}
    about = {"kind": event.kind, "data": data, "time": event.time, "session": event.session}
    return json.dumps(about, default=str).encode() + b"\n"
