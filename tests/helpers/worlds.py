"""Worlds of several processes for the tests: gloo on this machine, each process forked from one that knows torch."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.preloaded import CONTEXT

from diffusion.distributed import World, joined

SECONDS = 120


def in_world(size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(world, device, *args)` in each of `size` processes; their results by rank (tensors and plain values)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [CONTEXT.Process(target=_enter, args=(rank, size, port, folder, work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(size)]


def _enter(rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined("cpu") as (world, device):
        assert isinstance(world, World)
        torch.save(work(world, device, *args), folder / f"{rank}.result")
