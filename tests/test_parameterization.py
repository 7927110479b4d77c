import pytest
import torch
from torch import Tensor, nn

from diffusion.parameterization import PARAMETERIZATIONS, Denoiser
from diffusion.process import q_sample, signal_and_noise
from diffusion.schedules import make_schedule


class Constant(nn.Module):
    """Answers with what it was given."""

    image_shape = (3, 8, 8)

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule_name", ["linear", "cosine", "sigmoid"])
def test_the_target_leads_back_to_x0_and_eps_at_each_t(name: str, schedule_name: str) -> None:
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
