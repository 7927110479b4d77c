"""The old import path of diffusion.model.model_file."""

from diffusion.model.model_file import load_model as load_model
