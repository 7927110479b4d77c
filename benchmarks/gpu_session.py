"""The clock and the result file of one run of gpu.py: every part saves as it goes, none outlasts its time unasked."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

WEIGHTS = {"machine": 3, "speed": 25, "sampling": 6, "train": 50, "samples": 16}  # shares of the time that is left


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived: what is there is kept, nothing more is begun."""


class Session:
    """Deadline, selected parts and result of one run; `folder`/result.json is whole at any time.

    PartialSamples that an earlier run left in it stay until they are done again.
    """

    def __init__(self, seconds: float, folder: Path, parts: list[str]) -> None:
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.seconds = seconds
        self.folder = folder
        self.todo = [name for name in WEIGHTS if name in parts]
        before = folder / "result.json"
        parts_before = json.loads(before.read_text())["parts"] if before.exists() else {}
        self.result: dict[str, Any] = {"seconds": seconds, "parts": parts_before}

    def left(self) -> float:
        """Seconds to the end of the run."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress with the time left."""
        print(f"[{time.monotonic() - self.start:5.0f} s, {self.left():5.0f} s left] {text}", flush=True)

    def save(self) -> None:
        """Write result.json: whole, or as it was before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "result.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.result, indent=2) + "\n")
        temporary.replace(path)

    def run(self, name: str, work: Callable[["Part"], None]) -> None:
        """Do `work` if the part was selected: it has its share of the time left; an error is recorded, not raised."""
        if name not in self.todo:
            return
        share = WEIGHTS[name] / sum(WEIGHTS[n] for n in self.todo[self.todo.index(name) :])
        part = Part(self, name, max(0.0, self.left()) * share)
        self.todo.remove(name)
        self.say(f"{name}: up to {part.seconds:.0f} s")
        try:
            work(part)
            part.keep(status="done")
        except Stopped:
            part.keep(status="stopped")
            raise
        except Exception as error:  # a part that fails must not cost the others
            part.keep(status="failed", error=f"{type(error).__name__}: {error}"[:500])
            part.keep(traceback=traceback.format_exc()[-4000:])
            self.say(f"{name}: FAILED, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            part.keep(seconds=round(time.monotonic() - part.start, 1))


class Part:
    """One part of a run: its deadline, and its entry in the result."""

    def __init__(self, session: Session, name: str, seconds: float) -> None:
        self.session, self.name, self.seconds = session, name, seconds
        self.start = time.monotonic()
        self.entry: dict[str, Any] = {"status": "running"}
        session.result["parts"][name] = self.entry
        session.save()

    def left(self) -> float:
        """Seconds to this part's deadline."""
        return self.start + self.seconds - time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        self.session.say(f"{self.name}: {text}")

    def keep(self, **values: Any) -> None:
        """Put values into the part's entry and save the result."""
        self.entry |= values
        self.session.save()


def stop_on_signals() -> None:
    """The first SIGTERM or SIGINT raises Stopped in the main thread; a second one ends the process at once."""

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
