"""What the stages say about a run, and the local journal that keeps it: the truth of which MLflow is a copy."""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from diffusion.atomic import fsync, replacing

Status = Literal["FINISHED", "FAILED", "KILLED"]
JOURNAL = "journal.jsonl"
MEMORY = "mlflow_run_id"  # beside it
CURVES = ("train/", "val/", "best/")  # of training, a point a step


class Tracker(Protocol):
    """What the stages say about a run. No call raises because of an outage."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where there is only the journal."""

    def params(self, flat: Mapping[str, object]) -> None:
        """Parameters by dotted key. MLflow keeps the first value of a key."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, one a key, at a training step. NaN and infinities are allowed."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Short texts about the run; a later value replaces an earlier one."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder to keep with the run, below `folder`. It must stay in place until close() returns."""

    def image(self, path: Path, key: str, step: int) -> None:
        """A PNG that belongs to a training step; pictures of one `key` are compared over steps and runs."""

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The images that the run trains on. `digest`: hex digits of any number, of which MLflow keeps 36."""

    def keep(self, path: Path, folder: str) -> Path:
        """Where the file or folder will still be as it is now when an outage ends."""

    def model(self, weights: Path, about: Mapping[str, Any]) -> None:
        """A model to register: the file and what registry.register wants to know of it."""

    def close(self, status: Status, message: str = "") -> None:
        """End the run's present stage; later calls are ignored. Waits some 5 s at most for a store that is away."""


@dataclass(frozen=True)
class Event:
    """One call: what happened and when. `seq` counts a journal's lines from 1; 0 = not journalled."""

    kind: Literal["open", "params", "metrics", "tags", "artifact", "image", "dataset", "model", "close"]
    data: Mapping[str, Any]
    time: int  # milliseconds since the epoch
    seq: int = 0


class NullTracker:
    """Ignores everything: for ranks other than 0. Base of the others, which say where events go."""

    run_id: str | None = None
    _closed = False

    def params(self, flat: Mapping[str, object]) -> None:
        self._emit("params", dict(flat))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        numbers = {key: float(value) for key, value in values.items() if self.is_new(key, step)}
        if numbers:
            self._emit("metrics", {"step": int(step), "values": numbers})

    def tags(self, tags: Mapping[str, str]) -> None:
        self._emit("tags", {key: str(value) for key, value in tags.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        self._emit("artifact", {"path": str(self.keep(path, folder)), "folder": folder})

    def image(self, path: Path, key: str, step: int) -> None:
        self._emit("image", {"path": str(self.keep(path, "images")), "key": key, "step": int(step)})

    def dataset(self, name: str, digest: str, source: str) -> None:
        self._emit("dataset", {"name": name, "digest": digest, "source": source})

    def model(self, weights: Path, about: Mapping[str, Any]) -> None:
        self._emit("model", {**about, "path": str(self.keep(weights, "model"))})

    def keep(self, path: Path, folder: str) -> Path:
        return path

    def is_new(self, key: str, step: int) -> bool:
        """Whether a curve's point is not one that an earlier sitting has recorded."""
        return True

    def close(self, status: Status, message: str = "") -> None:
        self._emit("close", {"status": status, "message": message})
        if not self._closed:
            self._closed = True
            self.finish()

    def record(self, event: Event) -> None:
        """Take an event; never raises because of where it goes."""

    def finish(self) -> None:
        """Called once, after the close event."""

    def _emit(self, kind: Any, data: Mapping[str, Any]) -> None:
        if not self._closed:
            self.record(Event(kind, data, time.time_ns() // 1_000_000))


class Journal(NullTracker):
    """Append-only JSONL file, a line an event: {"seq", "time", "kind", "data"}; non-finite metrics are strings.

    Every line is handed to the operating system at once, so a killed process loses none. A file that another sitting
    left is continued, after a torn last line on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._fd, self._seq = path, threading.Lock(), -1, 0
        self._reached: dict[str, int] = {}  # newest step of each curve that earlier sittings left
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes() if path.exists() else b""
            for event in _parse(old):
                self._seq = max(self._seq, event.seq)
                if event.kind == "metrics":  # the last step, not the largest: a rollback does steps again
                    curves = [key for key in event.data["values"] if key.startswith(CURVES)]
                    self._reached |= dict.fromkeys(curves, event.data["step"])
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if old and not old.endswith(b"\n"):
                os.write(self._fd, b"\n")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror}): this sitting has no journal")

    @property
    def seq(self) -> int:
        """Number of the newest line."""
        return self._seq

    def record(self, event: Event) -> None:
        with self._lock:
            if self._fd < 0:
                return
            self._seq += 1
            line = {"seq": self._seq, "time": event.time, "kind": event.kind, "data": _spelt(event)}
            try:
                os.write(self._fd, json.dumps(line, default=str).encode() + b"\n")  # one write: lines never mix
            except OSError as error:
                warn(f"{self._path} cannot be written ({error.strerror}): this sitting's journal ends here")
                self.finish()

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
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                fsync(fd)
            except OSError as error:
                warn(f"{self._path} may lack its end on the disk ({error.strerror})")
            os.close(fd)


@dataclass(frozen=True)
class Sitting:
    """What one process wrote into a journal, from its open event on."""

    opened: Event
    events: list[Event]

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run that it wrote to; None if it had none."""
        found: str | None = self.opened.data["run_id"]
        return found


def unsent(path: Path) -> list[Sitting]:
    """The sittings of a journal that MLflow may lack, in order: all after the newest `mark_sent`."""
    mark = path.with_suffix(".sent")
    text = mark.read_text().strip() if mark.exists() else ""
    sent = int(text) if text.isdecimal() else 0  # a damaged mark: all is sent again, which changes nothing
    found: list[Sitting] = []
    for event in read_journal(path):
        if event.kind == "open":
            found.append(Sitting(event, []))
        elif found:
            found[-1].events.append(event)
    return [s for s in found if max(e.seq for e in [s.opened, *s.events]) > sent]


def mark_sent(path: Path, seq: int) -> None:
    """Note that MLflow has all events of a journal up to number `seq`."""
    mark = path.with_suffix(".sent")
    try:
        with replacing(mark) as file:
            file.write(f"{seq}\n".encode())
    except OSError as error:
        warn(f"{mark} cannot be written ({error.strerror}): the same is sent again next time, which changes nothing")


def remembered(path: Path) -> str | None:
    """MLflow's id of the run that a journal's sittings share; None if they have none yet."""
    memory = path.with_name(MEMORY)
    return memory.read_text().strip() if memory.exists() else None


def remember(path: Path, run_id: str) -> None:
    """Keep the id of a journal's run beside it."""
    memory = path.with_name(MEMORY)
    try:
        with replacing(memory) as file:
            file.write(f"{run_id}\n".encode())
    except OSError as error:
        warn(f"{memory} cannot be written ({error.strerror}): if this is resumed, it opens another MLflow run")


def _copy(source: str | Path, target: str | Path) -> None:
    with Path(source).open("rb") as old, replacing(Path(target)) as new:
        shutil.copyfileobj(old, new)


def read_journal(path: Path) -> list[Event]:
    """The events of a journal in order, metric values as floats; none if there is no file; torn lines are left out."""
    return list(_parse(path.read_bytes())) if path.exists() else []


def _parse(journal: bytes) -> Iterator[Event]:
    for line in journal.split(b"\n"):
        try:
            event = Event(**json.loads(line))
        except (ValueError, TypeError):  # empty, or its writer was killed
            continue
        if event.kind == "metrics":
            values = {key: float(value) for key, value in event.data["values"].items()}
            event = replace(event, data={**event.data, "values": values})
        yield event


def _spelt(event: Event) -> Mapping[str, Any]:
    """Data as JSON can hold it: it has no NaN and no infinity."""
    if event.kind != "metrics":
        return event.data
    values = {k: v if math.isfinite(v) else str(v) for k, v in event.data["values"].items()}
    return {**event.data, "values": values}


def warn(text: str) -> None:
    """One line on stderr that leaves a progress bar in one piece."""
    tqdm.write(f"tracking: {text}", file=sys.stderr)
