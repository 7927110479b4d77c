"""The stage commands: in this process, or as processes of their own."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from helpers.project import REPO, TINY
from ruamel.yaml import YAML

from diffusion import config, params_file, paths

STAGES = ("download", "prepare", "weights", "reference", "train", "sample", "evaluate", "report")


def write_params(recipe: str = "params.yaml", **overrides: Any) -> None:
    """Write params.yaml of the working folder: `recipe`, shrunk."""
    tree = config.to_dict(params_file.load(REPO / recipe, {**TINY, "tracking.enabled": False, **overrides}))
    YAML().dump(tree, Path("params.yaml"))


def run(stage: str, *arguments: str) -> Result:
    return CliRunner().invoke(importlib.import_module(f"stages.{stage}").main, arguments, catch_exceptions=False)


def run_all(*stages: str) -> None:
    for stage in stages or STAGES[1:]:
        result = run(stage)
        assert result.exit_code == 0, f"{stage}: {result.output}"


def start(*module: str) -> subprocess.Popen[str]:
    """`python -m` module, with its arguments, in this folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPO}/src:{REPO}",
        "DVC_ROOT": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a suite that a shell runs in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(after: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(p.name[5:13]) >= after for p in paths.RUNS.glob("*/step_*.pt")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint: {process.stderr.read() if process.poll() is not None else ''}")
