"""Trainings on small images."""

import dataclasses
from collections.abc import Callable

import pytest

from diffusion.config import Params
from diffusion.data.dataset import Dataset


@pytest.fixture
def tiny(tiny: Callable[..., Params]) -> Callable[..., Params]:
    """For images of 8x8 pixels: a step takes a third of the time."""
    small = {"model.image_size": 8, "model.attention_resolutions": [4]}
    return lambda **changes: tiny(**{**small, **changes})


@pytest.fixture
def tiny_data(tiny_data: Dataset) -> Dataset:
    return dataclasses.replace(tiny_data, images=tiny_data.images[:, ::4, ::4].contiguous())
