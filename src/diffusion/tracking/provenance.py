"""Where a result comes from: the source files that decide it, the commit, the params, the machine."""

import json
import platform
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from diffusion.config import Params

PACKAGES = ("torch", "numpy", "mlflow", "dvc")


def origin(params: Params, device: torch.device) -> dict[str, str]:
    """Texts that say what made a model: commit, params, the pipeline's state before the stage, device, versions."""
    lock = Path("dvc.lock")
    text = json.dumps(params.model_dump(mode="json"), sort_keys=True)
    found = {**git_tags(), "params.digest": sha256(text.encode()).hexdigest()}
    if lock.exists():
        found["dvc.lock"] = sha256(lock.read_bytes()).hexdigest()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    return found | {"device": f"{device.type}: {gpu}", "versions": ", ".join(versions)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def git_tags() -> dict[str, str]:
    """`git.commit` and `git.dirty` ("true" if a tracked file differs) of the working folder; empty outside git."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.CalledProcessError):  # no Git, or none here
        return None
    except subprocess.TimeoutExpired as error:
        print(f"warning: {error}: the commit is not recorded", file=sys.stderr)
        return None
    return run.stdout.strip()
