"""Events on their way to a service that may be away: sent in order, repeated with growing pauses."""

import time
from collections import deque
from collections.abc import Callable

from diffusion.tracking.journal import Event

MAX_BACKOFF_SECONDS = 30.0
MAX_WAITING = 20_000  # events that wait for the store; further points stay in the journal alone
POINTS_PER_BATCH = 1000  # MLflow's limit


class UnreadableError(Exception):
    """A file on this machine cannot be read, so that it can never be sent."""


class Lane:
    """Events on their way to one service: pushed by the caller's thread, sent in order by another."""

    def __init__(self, send: Callable[[list[Event]], None], report: Callable[[Event, Exception | None], None]) -> None:
        self._send, self._report = send, report
        self.waiting: deque[Event] = deque()
        self.stopped = False  # nobody waits for it any more
        self.sent = self.dropped = self.failures = 0  # failures: in a row
        self.refused = 0  # of the dropped: the service would refuse them again
        self.retry_at = self.moved = 0.0  # monotonic seconds
        self._alone = 0  # so many events are sent one by one

    def push(self, event: Event, *, replayed: bool = False) -> None:
        """Let `event` wait; beyond MAX_WAITING points are dropped, unless `replayed`: a journal's end is in sight."""
        if event.kind == "metrics" and not replayed and len(self.waiting) >= MAX_WAITING:
            self.dropped += 1
        else:
            self.waiting.append(event)

    def drain(self) -> None:
        """Send what waits; stop at the first failure and hold back for 1, 2, 4 ... 30 s."""
        while self.waiting and not self.stopped and time.monotonic() >= self.retry_at:
            batch = self._batch()
            try:
                self._send(batch)
            except Exception as error:
                if not is_refusal(error):
                    self.failures += 1
                    self.retry_at = time.monotonic() + min(2.0 ** (self.failures - 1), MAX_BACKOFF_SECONDS)
                    self._report(batch[0], error)
                    return
                if len(batch) > 1:  # find the bad one among the good
                    self._alone = len(batch)
                    continue
                self.dropped += 1
                self.refused += 1
                self._report(batch[0], error)
            else:
                self.sent += len(batch)
            self._done(batch)

    def _done(self, batch: list[Event]) -> None:
        failed, self.failures = self.failures, 0
        self._alone = max(0, self._alone - len(batch))
        for _ in batch:
            self.waiting.popleft()
        self.moved = time.monotonic()
        if failed:
            self._report(batch[0], None)

    def _batch(self) -> list[Event]:
        """The first event; if it is of metrics, with those that follow at once, up to MLflow's limit."""
        batch: list[Event] = []
        points = 0
        for event in list(self.waiting):
            points += len(event.data["values"]) if event.kind == "metrics" else POINTS_PER_BATCH
            if batch and (points > POINTS_PER_BATCH or self._alone or batch[0].kind != "metrics"):
                break
            batch.append(event)
        return batch


def is_refusal(error: Exception) -> bool:
    """Whether asking again would give the same answer."""
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
    bugs = (UnreadableError, FileNotFoundError, TypeError, AttributeError, LookupError, UnicodeError)
    return isinstance(error, bugs) or getattr(error, "error_code", None) in codes


def brief(error: Exception) -> str:
    """An error in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:157] + "..."
