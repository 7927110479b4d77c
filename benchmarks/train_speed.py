"""Training images a second on this machine: ours against diffusers and denoising-diffusion-pytorch.

Matched networks (matched.py), the same images, whole steps: data, forward, backward, clipping, optimiser, average of
the weights. Contestants take turns in processes of their own. Then the convolutions and matrix products of one of our
steps are done alone: their share of the step's time, and the rate that the machine reaches in such products at best.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import matched
import peers
import rates
import torch
from machine import report
from product_share import products_alone
from turns import compete

from diffusion.config import trained
from diffusion.runtime import keep_freed_memory
from diffusion.training.loop import Trainer

CPU = torch.device("cpu")


def our_training(batch_size: int) -> Callable[[], object]:
    """The step of the train stage."""
    keep_freed_memory()  # as the stage does
    folder = tempfile.mkdtemp()
    return Trainer(trained(matched.params(batch_size)), matched.data(), Path(folder), CPU).step


def diffusers_training(batch_size: int, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
    """A step of diffusers' example."""
    model, config = matched.diffusers_model(batch_size), matched.params(batch_size).train
    return peers.DiffusersTraining(model, config, matched.data(), CPU, dtype, layout)


def lucidrains_training(batch_size: int) -> Callable[[], object]:
    """A step of denoising-diffusion-pytorch's Trainer."""
    return peers.lucidrains_training(*matched.LUCIDRAINS, matched.params(batch_size).train, matched.data(), CPU)


@click.command()
@click.option("--batch-size", default=128, show_default=True)
@click.option("--turns", default=5, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", default=10.0, show_default=True, help="Length of a turn.")
def main(batch_size: int, turns: int, seconds: float) -> None:
    """Measure, print one JSON line, write results/train_speed.json."""
    fp32, bf16 = torch.float32, torch.bfloat16
    found = compete(
        {
            "ours": partial(our_training, batch_size),
            "diffusers as its example trains (fp32)": partial(
                diffusers_training, batch_size, fp32, torch.contiguous_format
            ),
            "diffusers, bf16 and channels-last": partial(diffusers_training, batch_size, bf16, torch.channels_last),
            "denoising-diffusion-pytorch (fp32)": partial(lucidrains_training, batch_size),
        },
        batch_size,
        turns=turns,
        seconds=seconds,
    )
    forward = rates.forward_flops(matched.params(batch_size).model)
    report(
        "train_speed",
        {
            "unit": "images a second",
            "batch_size": batch_size,
            "images_per_second": found,
            "forward_gflop": networks(batch_size),
            "our_gflops_achieved": round(found["ours"]["median"] * 3 * forward / 1e9, 1),
            **products(batch_size),
        },
        peers=("diffusers", "denoising-diffusion-pytorch"),
    )


def networks(batch_size: int) -> dict[str, dict[str, float]]:
    """Parameters in millions and GFLOP of a forward pass, an image."""
    from diffusion.model.unet import UNet

    nets: dict[str, Callable[[], Any]] = {
        "ours": lambda: UNet(matched.params(batch_size).model),
        "diffusers": lambda: peers.diffusers_unet(matched.diffusers_model(batch_size)),
        "denoising-diffusion-pytorch": lambda: peers.lucidrains_diffusion(*matched.LUCIDRAINS).model,
    }
    sizes = {}
    for name, build in nets.items():
        try:
            net = build()
        except ImportError:
            continue
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        sizes[name] = {"parameters_m": round(millions, 3), "gflop": round(rates.count_flops(net) / 1e9, 3)}
    return sizes


def products(batch_size: int) -> dict[str, Any]:
    """Share of a step that its convolutions and matrix products take alone, and the machine's rates."""
    step = our_training(batch_size)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    alone = products_alone(step)
    return {
        "convolutions_and_matmuls_share": round(alone / median(seconds[2:]), 3),
        "machine_tflops": {
            "matmul_bf16": rates.matmul_rate(2048, 5, CPU),
            "matmul_fp32": rates.matmul_rate(2048, 5, CPU, torch.float32),
            "conv_bf16_channels_last": rates.conv_rate(128, 16, 64, CPU),
            "conv_fp32": rates.conv_rate(128, 16, 64, CPU, torch.float32, torch.contiguous_format),
        },
    }


if __name__ == "__main__":
    main()
