"""What pictures show: which moments, which images of which class, which guidance."""

import torch
from torch import Tensor, nn

from diffusion.data.pixels import to_uint8
from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import make_schedule
from diffusion.sampling import panels
from diffusion.sampling.generation import generate, trajectory

CPU = torch.device("cpu")


class ByClass(nn.Module):
    """The class as a grey level, a middle one for none."""

    image_shape, num_classes = (3, 4, 4), 3

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        known = torch.full_like(t, -1) if labels is None else labels
        return 0.1 * x + 0.3 * known.float().view(-1, 1, 1, 1).expand_as(x)


def denoiser() -> Denoiser:
    return Denoiser(ByClass(), make_schedule("cosine", 50), "x0", clip_x0=True)


def test_moments_are_evenly_spaced_from_the_noise_to_the_image(tiny) -> None:
    config = tiny().sample.model_copy(update={"steps": 8})
    every = [to_uint8(x) for x in trajectory(denoiser(), config, 1, range(2), CPU)]
    for columns, picked in ((3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (100, list(range(9)))):
        frames = panels.stages(denoiser(), config, 1, range(2), CPU, columns)
        assert frames.equal(torch.stack([every[i] for i in picked]))


def test_rows_are_the_first_images_of_each_class_that_has_enough() -> None:
    images = torch.arange(9, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.tensor([2, 0, 2, 1, 0, 0, 2, 2, 0])
    assert panels.by_class(images, labels, 2).flatten().tolist() == [1, 4, 0, 2]
    assert panels.by_class(images, labels, 1).flatten().tolist() == [1, 3, 0]
    assert panels.by_class(images, labels, 5).shape == (0, 1, 1, 1)


def test_a_sweep_shows_the_same_noise_with_each_guidance(tiny) -> None:
    config = tiny().sample.model_copy(update={"labels": "balanced"})
    sweep = panels.guidance_sweep(denoiser(), config, 1, range(3), CPU)
    assert len(sweep) == len(panels.GUIDANCES)
    for guidance, images in zip(panels.GUIDANCES, sweep, strict=True):
        alone = config.model_copy(update={"guidance": guidance, "compile": "off"})
        assert images.equal(torch.cat([*generate(denoiser(), alone, 1, range(3), CPU)]))
    assert not sweep[0].equal(sweep[-1])
