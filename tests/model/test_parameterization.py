import pytest
import torch
from torch import Tensor, nn

from diffusion.model.denoiser import Denoiser
from diffusion.model.parameterization import PARAMETERIZATIONS
from diffusion.model.process import q_sample, signal_and_noise
from diffusion.model.schedules import SCHEDULES, make_schedule


class Constant(nn.Module):
    """Answers with what it was given."""

    image_shape, num_classes = (3, 8, 8), None

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_the_target_leads_back_to_x0_and_its_error_to_x0s_at_each_t(name: str, schedule_name: str) -> None:
    schedule = make_schedule(schedule_name, 1000)
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand((1000, 3, 4, 4), generator=generator, dtype=torch.float64) * 2 - 1
    eps = torch.randn((1000, 3, 4, 4), generator=generator, dtype=torch.float64)
    x_t = q_sample(schedule, x0, t, eps)
    a, s = signal_and_noise(schedule, t, x0)
    parameterization = PARAMETERIZATIONS[name]
    target = parameterization.target(x0, eps, a, s)
    torch.testing.assert_close(parameterization.x0(target, x_t, a, s), x0, rtol=0, atol=1e-9)
    wrong = target + 0.1
    error = (parameterization.x0(wrong, x_t, a, s) - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(parameterization.of_x0_error(schedule.snr()) * error, torch.full_like(error, 0.01))


def test_v_is_the_derivative_of_x_along_the_circle() -> None:
    """Salimans & Ho 2022, appendix D: with a = cos(phi), s = sin(phi), v = dx_phi / dphi."""
    x0, eps, phi, h = (
        torch.randn(1, 1, 2, 2).double(),
        torch.randn(1, 1, 2, 2).double(),
        torch.tensor(0.7).double(),
        1e-6,
    )
    x = [torch.cos(p) * x0 + torch.sin(p) * eps for p in (phi - h, phi + h)]
    v = PARAMETERIZATIONS["v"].target(x0, eps, torch.cos(phi), torch.sin(phi))
    torch.testing.assert_close(v, (x[1] - x[0]) / (2 * h), rtol=0, atol=1e-8)


def test_edm_is_the_papers_preconditioning() -> None:
    """Karras et al. 2022, table 1: D(x; sigma) = c_skip x + c_out F(c_in x) with x = x0 + sigma eps, sigma_data 0.5."""
    schedule = make_schedule("edm", 50)
    t = torch.arange(50)
    x0, eps, out = torch.randn((3, 50, 3, 4, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = signal_and_noise(schedule, t, x0)
    sigma, sigma_data = s / a, 0.5
    x = x0 + sigma * eps
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    edm, x_t = PARAMETERIZATIONS["edm"], q_sample(schedule, x0, t, eps)
    torch.testing.assert_close(edm.net_input(x_t, a, s), c_in * x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(edm.x0(out, x_t, a, s), c_skip * x + c_out * out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(edm.target(x0, eps, a, s), (x0 - c_skip * x) / c_out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["x0", "v", "edm"])
def test_nothing_is_infinite_without_signal(name: str) -> None:
    schedule = make_schedule("cosine", 10, zero_terminal_snr=True)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([9, 9])
    prediction = Denoiser(Constant(torch.full((2, 3, 8, 8), 0.5)), schedule, name)(x_t, t)
    assert prediction.x0.isfinite().all()
    torch.testing.assert_close(prediction.eps, x_t, rtol=0, atol=1e-6)


class ByClass(nn.Module):
    """Answers with the label, -1 for none."""

    image_shape, num_classes = (1, 2, 2), 10

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        known = torch.full_like(t, -1) if labels is None else labels
        return known.float().view(-1, 1, 1, 1).expand_as(x)


def test_guidance_goes_from_no_class_through_the_class() -> None:
    """Ho & Salimans 2022, eq. 6: (1 + w) of the class - w of none; here 4 and -1, and x0 is the network's output."""
    net = ByClass()
    denoiser = Denoiser(net, make_schedule("cosine", 10), "x0")
    x_t, t, labels = torch.zeros(2, 1, 2, 2), torch.tensor([3, 3]), torch.tensor([4, 0])
    for guidance, expected in ((1.0, (4.0, 0.0)), (0.0, (-1.0, -1.0)), (3.0, (14.0, 2.0))):
        x0 = denoiser.of(labels, guidance)(x_t, t).x0
        torch.testing.assert_close(x0[:, 0, 0, 0], torch.tensor(expected))
    assert net.batches == [2, 4, 4]  # both branches in one call
    assert denoiser.of(labels)(x_t, t).x0[:, 0, 0, 0].tolist() == [4.0, 0.0]
    assert float(denoiser(x_t, t).x0[0, 0, 0, 0]) == -1.0


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_denoiser_returns_the_truth_for_a_perfect_network(name: str) -> None:
    schedule = make_schedule("cosine", 1000)
    t = torch.tensor([3, 400, 900])
    x0, eps = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 3, 8, 8)
    target = PARAMETERIZATIONS[name].target(x0, eps, *signal_and_noise(schedule, t, x0))
    prediction = Denoiser(Constant(target), schedule, name)(q_sample(schedule, x0, t, eps), t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=2e-3 if name == "eps" else 1e-4)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-2 if name == "x0" else 2e-3)


def test_clipping_bounds_x0_and_keeps_the_parts_of_x_t_together() -> None:
    schedule = make_schedule("cosine", 1000)
    t = torch.tensor([10, 500])
    x_t = 3 * torch.randn(2, 3, 8, 8)
    x0, eps = Denoiser(Constant(torch.randn(2, 3, 8, 8)), schedule, "v", clip_x0=True)(x_t, t)
    assert float(x0.abs().max()) == 1.0
    torch.testing.assert_close(q_sample(schedule, x0, t, eps), x_t, rtol=1e-4, atol=1e-4)
