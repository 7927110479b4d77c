"""The stage commands in this process, and what a test waits for of one in a process of its own."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from helpers.preloaded import Command
from helpers.project import REPO, TINY
from ruamel.yaml import YAML

from diffusion import params_file, paths

STAGES = ("download", "prepare", "weights", "reference", "train", "sample", "evaluate", "report")


def write_params(recipe: str = "params.yaml", **overrides: Any) -> None:
    """Write params.yaml of the working folder: `recipe`, shrunk."""
    tree = params_file.load(REPO / recipe, {**TINY, "tracking.enabled": False, **overrides}).model_dump(mode="json")
    YAML().dump(tree, Path("params.yaml"))


def run(stage: str, *arguments: str) -> Result:
    return CliRunner().invoke(importlib.import_module(f"stages.{stage}").main, arguments, catch_exceptions=False)


def run_all(*stages: str) -> None:
    for stage in stages or STAGES[1:]:
        result = run(stage)
        assert result.exit_code == 0, f"{stage}: {result.output}"


def wait_for_checkpoint(after: int, process: Command) -> None:
    wait_for_file(process, lambda: any(int(p.name[5:13]) >= after for p in paths.RUNS.glob("*/step_*.pt")))


def wait_for_file(process: Command, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.returncode is None, process.said
        assert time.monotonic() < deadline, process.said
        time.sleep(0.01)
