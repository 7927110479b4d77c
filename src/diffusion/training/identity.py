"""The name of a training: what would change its weights changes it. And why one that is known here starts anew."""

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from diffusion.atomic import write_json
from diffusion.code_digest import LIBRARY, code_digests
from diffusion.config import TrainedConfig

# Keys of the train section that say how the same steps are computed or shown: a training may go on with others.
HOW = ("micro_batch", "compile", "processes", "checkpoint_every", "device", "preview_every", "preview_images")
# Code in the loop's import closure of which no bit of the weights depends.
NOT_IN_WEIGHTS = ("code_digest.py", "training/checkpoint.py", "training/identity.py")
RECORD = "identity.json"  # in the run folder: `identity`, and the requirements.lock that the training began with
REQUIREMENTS = Path("requirements.lock")


def identity(config: TrainedConfig, data: str, library: Path = LIBRARY) -> dict[str, Any]:
    """All that decides the weights: params (but HOW), data (`Dataset.identity`), code file by file, torch's version."""
    scripts = ["training/loop.py"]
    if config.train.evaluate_every:  # else nothing depends on it
        scripts.append("training/scoring.py")
    code = code_digests(*scripts, without=NOT_IN_WEIGHTS, library=library)
    return {"config": deciding(config.model_dump(mode="json")), "data": data, "code": code, "torch": torch.__version__}


def fingerprint(config: TrainedConfig, data: str, library: Path = LIBRARY) -> str:
    """16 hex digits of `identity`, which name the run folder."""
    return sha256(json.dumps(identity(config, data, library), sort_keys=True).encode()).hexdigest()[:16]


def deciding(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a TrainedConfig without what decides no weight."""
    left_out = HOW if tree["train"]["evaluate_every"] else (*HOW, "preview_steps")  # scores are of such samples
    return {**tree, "train": {key: value for key, value in tree["train"].items() if key not in left_out}}


def begin(folder: Path, known: Mapping[str, Any]) -> Iterator[str]:
    """Record in `folder` that a training of this identity begins, unless that is recorded already.

    Yields lines for the user: why it starts anew although its params and data are known among the folders beside it,
    which of those cannot be resumed, and that other packages are pinned now.
    """
    record, lock = read_record(folder), _lock_digest()
    if record is None:
        yield from _why_anew(folder.parent, known)
        write_json(folder / RECORD, {**known, "requirements": lock})
    elif record.get("requirements") != lock:
        yield f"{REQUIREMENTS} changed since {_shown(folder)} began, torch {known['torch']} is the same: it is used"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `begin` recorded; None where it did not, or not readably."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def training_folders(runs: Path) -> list[Path]:
    """The trainings below `runs`, the one that was begun last at the end; no searches and none of their trials."""
    found = [path for path in runs.glob("*") if re.fullmatch(r"[0-9a-f]{16}", path.name) and _is_training(path)]
    return sorted(found, key=lambda path: (path.stat().st_ctime_ns, path.name))


def _is_training(folder: Path) -> bool:
    return (folder / RECORD).exists() or any(folder.glob("step_*.pt"))


def _why_anew(runs: Path, known: Mapping[str, Any]) -> Iterator[str]:
    nameless, like = [], None
    for folder in training_folders(runs):
        record = read_record(folder)
        if record is None:
            nameless.append(folder.name)
        elif all(record.get(key) == known[key] for key in ("config", "data")):
            like = folder, record
    if like:
        yield f"starts anew: since {_shown(like[0])} {_difference(like[1], known)}"
    if nameless:
        names = ", ".join(nameless[:3]) + (", ..." if len(nameless) > 3 else "")
        count = f"{len(nameless)} of an earlier version in {runs.name}/"
        yield f"{count}, whose code is not recorded, cannot be resumed: {names}"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, now = old.get("code", {}), new["code"]
    files = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    parts = [f"the code changed: {', '.join(files)}"] if files else []
    if old.get("torch") != new["torch"]:
        parts.append(f"torch {old.get('torch')} -> {new['torch']}")
    return " and ".join(parts) or "its record was changed"


def _lock_digest() -> str | None:
    return sha256(REQUIREMENTS.read_bytes()).hexdigest() if REQUIREMENTS.exists() else None


def _shown(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"
