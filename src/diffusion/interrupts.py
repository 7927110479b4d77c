"""Ctrl-C and SIGTERM, read between two steps."""

import signal
from types import FrameType


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that is read between two steps; the second one interrupts."""

    def __init__(self, again: str = "dvc repro") -> None:
        """`again` is the command that goes on."""
        self.asked, self.again = False, again

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt(f"stopped at once; `{self.again}` goes on from the last checkpoint")
        self.asked = True
