"""What the stages say about a run, and to whom: the Tracker that they are given, and its events."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from diffusion.errors import masked

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Event:
    """One call: what happened and when."""

    kind: Literal["open", "params", "metrics", "tags", "artifact", "image", "dataset", "model", "close", "run", "sent"]
    data: Mapping[str, Any]
    time: int  # milliseconds since the epoch
    session: str = ""  # what one process wrote, from its open event on


class Tracker:
    """Takes what the stages say about a run, and keeps nothing: for ranks other than 0. The journal is another one.

    No call raises because of an outage.
    """

    run_id: str | None = None  # MLflow's; None where there is only the journal
    _closed = False

    def params(self, flat: Mapping[str, object]) -> None:
        """Parameters by dotted key. MLflow keeps the first value of a key."""
        self._emit("params", dict(flat))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, one a key, at a training step. NaN and infinities are allowed."""
        numbers = {key: float(value) for key, value in values.items() if self.is_new(key, step)}
        if numbers:
            self._emit("metrics", {"step": int(step), "values": numbers})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Short texts about the run; a later value replaces an earlier one."""
        self._emit("tags", {key: str(value) for key, value in tags.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder to keep with the run, below `folder`, as it is now."""
        self._emit("artifact", {"path": str(self.keep(path, folder)), "folder": folder})

    def image(self, path: Path, key: str, step: int) -> None:
        """A PNG that belongs to a training step; pictures of one `key` are compared over steps and runs."""
        self._emit("image", {"path": str(self.keep(path, "images")), "key": key, "step": int(step)})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The images that the run trains on. `digest`: hex digits of any number, of which MLflow keeps 36."""
        self._emit("dataset", {"name": name, "digest": digest, "source": source})

    def model(self, weights: Path, about: Mapping[str, Any]) -> None:
        """A model to register: the file and what registry.register wants to know of it."""
        self._emit("model", {**about, "path": str(self.keep(weights, "model"))})

    def keep(self, path: Path, folder: str) -> Path:
        """Where the file or folder will still be as it is now when an outage ends."""
        return path

    def is_new(self, key: str, step: int) -> bool:
        """Whether a curve's point is not one that an earlier session has recorded."""
        return True

    def close(self, status: Status, message: str = "") -> None:
        """End the run's present stage; later calls are ignored. A store that is away costs some seconds at most."""
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
            self.record(Event(kind, data, now()))


def now() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def warn(text: str) -> None:
    """One line on stderr that leaves a progress bar in one piece."""
    tqdm.write(f"tracking: {masked(text)}", file=sys.stderr)
