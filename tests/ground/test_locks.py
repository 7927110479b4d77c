"""Locks: the processes that work with one that waits wait too."""

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.worlds import in_world

from diffusion import locks
from diffusion.distributed import World


def waiter(world: World, _: torch.device, folder: Path) -> bool:
    """Whether this rank had to wait: rank 0 for the lock, and the others for rank 0."""
    locks.TOLD_SECONDS = 0.05

    def entered(waiting: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
        def told() -> None:
            waiting()
            (folder / "told").touch()

        return locks.only_process(folder / "lock", "is at it", wait=True, waiting=told)

    with contextlib.ExitStack() as held:
        locks.enter_exclusive(held, world, entered)
        return (folder / "told").exists()


def test_ranks_wait_with_rank_0_however_long(tmp_path: Path) -> None:
    """A collective would time out after half an hour: the waiting ranks hear from rank 0 meanwhile."""
    with (tmp_path / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def release() -> None:
            while not (tmp_path / "told").exists():
                time.sleep(0.02)
            fcntl.flock(file, fcntl.LOCK_UN)

        threading.Thread(target=release, daemon=True).start()
        assert in_world(2, tmp_path / "world", waiter, tmp_path) == [True, True]
