"""Augmentations whose result is known without interpolation, and the drawn labels' distribution."""

import math

import pytest
import torch
from torch import Tensor

from diffusion.runtime import generator
from diffusion.training import augment


def labels(**changes: float) -> Tensor:
    names = ["flip", "scale", "cos", "sin", "along_x", "along_y", "x", "y"]
    return torch.tensor([[changes.get(name, 0.0) for name in names]])


@pytest.fixture
def image() -> Tensor:
    return torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_no_augmentation_is_the_image_itself(image: Tensor) -> None:
    assert augment.applied(image, labels()).equal(image)


def test_flips_and_quarter_turns_are_torchs(image: Tensor) -> None:
    same(augment.applied(image, labels(flip=1)), image.flip(2))
    clockwise = torch.rot90(image, -1, (2, 3))
    same(augment.applied(image, labels(cos=math.cos(math.pi / 2) - 1, sin=1.0)), clockwise)
    same(augment.applied(image, labels(cos=-2.0)), image.flip(2, 3))


def test_shifts_of_whole_pixels_move_right_and_down(image: Tensor) -> None:
    right = augment.applied(image, labels(x=2 / (8 * augment.SHIFT)))
    same(right[..., 2:], image[..., :-2])
    same(right[..., 1], image[..., 0])  # mirrored at the edge
    down = augment.applied(image, labels(y=2 / (8 * augment.SHIFT)))
    same(down[:, :, 2:], image[:, :, :-2])


def test_scale_enlarges_and_a_stretch_keeps_the_area() -> None:
    ramp = torch.linspace(-1, 1, 17)[1::2]  # the places of 8 pixels
    x, y = ramp.view(1, 1, 1, 8).expand(1, 1, 8, 8), ramp.view(1, 1, 8, 1).expand(1, 1, 8, 8)
    double = 1 / augment.SCALE  # log2 of 2
    same(augment.applied(x, labels(scale=double)), x / 2)
    wide = labels(along_x=double)
    same(augment.applied(x, wide), x / 2)
    inner = augment.applied(y, wide)[:, :, 2:6]  # beyond, the image is mirrored
    same(inner, 2 * y[:, :, 2:6])


def test_a_stretch_is_along_its_axis() -> None:
    """At 45 degrees the coordinate along that diagonal is halved, the one across doubled."""
    ramp = torch.linspace(-0.25, 0.25, 17)[1::2]  # small, so that nothing is mirrored
    x, y = ramp.view(1, 1, 1, 8).expand(1, 1, 8, 8), ramp.view(1, 1, 8, 1).expand(1, 1, 8, 8)
    double = 1 / augment.SCALE
    same(augment.applied(y, labels(along_y=double)), y / 2)
    along, across = (x + y) / 2, (x - y) / 2
    diagonal = labels(along_x=double / 2**0.5, along_y=double / 2**0.5)
    middle = (..., slice(3, 5), slice(3, 5))
    same(augment.applied(x + y, diagonal)[middle], along[middle])
    same(augment.applied(x - y, diagonal)[middle], 4 * across[middle])


def test_augmentations_follow_each_other(image: Tensor) -> None:
    """Flipped, then turned, then shifted."""
    quarter = {"cos": -1.0, "sin": 1.0}
    turned = torch.rot90(image.flip(2), -1, (2, 3))
    same(augment.applied(image, labels(flip=1, **quarter)), turned)
    shifted = augment.applied(image, labels(flip=1, x=2 / (8 * augment.SHIFT), **quarter))
    same(shifted[..., 2:], turned[..., :-2])


def test_strengths_are_drawn_as_in_the_paper() -> None:
    """Karras et al. 2022, appendix F.2: normal scales, stretches and shifts, angles all round."""
    drawn = augment.draw(20_000, 1.0, generator(0, "augment"))
    for name, values in {"scale": drawn[:, 1], "x": drawn[:, 6], "y": drawn[:, 7]}.items():
        assert (float(values.mean()), float(values.std())) == (
            pytest.approx(0, abs=0.03),
            pytest.approx(1, abs=0.03),
        ), name
    angle = torch.atan2(drawn[:, 3], drawn[:, 2] + 1)
    assert float(angle.mean()) == pytest.approx(0, abs=0.06)
    assert float(angle.std()) == pytest.approx(math.pi / 3**0.5, abs=0.03)
    strength = torch.hypot(drawn[:, 4], drawn[:, 5])
    assert float(strength.square().mean()) == pytest.approx(1, abs=0.05)
    assert float(drawn[:, 4:6].mean()) == pytest.approx(0.2, abs=0.02)  # half are upright, along +x or +y: E|z| / 4


def test_each_augmentation_happens_as_often_as_asked() -> None:
    drawn = augment.draw(20_000, 0.12, generator(0, "augment"))
    used = {"flip": [0], "scale": [1], "rotation": [2, 3], "stretch": [4, 5], "shift": [6, 7]}
    for name, columns in used.items():
        share = float(drawn[:, columns].ne(0).any(dim=1).float().mean())
        assert share == pytest.approx(0.06 if name == "flip" else 0.12, abs=0.01), name
    stretched = drawn[drawn[:, 4:6].ne(0).any(dim=1)]
    along_x, along_y = (stretched[:, k].abs().lt(1e-6) for k in (5, 4))  # wider; narrower along x, wider along y
    assert float((along_x | along_y).float().mean()) == pytest.approx(0.5, abs=0.04)  # EDM's aniso_rotate_prob
    assert float(along_x.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert augment.draw(100, 0.0, generator(0, "augment")).eq(0).all()
    assert float(drawn[:, 1][drawn[:, 1] != 0].std()) == pytest.approx(1.0, abs=0.06)
