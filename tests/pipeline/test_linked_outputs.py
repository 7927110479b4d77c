"""Outputs that are links into DVC's cache, read-only (`cache.type` symlink or hardlink): none is written through."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.commands import STAGES, run
from helpers.project import REPO
from ruamel.yaml import YAML

from diffusion.__main__ import main
from diffusion.config import Params, trained
from diffusion.model.diffusers_format import write_pipeline
from diffusion.model.unet import UNet

OTHERWISE = {  # so that what a stage writes differs from what lies there
    "prepare": ["--data.val_images=15"],
    "reference": ["--evaluate.reference_images=18"],
    "train": ["--train.steps=6"],
    "sample": ["--seed=1"],
    "evaluate": ["--evaluate.reference_images=18"],
}
RIGHTS = "-dac_override,-dac_read_search"  # by which root writes what is read-only
AS_A_USER = ["setpriv", f"--inh-caps={RIGHTS}", f"--bounding-set={RIGHTS}"] if os.geteuid() == 0 else []


def outputs() -> list[Path]:
    """The files below every output and metric that dvc.yaml declares."""
    stages = YAML(typ="safe").load(REPO / "dvc.yaml")["stages"].values()
    declared = [out for stage in stages for out in [*stage.get("outs", []), *stage.get("metrics", [])]]
    found = [Path(out if isinstance(out, str) else next(iter(out))) for out in declared]
    return sorted(file for out in found for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())


def link(kind: str, cache: Path) -> dict[Path, str]:
    """Move every output into `cache`, read-only, and leave a link in its place; the cached files with their digests."""
    digests = {}
    for output in outputs():
        cached = cache / output
        cached.parent.mkdir(parents=True, exist_ok=True)
        output.rename(cached)
        cached.chmod(0o444)
        output.symlink_to(cached) if kind == "symlink" else output.hardlink_to(cached)
        digests[cached] = sha256(cached.read_bytes()).hexdigest()
    return digests


def write_all_again() -> None:
    """Every stage, then the command that writes models/ from a pipeline of diffusers."""
    for stage in STAGES[1:]:
        assert run(stage, *OTHERWISE.get(stage, [])).exit_code == 0, stage
    done = CliRunner().invoke(main, ["interchange", "read", "pipeline"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", ["hardlink", pytest.param("symlink", marks=pytest.mark.slow)])
def test_what_a_link_leads_to_stays(finished: Path, kind: str, tiny: Callable[..., Params]) -> None:
    shutil.rmtree("runs")  # a finished training would be kept
    config = trained(tiny(**{"model.patch_size": 1, "model.upsample": "conv"}))
    write_pipeline(UNet(config.model), config, Path("pipeline"))
    digests = link(kind, finished / "cache")
    again = subprocess.run([*AS_A_USER, sys.executable, __file__], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {cached: sha256(cached.read_bytes()).hexdigest() for cached in digests} == digests
    written = [path for path in outputs() if path.parts[:2] != ("data", "cifar10")]
    assert len(written) > 30
    assert not [path for path in written if path.is_symlink() or path.stat().st_nlink > 1]


if __name__ == "__main__":
    write_all_again()
