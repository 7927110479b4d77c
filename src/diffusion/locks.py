"""Work that one process at a time may do."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from diffusion import paths
from diffusion.errors import UserError


@contextlib.contextmanager
def only_process(lock: Path, work: str, *, wait: bool = False) -> Iterator[None]:
    """Keep a second process from the same `work`, e.g. "is drawing": a killed `dvc` leaves its stage running.

    Raises:
        UserError: there is one, and this one is not to wait for it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    owner = lock.with_suffix(".pid")
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text().strip() if owner.exists() else "unknown"
        if not wait:
            raise UserError(f"another process ({pid}) {work}: wait for it, or stop it") from None
        print(f"waiting for another process ({pid}), which {work}", file=sys.stderr, flush=True)
        held.acquire()
    with held:
        owner.write_text(f"{os.getpid()}\n")
        yield


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Keep a second trainer out of this run and of this workspace: a killed `dvc` leaves its stage running.

    Raises:
        UserError: another process holds one of the two locks.
    """
    work = "is training here"
    with only_process(folder / "lock", work), only_process(paths.TRAIN_LOCK, work):
        yield
