import pytest
import torch
from torch import Tensor, nn

from diffusion.model.process import q_sample
from diffusion.model.schedules import make_schedule
from diffusion.runtime import generator
from diffusion.training.loss import TIMESTEPS, Loss, min_snr_weight, own_weight


def training(loss: Loss, net: nn.Module, x0: Tensor, source: torch.Generator) -> Tensor:
    return loss.training(net, x0, *loss.draw(x0, len(x0), source))


class Zero(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Recorder(nn.Module):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.t: list[Tensor] = []
        self.x: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.t.append(t)
        self.x.append(x)
        return x


def make_loss(prediction: str = "eps", weight: str = "simple", steps: int = 100) -> Loss:
    return Loss(make_schedule("cosine", steps), prediction, weight, torch.float32)


def test_the_loss_of_no_prediction_is_the_targets_mean_square() -> None:
    """Eps has mean square 1; v = a eps - s x0 has a^2 + s^2 E[x0^2] (independent parts)."""
    x0 = torch.full((4000, 3, 8, 8), 0.5)
    assert float(training(make_loss("eps"), Zero(), x0, generator(0, "a"))) == pytest.approx(1.0, rel=0.01)
    assert float(training(make_loss("x0"), Zero(), x0, generator(0, "a"))) == pytest.approx(0.25, rel=1e-6)
    mean_s2 = float((1 - make_schedule("cosine", 100).alphas_cumprod).mean())
    expected = (1 - mean_s2) + mean_s2 * 0.25
    assert float(training(make_loss("v"), Zero(), x0, generator(0, "a"))) == pytest.approx(expected, rel=0.03)


def test_weights_may_lie_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps, which has no float64: its tables stay there. The meta device refuses to mix with others too."""
    x0, t = torch.zeros((2, 3, 4, 4), device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    loss = make_loss(weight="min_snr")
    monkeypatch.setattr(loss, "per_image", lambda *_: torch.zeros(2, device="meta"))
    assert loss.training(Zero(), x0, t, x0).device.type == "meta"


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Hang et al. 2023, section 3.4: eps min(SNR, 5) / SNR, x0 min(SNR, 5), v min(SNR, 5) / (SNR + 1)."""
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0])
    torch.testing.assert_close(min_snr_weight(snr, "eps"), torch.tensor([1.0, 1.0, 1.0, 0.05]))
    torch.testing.assert_close(min_snr_weight(snr, "x0"), torch.tensor([0.01, 1.0, 5.0, 5.0]))
    torch.testing.assert_close(min_snr_weight(snr, "v"), torch.tensor([0.01 / 1.01, 0.5, 5 / 6, 5 / 101]))


def test_min_snr_makes_the_three_targets_one_objective() -> None:
    """Whatever is predicted, the weighted error is min(SNR, 5) times the error of x0."""
    schedule = make_schedule("cosine", 100)
    t = torch.tensor([20, 60, 90])
    snr, alpha_bar = schedule.snr()[t], schedule.alphas_cumprod[t]
    x0_error = torch.tensor([0.3, 0.2, 0.1]).double()
    eps_error = x0_error * snr  # |d eps|^2 = |d x0|^2 a^2 / s^2 at fixed x_t
    v_error = x0_error / (1 - alpha_bar)  # v = (a x_t - x0) / s
    edm_error = x0_error * (0.5**2 + (1 - alpha_bar) / alpha_bar) * alpha_bar / (1 - alpha_bar) / 0.5**2  # / c_out^2
    for prediction, error in (("x0", x0_error), ("eps", eps_error), ("v", v_error), ("edm", edm_error)):
        torch.testing.assert_close(min_snr_weight(snr, prediction) * error, snr.clamp(max=5) * x0_error)


def test_an_objectives_own_weight_is_its_papers() -> None:
    """Salimans & Ho 2022, section 4: max(SNR, 1) on x0, SNR + 1 on x0 for v; Ho et al. 2020: 1 on eps."""
    snr = torch.tensor([0.01, 1.0, 5.0])
    torch.testing.assert_close(own_weight(snr, "x0"), torch.tensor([1.0, 1.0, 5.0]))
    for prediction in ("eps", "v", "edm"):
        assert own_weight(snr, prediction).tolist() == [1.0] * 3


def test_edms_target_has_the_variance_of_its_input() -> None:
    """Karras et al. 2022, appendix B.6: inputs and targets have unit variance at every sigma, if sigma_data is true."""
    schedule = make_schedule("edm", 5)
    loss, recorder = Loss(schedule, "edm", "own", torch.float32), Recorder()
    x0 = 0.5 * torch.randn((5, 3, 64, 64), generator=generator(0, "x0"))
    eps = torch.randn(x0.shape, generator=generator(0, "eps"))
    square = loss.per_image(Zero(), x0, torch.arange(5), eps)
    loss.per_image(recorder, x0, torch.arange(5), eps)
    torch.testing.assert_close(square, torch.ones(5), rtol=0.05, atol=0)
    torch.testing.assert_close(recorder.x[0].square().mean(dim=(1, 2, 3)), torch.ones(5), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["edm", "cosine"])
def test_lognormal_timesteps_have_edms_sigmas(name: str) -> None:
    """Ln sigma is normal with mean -1.2 and deviation 1.2 (Karras et al. 2022, table 1)."""
    schedule = make_schedule(name, 1000)
    t = TIMESTEPS["lognormal"](schedule, 50_000, generator(0, "t"))
    log_sigma = -schedule.log_ratio()[t]
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.03)


def test_lognormal_timesteps_are_the_nearest() -> None:
    schedule = make_schedule("edm", 7)
    drawn = -1.2 + 1.2 * torch.randn(500, generator=generator(0, "t"))
    distances = (drawn[:, None].double() + schedule.log_ratio()).abs()  # log sigma = -lambda
    assert TIMESTEPS["lognormal"](schedule, 500, generator(0, "t")).equal(distances.argmin(dim=1))


def test_training_draws_from_its_source_alone() -> None:
    x0 = torch.randn(16, 3, 8, 8)
    recorder = Recorder()
    loss = make_loss()
    torch.manual_seed(1)
    first = training(loss, recorder, x0, generator(0, "train", 5))
    torch.manual_seed(2)
    second = training(loss, recorder, x0, generator(0, "train", 5))
    training(loss, recorder, x0, generator(0, "train", 6))
    assert float(first) == float(second)
    assert recorder.t[0].equal(recorder.t[1])
    assert not recorder.t[0].equal(recorder.t[2])


def test_training_steps_are_uniform() -> None:
    recorder = Recorder()
    training(make_loss(steps=10), recorder, torch.zeros(20_000, 1, 1, 1), generator(0, "train"))
    counts = recorder.t[0].bincount(minlength=10)
    assert ((counts - 2000).abs() < 5 * (2000 * 0.9) ** 0.5).all()


def test_validation_is_one_fixed_grid_for_any_batch_size() -> None:
    x0 = torch.randn(30, 3, 8, 8)
    loss = make_loss(steps=15)
    recorder = Recorder()
    values = {loss.validation(recorder, x0, seed=0, batch_size=size) for size in (7, 30)}
    assert max(values) - min(values) < 1e-7
    t = torch.cat(recorder.t)[:30]
    assert t.bincount().tolist() == [2] * 15  # every noise level equally often
    assert loss.validation(recorder, x0, seed=1, batch_size=30) not in values


def test_a_validation_image_is_at_the_middle_of_its_part_of_the_schedule() -> None:
    recorder = Recorder()
    make_loss(steps=10).validation(recorder, torch.zeros(4, 1, 2, 2), seed=0, batch_size=4)
    assert sorted(recorder.t[0].tolist()) == [1, 3, 6, 8]  # 1.25, 3.75, 6.25, 8.75


def test_bf16_is_the_networks_alone() -> None:
    """Autocast reaches a convolution and nothing else: x_t, target and loss are computed in float32."""
    x0, (recorder, conv) = torch.randn(8, 3, 8, 8), (Recorder(), nn.Conv2d(3, 3, 1))
    outputs: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(conv(recorder(x, t)))
        return outputs[-1]

    schedule = make_schedule("cosine", 100)
    loss = Loss(schedule, "eps", "simple", torch.bfloat16)
    t, eps = loss.draw(x0, len(x0), generator(0, "train"))
    value = loss.training(net, x0, t, eps).detach()  # type: ignore[arg-type]
    assert outputs[0].dtype == torch.bfloat16
    assert recorder.x[0].equal(q_sample(schedule, x0, t, eps))
    assert float(value) == pytest.approx(float((outputs[0].detach().float() - eps).square().mean()), rel=1e-6)
    assert (value.dtype, conv.weight.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_every_timestep_is_equally_likely_at_every_place_of_a_batch(name: str) -> None:
    draws = torch.stack([TIMESTEPS[name](make_schedule("cosine", 10), 4, generator(0, "t", i)) for i in range(4000)])
    counts = torch.stack([draws.eq(t).sum(dim=0) for t in range(10)])  # (t, place)
    assert counts.sum(dim=0).tolist() == [4000] * 4
    assert float((counts - 400).abs().max()) < 5 * 400**0.5  # five standard deviations


def test_stratified_timesteps_hold_one_of_each_part() -> None:
    t = TIMESTEPS["stratified"](make_schedule("cosine", 1000), 8, generator(0, "t"))
    assert t.div(125, rounding_mode="floor").sort().values.tolist() == list(range(8))
