"""The arithmetic of benchmarks/: what is counted, compared and written. Nothing is timed here."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.project import REPO
from torch import nn

from diffusion import params_file
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet
from diffusion.sampling.samplers import evaluations


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ as its scripts do; they find the recipes in the working folder."""
    Path("params").symlink_to(REPO / "params")
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module


def test_the_matched_network_is_the_one_that_is_announced(script: Any) -> None:
    """2.74M parameters and 0.764 GFLOP a forward pass, as diffusers' network of this layout has."""
    model = script("matched").params(128).model
    assert sum(p.numel() for p in UNet(model).parameters()) == pytest.approx(2.74e6, rel=0.005)
    assert script("rates").forward_flops(model) == pytest.approx(0.764e9, rel=0.005)


def test_peers_networks_match(script: Any) -> None:
    pytest.importorskip("denoising_diffusion_pytorch", reason="bench packages: make bench installs them")
    matched, peers, rates = script("matched"), script("peers"), script("rates")
    theirs = peers.diffusers_unet(matched.diffusers_model(128))
    ours = UNet(matched.params(128).model)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert rates.count_flops(theirs) == pytest.approx(rates.count_flops(ours), rel=0.01)
    lucidrains = peers.lucidrains_diffusion(*matched.LUCIDRAINS).model
    assert rates.count_flops(lucidrains) == pytest.approx(rates.count_flops(ours), rel=0.01)


def test_flops_of_a_convolution_are_those_of_its_formula(script: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    assert script("rates").count_flops(Net()) == 2 * 32 * 32 * 8 * 3 * 9


def test_products_of_a_step_are_all_counted(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution and a linear layer, forward and backward: 1 + 1 and 1 + 2 products (input and weight gradients)."""
    module = script("product_share")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    x = torch.randn(2, 3, 5, 5)
    recorders: list[Any] = []
    recorder = module.Recorder
    monkeypatch.setattr(module, "Recorder", lambda: recorders.append(recorder()) or recorders[-1])
    seconds = module.products_alone(lambda: net(x).sum().backward())
    assert seconds > 0
    counts = {func.overloadpacket.__name__: 0 for func, _ in recorders[0].counts}
    for (func, _), count in recorders[0].counts.items():
        counts[func.overloadpacket.__name__] += count
    assert counts == {"convolution": 1, "convolution_backward": 1, "addmm": 1, "mm": 2}


def test_medians_and_ratios(script: Any) -> None:
    found = {
        "ours": {"rates": [10.0, 30.0, 20.0], "peak_memory_mb": 1},
        "slow": {"rates": [5.0, 4.0, 6.0], "peak_memory_mb": 2},
        "absent": {"error": "not installed"},
    }
    summary = script("turns").summary(found)
    assert summary["ours"] == {"median": 20.0, "min": 10.0, "max": 30.0, "peak_memory_mb": 1, "ours_is_times": 1.0}
    assert summary["slow"]["ours_is_times"] == 4.0
    assert summary["absent"] == {"error": "not installed"}


def test_what_is_printed_is_what_is_kept(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = script("machine")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    machine.report("one", {"value": 3}, peers=("numpy", "no-such-package"))
    kept = json.loads((tmp_path / "one.json").read_text())
    assert kept == json.loads(capsys.readouterr().out)
    assert kept["value"] == 3
    assert kept["machine"]["numpy"]
    assert kept["machine"]["no-such-package"] is None


def test_the_bench_lock_has_every_package_of_the_main_one_at_the_same_version() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==[^\s;]+", (REPO / name).read_text(), re.M))

    assert pins("requirements.lock") < pins("requirements-bench.lock")


def test_solvers_are_compared_at_the_same_evaluations(script: Any) -> None:
    solvers = script("solvers")
    section = params_file.load(REPO / "params.yaml").sample
    edm = make_schedule("edm", 1000)  # begins at sigma = 80: Heun takes its two evaluations from the first step on
    spent: dict[tuple[str, str], list[int]] = {}
    for run in solvers.runs(section):
        spent.setdefault((run.sampler, run.spacing), []).append(evaluations(run, edm))
    assert list(spent) == list(solvers.SOLVERS)
    for (sampler, spacing), counts in spent.items():
        expected = [5, 9, 15, 19, 49, 99] if sampler == "heun" else [5, 10, 15, 20, 50, 100]
        assert counts == (expected if spacing == "trailing" else expected[:4])


def test_objectives_are_summed_up_over_their_seeds(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives, machine = script("objectives"), script("machine")
    for module in (objectives, machine):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    scores = {"v, seed 0": 300.0, "v, seed 1": 320.0, "v, min-SNR weight, seed 0": 400.0}
    found = {key: {"fd_lite0": {"ddim-20 trailing": value}} for key, value in scores.items()}
    objectives.write("abc", found)
    table = json.loads(capsys.readouterr().out)["fd_lite0"]
    assert table["v"]["ddim-20 trailing"] == {"mean": 310.0, "sd": 14.1, "seeds": 2}
    assert table["v, min-SNR weight"]["ddim-20 trailing"] == {"mean": 400.0, "sd": None, "seeds": 1}
    assert objectives.kept("abc") == found
    assert objectives.kept("another recipe") == {}


def test_the_linear_classifier_separates_what_can_be_separated(script: Any) -> None:
    """Three Gaussians far apart."""
    classes = script("classes")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] * 5 + torch.randn((300, 3), generator=generator)
    linear = classes.fitted(features, labels)
    answers = linear(torch.eye(3) * 5).argmax(dim=1)
    assert answers.tolist() == [0, 1, 2]


def test_the_share_of_tracking_is_that_of_a_default_run(script: Any) -> None:
    """1000 steps of 0.1 s, 10 validations of 1 s, 2 checkpoints of 5 s; tracking 1 + 10 * 2 + 4 + 1000 * 0.01 + 5 s."""
    module = script("tracking_cost")
    clock = script("overheads").Clock()
    seconds = {"step": 5.0, "validation": 2.0, "checkpoints": 5.0, "previews": 4.0, "start": 1.0, "close": 4.0}
    calls = {"step": 50, "validation": 2, "checkpoints": 1, "previews": 2, "start": 1, "close": 1}
    clock.seconds.update({**seconds, "metrics and curves": 0.5})
    clock.calls.update({**calls, "metrics and curves": 50})
    full = SimpleNamespace(steps=1000, validate_every=100, preview_every=100, checkpoint_every=500)
    found = module.shares(clock, 0.25, 50, full)  # the thread: 20 times as much
    assert found["seconds_of_a_default_run"] == 100 + 10 + 10 + 40
    assert found["share"] == 40 / 160
