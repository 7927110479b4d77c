"""Network evaluations a second when sampling on this machine: ours against diffusers and denoising-diffusion-pytorch.

Matched networks (matched.py), a batch of images from noise in few steps, to pixels. One evaluation is one image through
the network once. Contestants take turns in processes of their own.
"""

from collections.abc import Callable
from functools import partial

import click
import matched
import peers
import torch
from machine import report
from turns import compete

from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory, resolve_precision
from diffusion.sampling import generation

CPU = torch.device("cpu")


def our_sampling(batch_size: int, steps: int) -> Callable[[], object]:
    """What the sample stage does for a batch; without writing files."""
    keep_freed_memory()  # as the stage does
    params = matched.params(batch_size)
    net = UNet(params.model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    schedule = configured_schedule(params.diffusion)
    dtype = resolve_precision("auto", CPU)
    denoiser = Denoiser(net, schedule, params.diffusion.prediction, dtype=dtype, clip_x0=True)
    config = load(
        matched.RECIPE, {"sample.sampler": "ddim", "sample.steps": steps, "sample.batch_size": batch_size}
    ).sample
    return lambda: list(generation.generate(denoiser, config, 0, range(batch_size), CPU))


def diffusers_sampling(
    batch_size: int, steps: int, scheduler: str, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], object]:
    """A pipeline's loop."""
    net = peers.diffusers_unet(matched.diffusers_model(batch_size)).eval().to(memory_format=layout)
    return peers.diffusers_sampling(net, batch_size, steps, CPU, dtype, scheduler)


def lucidrains_sampling(batch_size: int, steps: int) -> Callable[[], object]:
    """GaussianDiffusion.sample."""
    return peers.lucidrains_sampling(*matched.LUCIDRAINS, batch_size, steps, CPU)


@click.command()
@click.option("--batch-size", default=128, show_default=True)
@click.option("--steps", default=10, show_default=True, help="Network evaluations an image.")
@click.option("--turns", default=5, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", default=10.0, show_default=True, help="Length of a turn.")
def main(batch_size: int, steps: int, turns: int, seconds: float) -> None:
    """Measure, print one JSON line, write results/sample_speed.json."""
    theirs = partial(diffusers_sampling, batch_size, steps)
    fp32, plain = torch.float32, torch.contiguous_format
    found = compete(
        {
            "ours, DDIM": partial(our_sampling, batch_size, steps),
            "diffusers, DDIM (fp32)": partial(theirs, "DDIMScheduler", fp32, plain),
            "diffusers, DPM-Solver++ (fp32)": partial(theirs, "DPMSolverMultistepScheduler", fp32, plain),
            "diffusers, DDIM, bf16 and channels-last": partial(
                theirs, "DDIMScheduler", torch.bfloat16, torch.channels_last
            ),
            "denoising-diffusion-pytorch, DDIM (fp32)": partial(lucidrains_sampling, batch_size, steps),
        },
        batch_size * steps,
        turns=turns,
        seconds=seconds,
    )
    report(
        "sample_speed",
        {
            "unit": "network evaluations of one image a second",
            "batch_size": batch_size,
            "steps": steps,
            "evaluations_per_second": found,
        },
        peers=("diffusers", "denoising-diffusion-pytorch"),
    )


if __name__ == "__main__":
    main()
