"""Checkpoints of a training: complete, atomic, checksummed, loaded without unpickling code.

A checkpoint holds everything that the next step depends on and everything that the outputs are made of:
`net`, `ema`, `best` (state dicts), `optimizer`, `progress` (step, best step and value, counters, seconds, history), the
network's `precision`, and with which `config` and on what (`origin`) the training began.
Its file is `step_<step>-<first 16 hex digits of its sha256>.pt`: a torn or changed file does not match its name.
"""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from diffusion.atomic import publish, sync
from diffusion.config import TrainedConfig
from diffusion.training.identity import deciding

KEEP = 2  # newest whole files that stay: one to resume from, one should it be damaged


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`, then drop the oldest and the damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".step_{step:08d}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            sync(file)
        path = folder / f"step_{step:08d}-{_digest(temporary)}.pt"
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    spares = 0
    for other in (p for p in _files(folder) if p != path):
        if spares < KEEP - 1 and _is_whole(other):
            spares += 1
        else:
            other.unlink(missing_ok=True)
    return path


def latest(
    folder: Path, device: torch.device | str = "cpu", config: TrainedConfig | None = None
) -> dict[str, Any] | None:
    """The newest checkpoint that is whole and of a training as `config` says, or None; others get a warning.

    One that does not say of which config it is, as those of older versions, is taken.
    """
    for path in _files(folder):
        if not _is_whole(path):
            warnings.warn(f"{path.name} is damaged: trying the checkpoint before it", stacklevel=2)
            continue
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if config and "config" in state and deciding(state["config"]) != deciding(config.model_dump(mode="json")):
            warnings.warn(f"{path.name} is of other params: trying the checkpoint before it", stacklevel=2)
            continue
        return state
    return None


def _files(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step_*.pt"), key=lambda p: (p.name.split("-")[0], p.stat().st_mtime_ns), reverse=True)


def _is_whole(path: Path) -> bool:
    return path.stem.endswith("-" + _digest(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
