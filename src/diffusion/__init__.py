"""Training, sampling and judging of diffusion models; README.md says where is what."""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "moved"))  # import paths of old that other programs use
