"""The old import path of diffusion.model.process."""

from diffusion.model.process import q_sample as q_sample
