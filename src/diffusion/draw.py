"""The sample stage: N images from the trained model, every one saved, with a grid and a denoising strip."""

import json
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion import images, paths, sampling, tracking
from diffusion.config import Params, flat, to_dict
from diffusion.export import load_model, read_card
from diffusion.parameterization import Denoiser
from diffusion.runtime import keep_freed_memory, resolve_device, resolve_precision
from diffusion.schedules import make_schedule

GRID_IMAGES = 64
STRIP_IMAGES = 8
STRIP_COLUMNS = 11


def draw(params: Params) -> None:
    """Write samples/: images.npz, card.json, grid.png, denoising.png and, if `sample.save_png`, png/00000.png ...

    Raises:
        UserError: there is no usable model, or the device is not on this machine.
    """
    card = read_card(paths.MODEL)
    tracker = tracking.attach(
        params.tracking, card["run_id"], stage="sample", journal=paths.RUNS / card["fingerprint"] / "journal.jsonl"
    )
    with tracking.closing_status(tracker):
        tracker.params(flat(params.sample, "sample"))
        start = time.perf_counter()
        _draw(params, card)
        seconds = time.perf_counter() - start
        tracker.metrics({"sample/seconds": seconds, "sample/num_images": params.sample.num_images}, card["step"])
        for picture in (paths.SAMPLES / "grid.png", paths.SAMPLES / "denoising.png"):
            tracker.artifact(picture, "samples")


def _draw(params: Params, card: dict[str, Any]) -> None:
    config = params.sample
    device = resolve_device(config.device)
    keep_freed_memory()
    net, trained = load_model(paths.MODEL)
    denoiser = Denoiser(
        net.to(device),
        make_schedule(trained.diffusion.schedule, trained.diffusion.num_steps).to(device),
        trained.diffusion.prediction,
        dtype=resolve_precision(config.precision, device),
        clip_x0=config.clip_x0,
    )
    batches = []
    bar = tqdm(total=config.num_images, unit=" images", desc="sample", mininterval=0.5 if sys.stderr.isatty() else 30)
    with bar:
        for batch in sampling.generate(denoiser, config, params.seed, range(config.num_images), device):
            batches.append(batch.numpy())
            bar.update(len(batch))
    drawn = np.concatenate(batches)

    paths.SAMPLES.mkdir(parents=True, exist_ok=True)
    np.savez(paths.SAMPLES_NPZ, images=drawn)
    about = {
        **{key: to_dict(config)[key] for key in ("sampler", "steps", "spacing", "eta", "variance", "clip_x0")},
        "network_evaluations": config.steps,
        "precision": str(denoiser.dtype).removeprefix("torch."),
        "seed": params.seed,
        **{key: card.get(key) for key in ("weights", "step", "data_digest", "fingerprint", "run_id")},
    }
    paths.SAMPLES_CARD.write_text(json.dumps(about, indent=2) + "\n")
    images.save_png(images.grid(drawn[:GRID_IMAGES], columns=8, scale=2), paths.SAMPLES / "grid.png")
    shown = range(min(STRIP_IMAGES, config.num_images))
    strip = sampling.stages(denoiser, config, params.seed, shown, device, STRIP_COLUMNS)
    images.save_png(images.strip(strip.numpy(), scale=2), paths.SAMPLES / "denoising.png")
    if config.save_png:
        images.save_all(drawn, paths.SAMPLES / "png")
