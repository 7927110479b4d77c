"""What a served model is asked and answers, and the model that answers."""

import base64
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion.config import SampleConfig, Seed
from diffusion.data import grids
from diffusion.errors import UserError, brief
from diffusion.model.model_file import load_denoiser
from diffusion.runtime import resolve_device
from diffusion.sampling import generation


class Request(BaseModel):
    """A call; an input that is null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)  # 16.0 and "16" are no whole numbers

    num_images: int = Field(ge=1, le=64, description="how many images; image i of a seed is the same for every number")
    seed: Seed | None = Field(None, description="a random one if left out")
    labels: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        description="classes that the images take in turn; those of the model's samples if left out",
    )
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="that of the model's samples if left out"
    )
    format: Literal["png", "raw"] = Field("png", description="PNG files, or numbers")


class Answer(BaseModel):
    """The images, and what is needed to get them again."""

    images: list[str] | list[list[list[list[int]]]] = Field(
        description="PNG files in base64, or uint8 (N, H, W, C) if format is raw"
    )
    format: Literal["png", "raw"]
    seed: int
    labels: list[int] | None = Field(None, description="the class of each image; only models with classes have it")


def explained(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors in one line of ASCII: names of unknown inputs are the client's."""
    place = ".".join(str(key) for key in errors[0]["loc"])
    return brief(f"{place}: {errors[0]['msg']}").encode("ascii", "backslashreplace").decode()


class Generator:
    """A trained model that answers requests, one at a time: calls from several threads wait for each other."""

    def __init__(self, weights: Path, sample: SampleConfig) -> None:
        """`weights` is a safetensors file with its card beside it.

        Raises:
            UserError: a file is missing, damaged, or does not fit the card; or the device is not on this machine.
        """
        self._device = resolve_device(sample.device)
        self._denoiser = load_denoiser(weights, sample, self._device)
        self._sample, self._turn = sample, threading.Lock()

    def check(self, request: Request) -> None:
        """Whether this model can answer.

        Raises:
            UserError: it cannot.
        """
        num_classes, guided = self._denoiser.num_classes, request.guidance not in (None, 1.0)
        if num_classes is None and (request.labels is not None or guided):
            raise UserError("this model knows no classes: leave out labels and guidance")
        if guided and not self._denoiser.guidable:
            raise UserError("this model was never trained without a class, so it cannot be guided: leave out guidance")
        if request.labels and max(request.labels) >= (num_classes or 0):
            raise UserError(f"labels must be classes from 0 to {(num_classes or 0) - 1}")

    def answer(self, request: Request) -> Answer:
        """The images of a request that `check` passed."""
        asked = request.model_dump(include={"num_images", "labels", "guidance"}, exclude_none=True)
        config = self._sample.model_copy(update={**asked, "batch_size": request.num_images, "compile": "off"})
        indices = range(request.num_images)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        with self._turn:
            batches = [*generation.generate(self._denoiser, config, seed, indices, self._device)]
        images = torch.cat(batches).numpy()
        labels = generation.labels_of(config, self._denoiser.num_classes, indices)
        png = request.format == "png"
        return Answer(
            images=[base64.b64encode(grids.png(image)).decode() for image in images] if png else images.tolist(),
            format=request.format,
            seed=seed,
            labels=None if labels is None else labels.tolist(),
        )


def parse(inputs: Mapping[str, Any]) -> Request:
    """The request that plain values, as JSON has them, describe.

    Raises:
        UserError: what is wrong, in one line.
    """
    try:
        return Request.model_validate(inputs)
    except ValidationError as error:
        raise UserError(explained(error.errors())) from None
