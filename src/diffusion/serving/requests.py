"""What a served model is asked and answers: a request checked at the door, images as PNG texts or as numbers."""

import base64
import difflib
import json
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from diffusion.config import SampleConfig, Seed
from diffusion.data import grids
from diffusion.errors import UserError
from diffusion.model.card import is_guidable, read_card
from diffusion.model.model_file import load_denoiser
from diffusion.params_file import allowed
from diffusion.runtime import resolve_device
from diffusion.sampling import generation

MAX_IMAGES = 64  # a call


class Request(BaseModel):
    """A call. Left out: a random seed, the classes and the guidance that the model came with, PNG."""

    num_images: int = Field(ge=1, le=MAX_IMAGES)
    seed: Seed | None = None
    labels: tuple[Annotated[int, Field(ge=0, le=100_000)], ...] | None = None
    guidance: float | None = Field(default=None, ge=0.0, le=100.0)
    format: Literal["png", "raw"] = "png"


def parse(inputs: object, num_classes: int | None, *, guidable: bool = True) -> Request:
    """The request that plain values, as JSON has them, describe; `num_classes` and `guidable` are the model's.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    if not isinstance(inputs, Mapping):
        raise UserError('inputs must be an object such as {"num_images": 16, "seed": 7}')
    kinds = Request.model_json_schema()["properties"]
    for name in inputs:
        if name not in kinds:
            near = difflib.get_close_matches(str(name)[:40], kinds, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown input {str(name)[:40]!r}: did you mean {near}?")
    if "num_images" not in inputs:
        raise UserError(f"num_images is missing: give {allowed(kinds['num_images'])}")
    try:  # as JSON, where strict means that 16.0 and "16" are no whole numbers but a list is a tuple
        request = Request.model_validate_json(json.dumps(inputs), strict=True)
    except RecursionError:
        raise UserError("inputs are nested too deeply: no input is more than a list") from None
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # no JSON: half of a character, deep nesting
            raise UserError(f"inputs cannot be read ({first['msg'][:80]})") from None
        name = str(first["loc"][0])
        raise UserError(f"{name} must be {allowed(kinds[name])}, not {repr(inputs[name])[:40]}") from None
    if num_classes is None and (request.labels is not None or request.guidance not in (None, 1.0)):
        raise UserError("this model knows no classes: leave out labels and guidance")
    if not guidable and request.guidance not in (None, 1.0):
        raise UserError("this model was never trained without a class, so it cannot be guided: leave out guidance")
    if request.labels is not None and (not request.labels or max(request.labels) >= (num_classes or 0)):
        raise UserError(f"labels must be a list of classes from 0 to {(num_classes or 0) - 1}, with one at least")
    return request


class Generator:
    """A trained model that answers requests, one at a time: calls from several threads wait for each other."""

    def __init__(self, weights: Path, sample: SampleConfig) -> None:
        """`weights` is a safetensors file with its card beside it.

        Raises:
            UserError: a file is missing, damaged, or does not fit the card; or the device is not on this machine.
        """
        self._device = resolve_device(sample.device)
        self.guidable = is_guidable(read_card(weights))
        self._denoiser = load_denoiser(weights, sample, self._device)
        self._sample, self._turn = sample, threading.Lock()

    @property
    def num_classes(self) -> int | None:
        """Of the network; None if it is unconditional."""
        return self._denoiser.num_classes

    def answer(self, request: Request) -> dict[str, Any]:
        """{"images": PNG files in base64, or uint8 (N, H, W, C) as lists, "format", "seed", and "labels" if any}.

        Image i of a seed is the same for every num_images.
        """
        count = request.num_images
        config = self._sample.model_copy(
            update={
                "num_images": count,
                "batch_size": count,
                "compile": "off",
                "labels": self._sample.labels if request.labels is None else request.labels,
                "guidance": self._sample.guidance if request.guidance is None else request.guidance,
            }
        )
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        with self._turn:
            drawn = torch.cat([*generation.generate(self._denoiser, config, seed, range(count), self._device)]).numpy()
        labels = generation.labels_of(config, self.num_classes, range(count))
        pictures = [base64.b64encode(grids.png(image)).decode() for image in drawn]
        found = {
            "images": pictures if request.format == "png" else drawn.tolist(),
            "format": request.format,
            "seed": seed,
        }
        return found if labels is None else {**found, "labels": labels.tolist()}
