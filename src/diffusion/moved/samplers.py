"""The old import path of diffusion.sampling.samplers."""

from diffusion.sampling.samplers import SAMPLERS as SAMPLERS
