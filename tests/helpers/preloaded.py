"""Processes forked from one that has imported torch, MLflow and the stages' code, which takes seconds, once."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.isolation import anchor

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "helpers.preloaded",
        *(f"diffusion.pipeline.{stage}" for stage in ("train", "sample", "reference", "evaluate")),
        "torch._dynamo",  # the optimiser imports it
        "torch.distributed.run",
        "helpers.fast_trials",
        "uvicorn",
        "mlflow.server.fastapi_app",
        "mlflow.server.handlers",
    ]
)


class Command:
    """`python -m module argument ...`, started in this folder; what it says is kept in a file."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._said = Path(f"said by {module} {time.monotonic_ns()}").absolute()
        environment = {**os.environ, "DVC_ROOT": str(Path.cwd())}
        self._process = CONTEXT.Process(target=_enter, args=(self._said, environment, [module, *arguments]))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; -number if a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As subprocess.Popen."""
        return self.returncode

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self._said.read_text() if self._said.exists() else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> str:
        """What it said until its end; a process that does not end is killed, and fails the test."""
        self._process.join(seconds)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still at work after {seconds} s: {self.said}")
        return self.said

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return as soon as it has said `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.returncode is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)


def _enter(said: Path, environment: dict[str, str], command: list[str]) -> None:
    """In the new process: what a fresh interpreter would find."""
    with said.open("wb") as file, open(os.devnull, "r+b") as nothing:  # noqa: PTH123
        for number, target in enumerate((nothing, nothing, file)):
            os.dup2(target.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()  # as if a terminal had started it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in a shell's background ignores it
    torch.set_num_threads(1)
    anchor(Path(environment["DVC_ROOT"]), pytest.MonkeyPatch())
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
