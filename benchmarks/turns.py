"""Contestants that take turns, each in a process of its own: none shares another's memory, allocator or settings."""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

Build = Callable[[], Callable[[], object]]
WARM_UP = 3  # steps


def compete(contestants: Mapping[str, Build], amount: int, *, turns: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Rates of each contestant's step, which does `amount` units of work, and how many times the first one's is more.

    Each takes `turns` turns of about `seconds`, A B C A B C; the others sleep meanwhile. Builders must be picklable.
    {name: {"median", "min", "max" (units a second), "peak_memory_mb", "ours_is_times"} or {"error": not installed}}
    """
    os.environ["TQDM_DISABLE"] = "1"  # in the children: a peer's bar would be in the way of our lines
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {}
    children: dict[str, tuple[Any, Connection]] = {}
    for name, build in contestants.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, build, torch.get_num_threads()), daemon=True)
        process.start()
        ready = ours.recv()
        if isinstance(ready, str):
            found[name] = {"error": ready}
            process.join()
            continue
        children[name] = process, ours
        found[name] = {"rates": [], "count": max(1, round(seconds / ready))}
        print(f"{name}: {amount / ready:.1f} a second at first", file=sys.stderr)
    for turn in range(turns):
        for name, (_, connection) in children.items():
            connection.send(found[name]["count"])
            taken, found[name]["peak_memory_mb"] = connection.recv()
            found[name]["rates"].append(amount * found[name]["count"] / taken)
        last = ", ".join(f"{name} {found[name]['rates'][-1]:.1f}" for name in children)
        print(f"turn {turn + 1} of {turns}: {last}", file=sys.stderr)
    for process, connection in children.values():
        connection.send(None)
        process.join()
    return summary(found)


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians, extremes and ratios of the rates; the first contestant is the one that is compared."""
    result: dict[str, dict[str, Any]] = {}
    first = median(next(iter(found.values()))["rates"])
    for name, entry in found.items():
        if "error" in entry:
            result[name] = dict(entry)
            continue
        rates = entry["rates"]
        result[name] = {
            "median": round(median(rates), 1),
            "min": round(min(rates), 1),
            "max": round(max(rates), 1),
            "peak_memory_mb": entry["peak_memory_mb"],
            "ours_is_times": round(first / median(rates), 2),
        }
    return result


def _serve(connection: Connection, build: Build, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        step = build()
        for _ in range(WARM_UP):
            start = time.perf_counter()
            step()
            last = time.perf_counter() - start
    except ImportError as error:
        connection.send(f"not installed: {error}")
        return
    connection.send(last)
    while (count := connection.recv()) is not None:
        start = time.perf_counter()
        for _ in range(count):
            step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        connection.send((time.perf_counter() - start, peak))
