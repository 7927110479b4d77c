"""The sample stage: N images from the trained model, every one saved, with a grid and a denoising strip.

Finished batches are kept in runs/<fingerprint of the model>/samples-<identity>/ until all are there, so that a stopped
stage goes on; several processes share the batches, and each saves its own.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import paths
from diffusion.atomic import replacing, write_json
from diffusion.code_digest import LIBRARY, code_digests
from diffusion.config import Params, SampleConfig, flat, trained_from_dict
from diffusion.data import grids
from diffusion.data.npz import read_npz
from diffusion.distributed import World, joined
from diffusion.locks import enter_exclusive, only_process
from diffusion.model.card import read_card
from diffusion.model.denoiser import Denoiser
from diffusion.model.model_file import load_denoiser
from diffusion.rules import doubtful
from diffusion.runtime import keep_freed_memory
from diffusion.sampling import generation, panels
from diffusion.sampling.background import Background
from diffusion.sampling.partial import PartialSamples, missing
from diffusion.sampling.samplers import evaluations
from diffusion.serving.registry import register
from diffusion.tracking import runs
from diffusion.tracking.journal import JOURNAL
from diffusion.tracking.tracker import Tracker

GRID_IMAGES = 64
STRIP_IMAGES = 8
STRIP_COLUMNS = 11
CLASS_COLUMNS = 10
SWEEP_IMAGES = 10
NOT_IN_IMAGES = {"batch_size", "save_png", "processes"}  # keys of params.yaml that no image depends on
PNG = paths.SAMPLES / "png"


def sample(params: Params) -> None:
    """Write samples/: images.npz, card.json, grid.png, denoising.png and, if `sample.save_png`, png/00000.png ...

    Images that are there already, and whole, are kept, and only what shows them is made anew. It waits for a process
    that generates the same images, or any others here.

    Raises:
        UserError: there is no usable model, the device is not on this machine or too small for one image, or a file
            cannot be written.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM); finished batches were saved first.
    """
    with joined(params.sample.device) as (world, device), contextlib.ExitStack() as held:
        card = world.together(lambda: read_card(paths.MODEL))
        run = paths.RUNS / card["fingerprint"]
        keep_freed_memory()
        denoiser = world.together(lambda: load_denoiser(paths.MODEL, params.sample, device))
        identity = samples_identity(params, _digest(paths.MODEL), str(denoiser.dtype), device.type)
        partial = PartialSamples(run / f"samples-{identity}")
        enter_exclusive(held, world, lambda waiting: _only_one(partial.folder, waiting))
        tracker = _attach(params, card, run) if world.is_main else Tracker()
        with runs.closing_status(tracker, "sample"):
            tracker.params(flat(params.sample, "sample"))
            if not world.broadcast(_is_generated(identity) if world.is_main else None):
                _generate(params, denoiser, partial, world, device, tracker, card["step"])
            elif world.is_main:
                _keep(params)
            if world.is_main:
                _describe(params, denoiser, card, identity, device)
                partial.remove()
            for picture in (paths.SAMPLES / "grid.png", paths.SAMPLES / "denoising.png"):
                tracker.artifact(picture, "samples")


@contextlib.contextmanager
def _only_one(folder: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Keep out who generates these samples elsewhere, and who generates any others here."""
    these = only_process(folder.with_suffix(".lock"), "is generating these samples", wait=True, waiting=waiting)
    with these, only_process(paths.SAMPLE_LOCK, "is sampling here", wait=True, waiting=waiting):
        yield


def samples_identity(params: Params, model: str, precision: str, device: str) -> str:
    """16 hex digits that name all that the images depend on; `model` is the digest of its file."""
    known = {
        "sample": params.sample.model_dump(mode="json", exclude=NOT_IN_IMAGES),
        "seed": params.seed,
        "device": device,
        "precision": precision,
        "model": model,
        "code": sampling_code(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def sampling_code(library: Path = LIBRARY) -> str:
    """Digest of the code that decides what an image is: the sampling, and the network as it is loaded."""
    code = code_digests("sampling/generation.py", "model/model_file.py", library=library)
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_generated(identity: str) -> bool:
    """Whether samples/ holds the images of this identity, byte for byte as they were written."""
    try:
        known = json.loads(paths.SAMPLES_CARD.read_text())["images"]
        return known == {"identity": identity, "sha256": _digest(paths.SAMPLES_NPZ)}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _images() -> np.ndarray:
    """uint8 (N, H, W, C), as they were written."""
    (images,) = read_npz(paths.SAMPLES_NPZ, "images")
    return images


def _clear(*kept: Path) -> None:
    """Remove what DVC left in samples/ but `kept`; the card first, so that nobody takes old images for new ones."""
    found = [path for path in (paths.SAMPLES_CARD, *paths.SAMPLES.glob("*")) if path not in kept]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _attach(params: Params, card: dict[str, Any], run: Path) -> Tracker:
    for line in doubtful(params.sample, trained_from_dict(card["config"]).diffusion):
        print(f"warning: {line}", file=sys.stderr)
    return runs.attach(
        params.tracking, card["run_id"], stage="sample", journal=run / JOURNAL, card=card, register=register
    )


def _keep(params: Params) -> None:
    """The images stay, what shows them is made anew."""
    print(f"sample: {paths.SAMPLES_NPZ} has these images already: they are kept", file=sys.stderr)
    _clear(paths.SAMPLES_CARD, paths.SAMPLES_NPZ)
    if params.sample.save_png:
        grids.save_all(_images(), PNG)


def _generate(
    params: Params,
    denoiser: Denoiser,
    partial: PartialSamples,
    world: World,
    device: torch.device,
    tracker: Tracker,
    step: int,  # of the model
) -> None:
    """Write images.npz and the PNG files."""
    if world.is_main:
        _clear()
    start, count = time.perf_counter(), params.sample.num_images
    try:
        _generate_missing(params, denoiser, partial, world, device)
    except KeyboardInterrupt:
        if not world.is_main:
            sys.exit(130)
        raise KeyboardInterrupt("stopped; finished batches are kept, `dvc repro` goes on from there") from None
    if world.is_main:
        arrays = {"images": partial.collect(count)}
        labels = generation.labels_of(params.sample, denoiser.num_classes, range(count))
        if labels is not None:
            arrays["labels"] = labels.numpy()
        with replacing(paths.SAMPLES_NPZ) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    tracker.metrics({"sample/seconds": time.perf_counter() - start, "sample/num_images": count}, step)


def _generate_missing(
    params: Params, denoiser: Denoiser, partial: PartialSamples, world: World, device: torch.device
) -> None:
    """Generate what `partial` lacks, this rank its share of the batches; all ranks are done when it returns."""
    config = params.sample
    share = math.ceil(config.num_images / world.size)
    sizes = world.gather(world.together(lambda: generation.batch_size(denoiser, config, share, device)))
    size, todo = world.broadcast((min(sizes), _missing(config, partial, min(sizes))) if sizes else None)
    mine = [todo[i] for i in world.share(len(todo))]
    images_of_all = sum(map(len, mine))
    done_so_far = 0.0

    def advanced(amount: float) -> None:
        nonlocal done_so_far
        done_so_far += amount
        bar.update(round(done_so_far) - bar.n)

    generator = world.together(
        lambda: generation.ImageGenerator(
            denoiser, config, params.seed, device, size=size, images=images_of_all, advanced=advanced
        )
    )

    def keep(indices: range, images: Callable[[], Tensor]) -> None:
        array = images().numpy()
        partial.save(indices, array)
        if config.save_png:
            grids.save_all(array, PNG, first=indices.start)

    def work() -> None:
        with Background(keep) as background:
            for indices, images in generator.batches(mine):
                background.put(indices, images)

    pace = 0.5 if sys.stderr.isatty() else 30
    name = "sample" if world.size == 1 else f"sample (1 of {world.size} processes)"
    with tqdm(total=images_of_all, unit=" images", desc=name, mininterval=pace, disable=not world.is_main) as bar:
        world.together(work)


def _missing(config: SampleConfig, partial: PartialSamples, size: int) -> list[range]:
    """The batches that are still to be generated. PNG files are made anew: DVC has deleted those of a stopped stage."""
    grids.remove_numbered(PNG)
    done = []
    for indices, array in partial.found():
        done.append(indices)
        if config.save_png:
            grids.save_all(array, PNG, first=indices.start)
    if done:
        print(f"resuming: {sum(map(len, done))} of {config.num_images} images are done", file=sys.stderr)
    return [batch for gap in missing(done, config.num_images) for batch in generation.cut(gap, size)]


def _describe(params: Params, denoiser: Denoiser, card: dict[str, Any], identity: str, device: torch.device) -> None:
    """The pictures, and last the card, which says that all is there."""
    _write_pictures(params, denoiser, device)
    config = params.sample
    keys = ("sampler", "steps", "spacing", "eta", "variance", "clip_x0", "guidance")
    about = {
        "config": config.model_dump(mode="json"),
        **{key: getattr(config, key) for key in keys},
        "network_evaluations": evaluations(config, denoiser.schedule),
        "precision": str(denoiser.dtype).removeprefix("torch."),
        "seed": params.seed,
        **{key: card.get(key) for key in ("weights", "step", "data_digest", "fingerprint", "run_id")},
        "made_by": {"name": card.get("name"), "origin": card.get("origin", {})},
        "trained": {section: card["config"][section] for section in ("diffusion", "model")},
        "code": sampling_code(),
        "images": {"identity": identity, "sha256": _digest(paths.SAMPLES_NPZ)},
    }
    write_json(paths.SAMPLES_CARD, about)


def _write_pictures(params: Params, denoiser: Denoiser, device: torch.device) -> None:
    """The grid and the strip; of a network that knows classes also rows of them, and guidances."""
    config, images = params.sample, _images()
    grids.save_png(grids.grid(images[:GRID_IMAGES], columns=8, scale=grids.zoom(images)), paths.SAMPLES / "grid.png")
    shown = range(min(STRIP_IMAGES, config.num_images))
    strip = panels.stages(denoiser, config, params.seed, shown, device, STRIP_COLUMNS)
    grids.save_png(grids.strip(strip.numpy(), scale=grids.zoom(images)), paths.SAMPLES / "denoising.png")
    labels = generation.labels_of(config, denoiser.num_classes, range(config.num_images))
    if labels is not None:
        _write_classes(images, labels)
        if denoiser.guidable:
            _write_guidances(params, denoiser, device, grids.zoom(images))


def _write_classes(images: np.ndarray, labels: Tensor) -> None:
    """classes.png, a row a class."""
    rows = panels.by_class(torch.from_numpy(images), labels, CLASS_COLUMNS)
    if len(rows):
        picture = grids.grid(rows.numpy(), columns=CLASS_COLUMNS, scale=grids.zoom(images))
        grids.save_png(picture, paths.SAMPLES / "classes.png")


def _write_guidances(params: Params, denoiser: Denoiser, device: torch.device, scale: int) -> None:
    """guidance.png, a row an image, a column a guidance."""
    shown = range(min(SWEEP_IMAGES, params.sample.num_images))
    sweep = panels.guidance_sweep(denoiser, params.sample, params.seed, shown, device)
    grids.save_png(grids.strip(sweep.numpy(), scale=scale), paths.SAMPLES / "guidance.png")
