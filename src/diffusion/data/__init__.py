"""What the images are: where they come from, how they are read, and batches by (seed, step). Needs the ground alone."""

from diffusion.data.pixels import to_tensor, to_uint8

__all__ = ["to_tensor", "to_uint8"]
