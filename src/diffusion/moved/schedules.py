"""The old import path of diffusion.model.schedules."""

from diffusion.model.schedules import make_schedule as make_schedule
