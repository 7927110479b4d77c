"""Training, sampling and judging of diffusion models; README.md says where is what."""
