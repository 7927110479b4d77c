"""The model as MLflow loads it: this file as code, weights in safetensors, and the sample section."""

from pathlib import Path

import mlflow.models
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from diffusion.config import SampleConfig
from diffusion.errors import UserError
from diffusion.serving import requests


class Answering:
    """Answers one request a call: see `requests.Request`.

    Not in the class below: MLflow asks for type hints of a `predict` that it finds there, and takes them as schemas of
    lists of requests.
    """

    generator: requests.Generator

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights and how to sample with them, on what this machine has."""
        sample = SampleConfig.model_validate({**context.model_config["sample"], "device": "auto"})
        self.generator = requests.Generator(Path(context.artifacts["weights"]), sample)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """The fields of `requests.Answer` to `model_input`, a table of one row."""
        try:
            if len(model_input) != 1:
                raise UserError(f"give one request a call, not {len(model_input)}")
            inputs = {name: _plain(model_input[name].iloc[0]) for name in model_input}  # a row would turn 16 into 16.0
            request = requests.parse(inputs)
            self.generator.check(request)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return self.generator.answer(request).model_dump(exclude_none=True)


class DiffusionModel(Answering, PythonModel):
    """What MLflow loads."""


def _plain(value: object) -> object:
    """A table's cell as JSON has it."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return None if isinstance(value, float) and np.isnan(value) else value


mlflow.models.set_model(DiffusionModel())
