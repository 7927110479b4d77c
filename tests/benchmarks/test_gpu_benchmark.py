"""benchmarks/gpu.py: its figures, and the whole command on a bare machine."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.project import REPO, TINY
from ruamel.yaml import YAML
from torch import nn

from diffusion import config, params_file
from diffusion.data.dataset import Dataset
from diffusion.metrics import frechet_distance
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import make_reference
from diffusion.model.denoiser import Denoiser
from diffusion.model.model_file import load_model
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet
from diffusion.sampling import generation
from diffusion.training.optim import learning_rate

ABSENT = ["mlflow", "dvc", "optuna", "requests", "urllib3"]
CPU = torch.device("cpu")


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of benchmarks/ as its scripts do."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module


def test_the_gpu_recipe_has_the_papers_size() -> None:
    """Four heads instead of one, no dropout: neither has weights."""
    model = params_file.load(REPO / "params/gpu.yaml").model
    assert sum(p.numel() for p in UNet(model).parameters()) == 35_746_307


def test_flops_are_those_of_the_layers(load_script: Any, tiny: Any) -> None:
    """Two a multiplication: convolutions, linear layers and attention's two products, counted by hooks."""
    model = tiny().model
    net, counted = UNet(model), 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(layer, nn.Conv2d):
            counted += 2 * output.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            counted += 2 * output.numel() * layer.in_features
        else:  # attention over H W positions: q k^T, then weights v
            counted += 2 * 2 * output.shape[1] * (output.shape[2] * output.shape[3]) ** 2

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) or type(layer).__name__ == "SelfAttention":
            layer.register_forward_hook(count)
    net(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    assert load_script("rates").forward_flops(model) == counted


def test_the_papers_network_costs_what_is_published(load_script: Any) -> None:
    """6.1 GMACs: Fang et al. 2023 (Structural pruning for diffusion models), table 1."""
    model = params_file.load(REPO / "params/paper.yaml").model
    assert load_script("rates").forward_flops(model) == pytest.approx(2 * 6.1e9, rel=0.02)


def test_diffusers_network_is_as_large(load_script: Any) -> None:
    pytest.importorskip("diffusers")
    net = load_script("peers").diffusers_unet(params_file.load(REPO / "params/paper.yaml").model)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_the_plain_loop_learns(load_script: Any, tiny: Any, tiny_data: Dataset) -> None:
    """A contestant that does not train would be no measure: the zeroed head must move."""
    params = tiny(**{"model.patch_size": 1})
    nets: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        peers = load_script("peers")
        patch.setattr(peers, "UNet", lambda model: nets.append(UNet(model)) or nets[-1])
        step = peers.plain_training(params.model, params.train, tiny_data, CPU, torch.float32)
    step()
    assert nets[0].head.weight.detach().abs().sum() > 0


def test_fitted_steps_end_the_learning_rate_and_leave_the_warm_up(load_script: Any, tiny: Any) -> None:
    warm_up = {"train.lr": 1e-3, "train.warmup_steps": 10, "train.steps": 20, "train.lr_schedule": "linear"}
    before = config.trained(tiny(**warm_up))
    after = load_script("gpu_quality").with_steps(before, 110)
    assert [learning_rate(s, after.train) for s in range(10)] == [learning_rate(s, before.train) for s in range(10)]
    assert learning_rate(109, after.train) == pytest.approx(1e-3 / 100)
    assert after.model_copy(update={"train": before.train}) == before
    few = load_script("gpu_quality").with_steps(before, 3)  # fewer than the warm-up has
    assert config.trained_from_dict(few.model_dump(mode="json")) == few


def test_a_part_that_fails_is_recorded_and_the_next_has_the_time(load_script: Any, tmp_path: Path) -> None:
    session_module = load_script("gpu_session")
    session = session_module.Session(100.0, tmp_path / "out", ["machine", "train", "samples"])
    given: dict[str, float] = {}

    def fail(part: Any) -> None:
        part.keep(measured=1)
        raise ValueError("out of order")

    session.run("machine", fail)
    session.run("speed", fail)  # not selected
    for name in ("train", "samples"):
        session.run(name, lambda part: given.update({part.name: part.seconds}))
    parts = json.loads((tmp_path / "out/result.json").read_text())["parts"]
    assert list(parts) == ["machine", "train", "samples"]
    assert parts["machine"]["measured"] == 1
    assert parts["machine"]["status"] == "failed"
    assert parts["machine"]["error"] == "ValueError: out of order"
    assert parts["samples"]["status"] == "done"
    again = session_module.Session(100.0, tmp_path / "out", ["machine"])
    again.run("machine", lambda part: None)
    parts = json.loads((tmp_path / "out/result.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    assert len(parts) == 3
    weights = session_module.WEIGHTS
    expected = 100 * weights["train"] / (weights["train"] + weights["samples"])
    assert given["train"] == pytest.approx(expected, rel=0.05)
    assert given["samples"] == pytest.approx(100, rel=0.05)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start gpu.py on 60 small images, with every package that the GPU machine lacks made unimportable."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=coarse.repeat(8, 1).repeat(8, 2), labels=np.arange(60, dtype=np.uint8) % 10)
    tiny = {**TINY, "sample.batch_size": 12, "train.log_every": 1}
    YAML().dump(params_file.load(REPO / "params/gpu.yaml", tiny).model_dump(mode="json"), tmp_path / "tiny.yaml")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {ABSENT}:\n"
        "            raise ModuleNotFoundError(f'{name} is absent by the test', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )

    def start(*arguments: str) -> subprocess.Popen[str]:
        files = ["--data", "train.npz", "--out", "out", "--params", "tiny.yaml", "--speed-params", "tiny.yaml"]
        return subprocess.Popen(
            [sys.executable, str(REPO / "benchmarks/gpu.py"), *files, "--batch-sizes", "4", *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO / 'src'}", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def library_samples(model: Path) -> np.ndarray:
    """The 12 images that the library makes of `model` with the shrunk recipe."""
    net, trained = load_model(model)
    schedule = make_schedule(trained.diffusion.schedule, trained.diffusion.num_steps)
    params = params_file.load(REPO / "params/gpu.yaml", {**TINY, "sample.batch_size": 12})
    denoiser = Denoiser(net, schedule, trained.diffusion.prediction, clip_x0=params.sample.clip_x0)
    return np.concatenate(
        [b.numpy() for b in generation.generate(denoiser, params.sample, params.seed, range(12), CPU)]
    )


@pytest.mark.slow
def test_the_whole_command_needs_none_of_the_services(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output = command("--seconds", "10", "--more-images", "20").communicate(timeout=300)[0]
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(
        ["machine", "speed", "sampling", "train", "samples"], "done"
    ), output
    contestants = result["parts"]["speed"]["batches"]["4"]
    assert contestants["ours"]["images/s"] > 0
    assert result["parts"]["sampling"]["contestants"]["ours"]["evaluations/s"] > 0

    training = result["parts"]["train"]
    with (tmp_path / "out/loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert training["steps"] == len(rows) == int(rows[-1]["step"])
    assert training["images_seen"] == 4 * len(rows)
    card = json.loads((tmp_path / "out/card.json").read_text())
    if "time is up before the last step" not in output:
        assert card["config"]["train"]["steps"] == training["steps"]  # the schedule ended with the steps

    with np.load(tmp_path / "out/images_00000.npz") as archive:
        samples = archive["images"]
    np.testing.assert_array_equal(samples, library_samples(tmp_path / "out/large/model.safetensors"))
    with np.load(tmp_path / "train.npz") as archive:
        real = archive["images"][:20]
    reference = make_reference(real, "train", EfficientNetLite0(), 10, CPU)
    found = moments_of(samples, EfficientNetLite0(), 10, CPU, "samples")
    expected = frechet_distance(found.mean, found.cov, reference.mean, reference.cov)
    assert result["parts"]["samples"]["scores"]["fd_lite0_12"]["value"] == pytest.approx(expected, rel=1e-6)
    assert "fid" in result["parts"]["samples"]["skipped"]
    assert (tmp_path / "out/grid.png").stat().st_size > 500


@pytest.mark.slow
def test_a_stopped_command_keeps_its_model(command: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = command("--seconds", "600", "--parts", "machine", "train", "samples")
    assert process.stdout is not None
    for line in process.stdout:
        if "first step" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    parts = json.loads((tmp_path / "out/result.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"machine": "done", "train": "stopped"}
    assert parts["train"]["steps"] > 0
    assert library_samples(tmp_path / "out/large/model.safetensors").shape == (12, 32, 32, 3)


def test_a_mistake_is_one_line_and_nothing_is_written(
    load_script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(REPO / "params/gpu.yaml")
    given = ["--data", "train.npz", "--out", "out", "--params", recipe, "--set", "train.lrr=1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    assert load_script("gpu").main() == 2
    assert capsys.readouterr().err == f"error: {recipe}: unknown key train.lrr: did you mean train.lr?\n"
    assert not Path("out").exists()
