"""The train stage's work around the training loop: locks, resume, progress bar, tracking, previews, outputs."""

import contextlib
import csv
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusion import paths
from diffusion.atomic import write_json, write_text
from diffusion.config import Params, TrainedConfig, flat, trained, trained_from_dict
from diffusion.data.dataset import Dataset
from diffusion.distributed import joined
from diffusion.errors import StopRequest, UserError
from diffusion.locks import enter_exclusive, only_trainer
from diffusion.model.model_file import save_model
from diffusion.params_file import write_yaml
from diffusion.runtime import keep_freed_memory, peak_memory
from diffusion.serving.registry import register
from diffusion.tracking import runs
from diffusion.tracking.journal import JOURNAL, remembered
from diffusion.tracking.mlflow_writer import SystemMetrics
from diffusion.tracking.provenance import origin
from diffusion.tracking.tracker import Tracker
from diffusion.training.ema import ema_decay
from diffusion.training.identity import begin, fingerprint, identity
from diffusion.training.loop import Trainer, train
from diffusion.training.previews import has_previews, outdated_previews, write_previews
from diffusion.training.progress import Record
from diffusion.training.scoring import Scorer


def train_model(params: Params) -> None:
    """Train as `params` say, or go on where a stopped training of the same params, data and code was; write outputs.

    Under torchrun all processes call it and share the work. It waits for a trainer of the same, or in this workspace.

    Raises:
        UserError: data are missing, or the training diverges.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM); the state was saved first.
        SystemExit: on ranks other than 0, in place of either.
    """
    config = trained(params)
    with joined(config.train.device) as (world, device), contextlib.ExitStack() as held:
        data = world.together(Dataset.load)
        keep_freed_memory()
        folder = paths.RUNS / fingerprint(config, data.identity)
        enter_exclusive(held, world, lambda waiting: only_trainer(folder, wait=True, waiting=waiting))
        stop = held.enter_context(StopRequest())
        score = Scorer(config, data, folder, device) if config.train.evaluate_every else None
        if world.is_main:
            for line in begin(folder, identity(config, data.identity)):
                print(f"train: {line}", file=sys.stderr)
        made_by = {**origin(params, device), "processes": str(world.size)}
        trainer = Trainer(config, data, folder, device, world, score, made_by)
        if trainer.progress.step and world.is_main:
            print(f"resuming at step {trainer.progress.step} of {config.train.steps} ({folder.name})", file=sys.stderr)
        tracker = _open_run(params, trainer, data.digest) if world.is_main else Tracker()
        with runs.closing_status(tracker, "train"):
            if world.is_main:
                _describe(params, folder, tracker)
            if world.is_main and _shows(trainer) and not has_previews(trainer):  # it was killed before it made them
                _write_previews(trainer, tracker)
            _loop(trainer, tracker, stop)
            if world.is_main and not has_previews(trainer):
                _write_previews(trainer, tracker)
            if world.is_main:
                _write_outputs(trainer, tracker, data.digest)


def _loop(trainer: Trainer, tracker: Tracker, stop: StopRequest) -> None:
    config, world = trainer.config.train, trainer.world
    system = SystemMetrics(wanted=tracker.run_id is not None)
    with tqdm(
        total=config.steps * config.batch_size,
        initial=trainer.progress.step * config.batch_size,
        unit=" images",
        desc="train",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        smoothing=0.05,
        disable=not world.is_main,
    ) as bar:
        for record in train(trainer):
            if world.is_main:
                bar.update(config.batch_size)
                _show(record, trainer, tracker, system, bar)
                if _shows(trainer):
                    _write_previews(trainer, tracker)
            if _stops(trainer, stop, record.step):
                trainer.save()
                if not world.is_main:
                    world.leave(130)
                raise KeyboardInterrupt(f"stopped at step {record.step}; `dvc repro` goes on from there")


def _shows(trainer: Trainer) -> bool:
    """Whether previews are made at the step that the training is at, other than the last, which always has them."""
    step, config = trainer.progress.step, trainer.config.train
    return 0 < step < config.steps and step % config.preview_every == 0


def _write_previews(trainer: Trainer, tracker: Tracker) -> None:
    """Pictures of the step that the training is at."""
    for key, picture in zip(("samples", "denoising"), write_previews(trainer), strict=True):
        tracker.image(picture, key, trainer.progress.step)


def _stops(trainer: Trainer, stop: StopRequest, step: int) -> bool:
    """Whether all ranks stop after this step: whichever was asked to; they agree at the steps that are read anyway."""
    asks = trainer.world.size == 1 or trainer.reads(step)
    return step < trainer.config.train.steps and asks and trainer.world.any(stop.asked)


def _show(record: Record, trainer: Trainer, tracker: Tracker, system: SystemMetrics, bar: Any) -> None:
    """Bar and tracker get what the step logged."""
    progress = trainer.progress
    if record.row:
        values = {f"train/{key}": value for key, value in record.row.items() if key != "step"}
        values["train/images_per_second"] = _images_per_second(trainer)
        values["train/ema_decay"] = ema_decay(record.step - 1, trainer.config.train.ema_decay)
        values["train/memory_megabytes"] = peak_memory(trainer.device) / 1e6
        tracker.metrics(values | system.read(), record.step)
    if record.val_loss is not None:
        best = {"best/val_loss": progress.best_val_loss, "best/step": progress.best_step}
        tracker.metrics({"val/loss": record.val_loss, **best}, record.step)
        _write_curves(trainer)
    if record.fd_lite0 is not None:
        tracker.metrics({"val/fd_lite0": record.fd_lite0, "best/fd_lite0": progress.best_fd_lite0}, record.step)
        _write_curves(trainer)
    if record.row or record.val_loss is not None:
        smoothed = progress.loss_rows[-1]["loss_smoothed"] if progress.loss_rows else record.loss
        val = f"{progress.val_rows[-1]['val_loss']:.4f}" if progress.val_rows else "-"
        bar.set_postfix_str(f"loss {smoothed:.4f}, validation {val}", refresh=False)


def _open_run(params: Params, trainer: Trainer, data_digest: str) -> Tracker:
    """The MLflow run of this training: a new one, or the one that a stopped session began."""
    return runs.open_run(
        params.tracking,
        name=run_name(params),
        run_folder=trainer.folder,
        tags={"data.digest": data_digest, "fingerprint": trainer.folder.name, **trainer.begun["origin"]},
        register=register,
    )


def _describe(params: Params, folder: Path, tracker: Tracker) -> None:
    """The run gets the parameters, the whole of params.yaml, and which data it is of."""
    tracker.params(flat(trained(params)))
    tracker.dataset(**_described_data())
    whole = folder / paths.PARAMS.name
    write_yaml(params, whole, without=("tune.storage",))  # its URL may hold a password
    tracker.artifact(whole)


def _described_data() -> dict[str, str]:
    card = json.loads(paths.DATA_CARD.read_text())
    return {"name": Path(card["source"]).name, "digest": card["digest"], "source": card["source"]}


def run_name(params: Params | TrainedConfig) -> str:
    """Short and telling: learning rate, its schedule, noise schedule, what is predicted."""
    digits, exponent = f"{params.train.lr:.2e}".split("e")
    lr = f"{float(digits):g}e{int(exponent)}" if params.train.lr < 1 else str(params.train.lr)
    return f"lr{lr}-{params.train.lr_schedule}-{params.diffusion.schedule}-{params.diffusion.prediction}"


def _images_per_second(trainer: Trainer) -> float:
    progress = trainer.progress
    return progress.step * trainer.config.train.batch_size / max(progress.seconds, 1e-9)


def _write_outputs(trainer: Trainer, tracker: Tracker, data_digest: str) -> None:
    """What dvc.yaml declares; models/ is a function of the training, whoever exports it when."""
    progress, config, made_by = trainer.progress, trainer.config.train, trainer.begun["origin"]
    if not progress.best_step:
        raise UserError(
            "no validation was finite, so no weights were kept: lower train.lr, or set train.precision: fp32"
        )
    metrics = {
        "images_seen": progress.step * config.batch_size,
        "images_per_second": round(_images_per_second(trainer), 1),
        "train_seconds": round(progress.seconds, 1),
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "best_step": progress.best_step,
        "best_val_loss": progress.best_val_loss,
        "final_val_loss": progress.val_rows[-1]["val_loss"],
        "final_loss_smoothed": progress.loss_rows[-1]["loss_smoothed"] if progress.loss_rows else None,
        "skipped_steps": progress.skipped,
        "rollbacks": progress.rollbacks,
        "processes": int(made_by["processes"]),
        "device": made_by["device"].split(":")[0],
        "precision": str(trainer.dtype).removeprefix("torch."),
    }
    if progress.fd_rows:
        metrics["best_fd_lite0"] = progress.best_fd_lite0
    about = {
        "step": progress.best_step,
        "val_loss": next((r["val_loss"] for r in progress.val_rows if r["step"] == progress.best_step), None),
        "weights": "ema",
        "data_digest": data_digest,
        "fingerprint": trainer.folder.name,
        "run_id": tracker.run_id or remembered(trainer.folder / JOURNAL),
        "name": run_name(trainer.config),
        "origin": made_by,
    }
    save_model(paths.MODEL, trainer.best, trained_from_dict(trainer.begun["config"]), about)
    write_json(paths.TRAIN_METRICS, metrics)
    _write_curves(trainer)
    shutil.rmtree(paths.PREVIEWS, ignore_errors=True)
    shutil.copytree(trainer.folder / "previews", paths.PREVIEWS)
    if others := outdated_previews(trainer):
        steps = ", ".join(map(str, others))
        print(f"train: previews of steps {steps} stay as other code or params made them", file=sys.stderr)
    numbers = {key.removeprefix("final_"): value for key, value in metrics.items() if isinstance(value, int | float)}
    tracker.metrics({f"final/{key}": float(value) for key, value in numbers.items()}, progress.step)
    for path in (paths.MODEL, paths.MODEL_CARD):
        tracker.artifact(path, "model")
    for path in (paths.LOSS_CSV, paths.VAL_LOSS_CSV, paths.FD_CSV):
        tracker.artifact(path, "curves")


def _write_curves(trainer: Trainer) -> None:
    """Rewrite the CSV files whole: DVC deleted them before a resumed stage began."""
    progress = trainer.progress
    _write_csv(paths.LOSS_CSV, ["step", "loss", "loss_smoothed", "lr", "grad_norm"], progress.loss_rows)
    _write_csv(paths.VAL_LOSS_CSV, ["step", "val_loss"], progress.val_rows)
    _write_csv(paths.FD_CSV, ["step", "fd_lite0"], progress.fd_rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())
