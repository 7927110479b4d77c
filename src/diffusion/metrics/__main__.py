"""`python -m diffusion.metrics`: distances between any two sets of images, and a test of this machine's numbers."""

import click

from diffusion.metrics.compare import compare
from diffusion.metrics.selftest import selftest


@click.group()
def main() -> None:
    """Compare sets of images with FID and others, or test that this machine computes them right."""


main.add_command(compare)
main.add_command(selftest)

if __name__ == "__main__":
    main(prog_name="python -m diffusion.metrics")
