"""Work that one process at a time may do."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from diffusion import paths
from diffusion.errors import UserError

if TYPE_CHECKING:
    from diffusion.distributed import World

TOLD_SECONDS = 60.0  # between two signs of life to the ranks that wait with rank 0: their collectives time out


@contextlib.contextmanager
def only_process(
    lock: Path, work: str, *, wait: bool = False, waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Keep a second process from the same `work`, e.g. "is generating": a killed `dvc` leaves its stage running.

    `waiting` is called every TOLD_SECONDS of waiting.

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
        _acquire(held, waiting)
    with held:
        owner.write_text(f"{os.getpid()}\n")
        yield


def _acquire(held: FileLock, waiting: Callable[[], object]) -> None:
    while True:
        try:
            held.acquire(timeout=TOLD_SECONDS)
            return
        except Timeout:
            waiting()


@contextlib.contextmanager
def only_trainer(folder: Path, *, wait: bool = False, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep a second trainer out of this run and of this workspace: a killed `dvc` leaves its stage running.

    Raises:
        UserError: another process holds one of the two locks, and this one is not to wait for it.
    """
    for_run = only_process(folder / "lock", "is training the same", wait=wait, waiting=waiting)
    with for_run, only_process(paths.TRAIN_LOCK, "is training here", wait=wait, waiting=waiting):
        yield


def enter_exclusive(
    held: contextlib.ExitStack,
    world: "World",
    lock: Callable[[Callable[[], object]], contextlib.AbstractContextManager[None]],  # given what it calls, waiting
) -> None:
    """Rank 0 enters `lock` until `held` ends, and the others wait with it, however long that takes."""
    if world.is_main:
        held.enter_context(lock(lambda: world.broadcast(False)))
        world.broadcast(True)
    else:
        while not world.broadcast(None):
            pass
