"""Images from noise: samplers, their timesteps, noise of each image, generation. Needs model and data."""
