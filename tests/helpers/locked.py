"""A lock that another process seems to hold."""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(lock: Path, *, then: Callable[[], object] = lambda: None, seconds: float = 0.5) -> Iterator[None]:
    """Held for `seconds`, after which `then` is called; the block has to wait for it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def end() -> None:
            then()
            if then is not interrupt:
                fcntl.flock(file, fcntl.LOCK_UN)

        timer = threading.Timer(seconds, end)
        timer.start()
        yield
        timer.join()


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
