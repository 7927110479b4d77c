"""Tests leave the repository alone: each works in a folder of its own, and a look at the end finds what one changed."""

import os
from pathlib import Path

import pytest
from helpers.project import REPO

from diffusion import paths

# State that the library keeps at the repository's root, by its name in `paths` and below the root.
ANCHORED = {
    name: path.relative_to(paths.ROOT)
    for name, path in vars(paths).items()
    if isinstance(path, Path) and path.is_absolute()
}
SERVICES = ("MLFLOW_", "OPTUNA_", "DVC_")  # what the environment says of them is for the user's own runs
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",  # pytest-xdist runs a worker a core
    "PYTHONPATH": os.pathsep.join(str(REPO / part) for part in ("src", "", "tests")),  # of processes that tests start
}
SKIPPED = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in `folder` until `patch` is undone, with an environment that names no service of the user's."""
    patch.chdir(folder)
    anchor(folder, patch)
    for name in [name for name in os.environ if name.startswith(SERVICES) and name not in SETTINGS]:
        patch.delenv(name)
    for name, value in {**SETTINGS, "MLFLOW_TRACKING_URI": ""}.items():
        patch.setenv(name, value)
    patch.delenv("MLFLOW_TRACKING_URI")  # if mlflow.set_tracking_uri sets it, `patch` takes it away


def anchor(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for name, path in ANCHORED.items():
        patch.setattr(paths, name, folder / path)


State = dict[str, tuple[int, int]]


def snapshot(folder: Path = REPO) -> State:
    """(bytes, time of change) of each file below `folder`, by path; (0, 0) of folders. Caches of tools are left out."""
    found: State = {}
    for entry in os.scandir(folder):
        if entry.name in SKIPPED or entry.name.endswith(".egg-info"):
            continue
        if entry.is_dir(follow_symlinks=False):
            found[entry.path] = (0, 0)
            found |= snapshot(Path(entry.path))
        else:
            about = entry.stat(follow_symlinks=False)
            found[entry.path] = (about.st_size, about.st_mtime_ns)
    return found


def differences(before: State, after: State) -> list[str]:
    """A line for each file or folder that was created, changed or removed."""
    kinds = {path: "created" if path not in before else "removed" for path in before.keys() ^ after.keys()}
    kinds |= {path: "changed" for path in before.keys() & after.keys() if before[path] != after[path]}
    return [f"{kind}: {path}" for path, kind in sorted(kinds.items())]
