import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from diffusion.ema import EMA, ema_decay
from diffusion.optim import learning_rate, make_optimizer


@pytest.fixture
def train(tiny):
    return dataclasses.replace(tiny().train, steps=100, warmup_steps=10, lr=0.5)


def test_the_warm_up_is_linear_and_ends_at_lr(train) -> None:
    assert [learning_rate(k, train) for k in range(10)] == pytest.approx([0.05 * (k + 1) for k in range(10)])


@pytest.mark.parametrize(
    ("name", "halfway"), [("constant", 0.5), ("linear", 0.25), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)) / 2)]
)
def test_decays_from_lr_towards_zero(train, name: str, halfway: float) -> None:
    train = dataclasses.replace(train, lr_schedule=name)
    values = [learning_rate(k, train) for k in range(10, 100)]
    assert values[0] == 0.5
    assert values[45] == pytest.approx(halfway)
    assert all(a >= b for a, b in itertools.pairwise(values))
    if name != "constant":
        assert 0 < values[-1] < 0.01


def test_without_warm_up_the_first_step_has_the_full_rate(train) -> None:
    assert learning_rate(0, dataclasses.replace(train, warmup_steps=0)) == 0.5


def test_weight_decay_spares_biases_and_norms(train) -> None:
    """With zero gradients AdamW moves a weight by -lr * decay * weight, and nothing else (Loshchilov & Hutter 2019)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    optimizer = make_optimizer(net, dataclasses.replace(train, lr=0.1, weight_decay=0.2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 1 - 0.1 * 0.2 if name == "0.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_ema_is_the_weighted_sum_of_all_weights() -> None:
    net = nn.Linear(2, 1, bias=False)
    ema = EMA(net)
    expected = net.weight.detach().double().clone()
    for step in range(50):
        with torch.no_grad():
            net.weight.add_(torch.randn(1, 2))
        decay = ema_decay(step, 0.9)
        ema.update(net, decay)
        expected = decay * expected + (1 - decay) * net.weight.detach().double()
    torch.testing.assert_close(ema.net.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not ema.net.weight.requires_grad


def test_ema_warms_up_so_that_the_random_start_is_soon_forgotten() -> None:
    assert ema_decay(0, 0.9999) == pytest.approx(0.1)
    assert ema_decay(10**9, 0.9999) == 0.9999
    share_of_start = math.prod(ema_decay(step, 0.9999) for step in range(100))
    assert share_of_start < 1e-9  # without the warm-up: 0.99
