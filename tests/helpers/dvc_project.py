"""A clone of the working tree in which `dvc` runs as users run it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import STAGES
from helpers.project import REPO, TINY, write_images
from ruamel.yaml import YAML

from diffusion import params_file


def ran(said: str) -> set[str]:
    """Stages that DVC says it runs."""
    return set(re.findall(r"Running stage '(\w+)'", said))


class Project:
    """A git clone of the working tree with tiny images and shrunk params, where `dvc` runs as users run it."""

    def __init__(self, folder: Path) -> None:
        """One that lies in `folder`; `clone` makes it."""
        self.folder = folder

    def clone(self) -> None:
        """Make it, with nothing but what a download leaves."""
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
        )
        for name in tracked.stdout.splitlines():
            if (REPO / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, self.folder / name)
        (self.folder / "dvc.lock").unlink(missing_ok=True)
        shrunk = {**TINY, "train.steps": 4, "tracking.enabled": False}
        YAML().dump(params_file.load(REPO / "params.yaml", shrunk).model_dump(mode="json"), self.folder / "params.yaml")
        write_images(self.folder / "data/cifar10")
        self.git("init", "-q")
        for key, value in (("user.name", "t"), ("user.email", "t@example.org")):  # `dvc exp apply` wants them too
            self.git("config", key, value)
        self.dvc("commit", "-f", "download")  # stands for a download: the real digests cannot be had from tiny images
        self.commit()

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", "a commit of the user's")

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def dvc(self, *arguments: str, check: bool = True) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dvc", *arguments]
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    def repro(self, *targets: str) -> set[str]:
        """Stages that ran."""
        return ran(self.dvc("repro", *targets))

    def stale(self) -> set[str]:
        """Stages that `dvc status` finds changed. Asked in this process, in a third of the command's time."""
        from dvc.repo import Repo

        with contextlib.chdir(self.folder), Repo() as repo:
            return set(repo.status())

    def trainings(self) -> list[Path]:
        """A folder for each that was begun."""
        return [path.parent for path in (self.folder / "runs").glob("*/lock")]

    def set(self, **values: Any) -> None:
        """Write values into params.yaml, by dotted key."""
        path = self.folder / "params.yaml"
        tree = YAML().load(path)
        for key, value in values.items():
            section, name = key.split(".")
            tree[section][name] = value
        YAML().dump(tree, path)

    def edit(self, name: str, line: str) -> None:
        """Add a line to a file."""
        path = self.folder / name
        path.write_text(f"{path.read_text()}\n{line}")

    @contextlib.contextmanager
    def changed(self, name: str, line: str = "") -> Iterator[None]:
        """Add a line to a file for a while; whatever is done to it, it is as before in the end."""
        path = self.folder / name
        before = path.read_text()
        self.edit(name, line)
        yield
        path.write_text(before)


@pytest.fixture(scope="session")
def reproduced(once: Callable[..., Path]) -> Path:
    """A project after one real `dvc repro`."""

    def make(folder: Path) -> None:
        made = Project(folder)
        made.clone()
        assert made.repro() == set(STAGES) - {"download"}
        made.commit()

    return once("reproduced", make)


@pytest.fixture
def project(reproduced: Path, tmp_path: Path) -> Project:
    """A copy of it, to be changed."""
    return Project(Path(shutil.copytree(reproduced, tmp_path / "project", symlinks=True)))
