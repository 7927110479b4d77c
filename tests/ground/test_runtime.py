"""Choices that depend on the machine."""

import pytest
import torch

from diffusion import runtime


@pytest.mark.parametrize(
    ("vendor", "amx", "avx512", "chosen"),
    [
        ("Intel", True, True, torch.bfloat16),
        ("Intel", False, True, torch.float32),  # there its products are no faster, and converting costs
        ("AMD", False, True, torch.bfloat16),
        ("AMD", False, False, torch.float32),
        ("", False, False, torch.float32),
    ],
)
def test_auto_takes_the_faster_precision(
    monkeypatch: pytest.MonkeyPatch, vendor: str, amx: bool, avx512: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(runtime, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert runtime.resolve_precision("auto", torch.device("cpu")) == chosen
    assert runtime.resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert runtime.resolve_precision("fp32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("choice", "device", "steps", "compiles"),
    [
        ("auto", "cpu", 10**6, False),
        ("auto", "cuda", 10**6, True),
        ("auto", "cuda", 100, False),
        ("on", "cpu", 1, True),
        ("on", "cuda", 1, True),
        ("off", "cuda", 10**6, False),
    ],
)
def test_compilation_is_for_long_trainings_on_cuda(
    monkeypatch: pytest.MonkeyPatch, choice: str, device: str, steps: int, compiles: bool
) -> None:
    monkeypatch.setattr(torch, "compile", lambda net, **_: ("compiled", net))
    net = torch.nn.Linear(1, 1)
    found = runtime.compiled(net, choice, torch.device(device), steps)
    assert found == (("compiled", net) if compiles else net)
