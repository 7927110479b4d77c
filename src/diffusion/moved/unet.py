"""The old import path of diffusion.model.unet."""

from diffusion.model.unet import UNet as UNet
