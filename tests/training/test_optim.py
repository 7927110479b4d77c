import copy
import itertools
import math

import pytest
import torch
from torch import nn

from diffusion.training.ema import EMA, ema_decay
from diffusion.training.optim import clipped_step, learning_rate, make_optimizer


@pytest.fixture
def train(tiny):
    return tiny().train.model_copy(update={"steps": 100, "warmup_steps": 10, "lr": 0.5})


def test_the_warm_up_is_linear_and_ends_at_lr(train) -> None:
    assert [learning_rate(k, train) for k in range(10)] == pytest.approx([0.05 * (k + 1) for k in range(10)])


@pytest.mark.parametrize(
    ("name", "halfway"), [("constant", 0.5), ("linear", 0.25), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)) / 2)]
)
def test_decays_from_lr_towards_zero(train, name: str, halfway: float) -> None:
    train = train.model_copy(update={"lr_schedule": name})
    values = [learning_rate(k, train) for k in range(10, 100)]
    assert values[0] == 0.5
    assert values[45] == pytest.approx(halfway)
    assert all(a >= b for a, b in itertools.pairwise(values))
    if name != "constant":
        assert 0 < values[-1] < 0.01


def test_without_warm_up_the_first_step_has_the_full_rate(train) -> None:
    assert learning_rate(0, train.model_copy(update={"warmup_steps": 0})) == 0.5


def test_weight_decay_spares_biases_and_norms(train) -> None:
    """With zero gradients AdamW moves a weight by -lr * decay * weight, and nothing else (Loshchilov & Hutter 2019)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    optimizer = make_optimizer(net, train.model_copy(update={"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.2}))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 1 - 0.1 * 0.2 if name == "0.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.inner = nn.Conv2d(8, 6, 3)
        self.dense = nn.Linear(10, 4)
        self.embed = nn.Linear(4, 8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_kernels_by_the_nearest_orthogonal_matrix(train, layout: torch.memory_format) -> None:
    """Of a first gradient G = U S V^T the update is lr * 0.2 sqrt(longer side) * U D V^T, D about 1 (Jordan 2024)."""
    torch.manual_seed(0)
    net = Small().to(memory_format=layout)
    optimizer = make_optimizer(net, train.model_copy(update={"optimizer": "muon", "lr": 0.1, "weight_decay": 0.0}))
    before = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, side in (("inner", 72), ("dense", 10)):
        weight, old = getattr(net, name).weight, getattr(before, name).weight
        update = (old - weight).detach().flatten(1) / (0.1 * 0.2 * math.sqrt(side))
        u, _, vh = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
        inside = u.T @ update @ vh.T
        assert bool(((inside.diag() > 0.5) & (inside.diag() < 1.5)).all())
        torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=0.05)  # bf16 inside


def test_the_outer_layers_and_biases_are_adamws(train) -> None:
    """AdamW's first step moves every entry by lr in the gradient's sign."""
    torch.manual_seed(0)
    net = Small()
    optimizer = make_optimizer(net, train.model_copy(update={"optimizer": "muon", "lr": 0.1, "weight_decay": 0.0}))
    before = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name in ("stem.weight", "stem.bias", "inner.bias", "embed.weight"):
        new, old = net.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(new, old - 0.1 * new.grad.sign(), rtol=0, atol=1e-5)


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped(train) -> None:
    config = train.model_copy(update={"optimizer": "muon", "lr": 0.1})
    torch.manual_seed(0)
    net = Small().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, config)
    gradients = [[torch.randn_like(p) for p in net.parameters()] for _ in range(4)]

    def steps(net: nn.Module, optimizer, these) -> None:
        for gradient in these:
            for p, g in zip(net.parameters(), gradient, strict=True):
                p.grad = g.clone()
            optimizer.step()
            optimizer.zero_grad()

    steps(net, optimizer, gradients[:2])
    other = copy.deepcopy(net)
    resumed = make_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, gradients[2:])
    steps(other, resumed, gradients[2:])
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_ema_on_the_device_equals_the_hosts() -> None:
    net = nn.Linear(3, 2)
    host, device = EMA(net), EMA(net)
    for step in range(20):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        taken = step % 3 != 1
        if taken:
            host.update(net, 0.8)
        device.update_where(torch.tensor(taken), net, 0.8)
        torch.testing.assert_close(device.net.weight, host.net.weight)


def test_a_clipped_step_is_torchs_own_and_a_bad_one_is_none(train) -> None:
    """clip_grad_norm_ and an unfused AdamW by hand; loss or gradient not finite: nothing moves, not even the count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    twin = copy.deepcopy(net)
    optimizer = make_optimizer(net, train.model_copy(update={"optimizer": "adamw"}))
    plain = torch.optim.AdamW(
        [
            {"params": [twin[0].weight], "weight_decay": train.weight_decay},
            {"params": [twin[0].bias, *twin[1].parameters()]},
        ],
        lr=train.lr,
        betas=(0.9, train.adam_beta2),
        weight_decay=0.0,
        fused=False,
    )
    for step in range(6):
        scale = 100.0 if step % 2 else 0.01
        gradients = [scale * torch.randn_like(p) for p in net.parameters()]
        loss, bad = torch.tensor(1.0), step in (2, 3)
        for p, q, gradient in zip(net.parameters(), twin.parameters(), gradients, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        if step == 2:
            net[0].weight.grad[0, 0, 0, 0] = math.inf
        if step == 3:
            loss = torch.tensor(math.nan)
        norm, taken = clipped_step(optimizer, net, loss, clip=1.5)
        assert bool(taken) != bad
        if not bad:
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), 1.5))
            plain.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_a_clipped_step_of_muon_is_its_step_on_clipped_gradients_and_a_bad_one_is_none(train) -> None:
    torch.manual_seed(0)
    net = Small()
    twin = copy.deepcopy(net)
    config = train.model_copy(update={"optimizer": "muon"})
    optimizer, plain = make_optimizer(net, config), make_optimizer(twin, config)
    for bad in (False, True, False):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = 10.0 * torch.randn_like(p)
            q.grad = p.grad.clone()
        if bad:
            net.inner.weight.grad[0, 0, 0, 0] = math.nan
        else:
            nn.utils.clip_grad_norm_(twin.parameters(), 1.5)
            plain.step()
        assert bool(clipped_step(optimizer, net, torch.tensor(1.0), clip=1.5)[1]) != bad
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3 * train.lr)
