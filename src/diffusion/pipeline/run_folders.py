"""`python -m diffusion runs`: what lies in runs/, and away with what no result needs."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from diffusion import paths
from diffusion.tracking.journal import JOURNAL, unsent
from diffusion.training.identity import read_record, training_folders


@dataclass(frozen=True)
class RunFolder:
    """A training's folder. `reasons` say why it stays, one a word or two; none = no result needs it."""

    path: Path
    params: dict[str, Any]  # by dotted key; empty in folders of earlier versions
    step: int
    size: int  # bytes
    used: float  # seconds since the epoch
    reasons: tuple[str, ...]

    @property
    def steps(self) -> int | None:
        """That it was to have; None in folders of earlier versions."""
        return self.params.get("train.steps")


@click.command()
@click.option("--remove", is_flag=True, help="Remove the folders that nothing needs.")
@click.option("--unfinished", is_flag=True, help="Take those for not needed that could be resumed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(remove: bool, unfinished: bool, yes: bool) -> None:
    """List the trainings in runs/, and with --remove delete those that no result needs.

    A folder is needed while models/ or samples/ here are its training's, while it is unfinished, while a process is at
    work in it, and while MLflow lacks a part of its journal.
    """
    found = [look(path, unfinished) for path in training_folders(paths.RUNS)]
    for line in table(found):
        click.echo(line)
    others = [path for path in paths.RUNS.glob("*") if path.is_dir() and path not in {folder.path for folder in found}]
    if others:
        click.echo(f"{len(others)} folders of searches and served models, {_shown(sum(map(_size, others)))}, stay")
    useless = [folder for folder in found if not folder.reasons]
    if not remove or not useless:
        click.echo(f"{len(useless)} of {len(found)} trainings are not needed" + (": see --remove" if useless else ""))
        return
    freed = _shown(sum(folder.size for folder in useless))
    if yes or click.confirm(f"Remove {len(useless)} of {len(found)} trainings ({freed})?"):
        removed = [folder for folder in useless if _remove(folder.path)]
        click.echo(f"removed {', '.join(folder.path.name for folder in removed)}")


def look(path: Path, unfinished: bool = False) -> RunFolder:
    """What a training's folder holds; `unfinished` ones are not needed for that."""
    params = _flat((read_record(path) or {}).get("config", {}))
    files = [file for file in path.rglob("*") if file.is_file()]
    step = max((int(file.name[5:13]) for file in path.glob("step_*.pt")), default=0)
    cards = {paths.MODEL_CARD: "models/", paths.SAMPLES_CARD: "samples/"}
    reasons = [where for card, where in cards.items() if _names(card, path.name)]
    if not unfinished and step < params.get("train.steps", step + 1):
        reasons.append("unfinished")
    if unsent(path / JOURNAL):
        reasons.append("unsent: make sync")
    if _is_held(path):
        reasons.append("in use")
    used = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    return RunFolder(path, params, step, _size(path), used, tuple(reasons))


def table(folders: Sequence[RunFolder]) -> list[str]:
    """A line each: name, step, size, when it was last used, why it stays, and the params that not all have alike."""
    keys = sorted({key for folder in folders for key in folder.params})
    known = [folder for folder in folders if folder.params]
    differing = [key for key in keys if len({repr(folder.params.get(key)) for folder in known}) > 1]
    lines = []
    for folder in folders:
        day = time.strftime("%Y-%m-%d", time.localtime(folder.used))
        values = [f"{key}={folder.params[key]}" for key in differing if key in folder.params]
        about = " ".join(values) if folder.params else "of an earlier version"
        step = f"step {folder.step} of {folder.steps or '?'}"
        needed = ", ".join(folder.reasons) or "not needed"
        lines.append(f"{folder.path.name}  {step:<22} {_shown(folder.size):>9}  {day}  {needed:<30} {about}".rstrip())
    return lines


def _remove(path: Path) -> bool:
    """Delete a folder unless a process is at work in it."""
    try:
        with FileLock(path / "lock", timeout=0):
            shutil.rmtree(path)
    except Timeout:
        return False
    return True


def _is_held(path: Path) -> bool:
    for lock in [path / "lock", *path.glob("*.lock")]:
        if lock.exists():
            try:
                with FileLock(lock, timeout=0):
                    pass
            except Timeout:
                return True
    return False


def _names(card: Path, fingerprint: str) -> bool:
    try:
        return bool(json.loads(card.read_text())["fingerprint"] == fingerprint)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True  # what cannot be read may need any of them


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _shown(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
