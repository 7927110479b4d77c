"""Checkpoints of a training: complete, atomic, checksummed, loaded without unpickling code.

A checkpoint holds everything that the next step depends on and everything that the outputs are made of:
`net`, `ema`, `best` (state dicts), `optimizer`, `progress` (step, best step and value, counters, seconds, history) and
the network's `precision`.
Its file is `step_<step>-<first 16 hex digits of its sha256>.pt`: a torn or changed file does not match its name.
"""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

KEEP = 2  # newest files that stay: one to resume from, one should it be damaged


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`, then drop the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".step_{step:08d}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step_{step:08d}-{_digest(temporary)}.pt"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in [p for p in _files(folder) if p != path][KEEP - 1 :]:
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None; a damaged file is passed over with a warning."""
    for path in _files(folder):
        if path.stem.endswith("-" + _digest(path)):
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state
        warnings.warn(f"{path.name} is damaged: trying the checkpoint before it", stacklevel=2)
    return None


def _files(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step_*.pt"), key=lambda p: (p.name.split("-")[0], p.stat().st_mtime_ns), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
