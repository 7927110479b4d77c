"""A clone of the working tree in which `dvc` runs as users run it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from helpers.project import REPO, TINY
from ruamel.yaml import YAML

from diffusion import config, params_file


def ran(said: str) -> set[str]:
    """Stages that DVC says it runs."""
    return set(re.findall(r"Running stage '(\w+)'", said))


class Project:
    """A git clone of the working tree with tiny images and shrunk params, where `dvc` runs as users run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
        )
        for name in tracked.stdout.splitlines():
            if (REPO / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        tree = config.to_dict(
            params_file.load(REPO / "params.yaml", {**TINY, "train.steps": 4, "tracking.enabled": False})
        )
        YAML().dump(tree, folder / "params.yaml")
        rng = np.random.default_rng(0)
        (folder / "data/cifar10").mkdir(parents=True)
        for split, count in (("train", 60), ("test", 30)):
            coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            np.savez(folder / f"data/cifar10/{split}.npz", images=coarse.repeat(8, 1).repeat(8, 2), labels=labels)
        self.git("init", "-q")
        for key, value in (("user.name", "t"), ("user.email", "t@example.org")):  # `dvc exp apply` wants them too
            self.git("config", key, value)
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.dvc("commit", "-f", "download")  # stands for a download: the real digests cannot be had from tiny images

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def dvc(self, *arguments: str, check: bool = True) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dvc", *arguments]
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    def repro(self) -> set[str]:
        """Stages that ran."""
        return ran(self.dvc("repro"))

    def set(self, **values: Any) -> None:
        path = self.folder / "params.yaml"
        tree = YAML().load(path)
        for key, value in values.items():
            section, name = key.split("__")
            tree[section][name] = value
        YAML().dump(tree, path)

    def edit(self, module: str) -> None:
        path = self.folder / f"src/diffusion/{module}.py"
        path.write_text(path.read_text() + "\n# edited\n")
