"""Where a result comes from: the source files that decide it, the commit, the params, the machine."""

import json
import platform
import subprocess
import sys
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from modulefinder import ModuleFinder
from pathlib import Path

import torch

from diffusion.config import Params, to_dict

PACKAGES = ("torch", "numpy", "mlflow", "dvc")

LIBRARY = Path(__file__).parent


@cache
def import_closure(script: Path, root: Path = LIBRARY.parent) -> frozenset[Path]:
    """The files below `root` that running `script` can import, the script included; nothing is executed."""
    finder = ModuleFinder(path=[str(root)])
    finder.run_script(str(script))
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    return frozenset(Path(file) for file in files if file)


def code_digest(script: Path) -> str:
    """sha256 over the import closure of `script`: changes whenever code that it depends on does."""
    sha = sha256()
    for path in sorted(import_closure(script)):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def origin(params: Params, device: torch.device) -> dict[str, str]:
    """Texts that say what made a model: commit, params, the pipeline's state before the stage, device, versions."""
    lock = Path("dvc.lock")
    found = {**git_tags(), "params.digest": sha256(json.dumps(to_dict(params), sort_keys=True).encode()).hexdigest()}
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
