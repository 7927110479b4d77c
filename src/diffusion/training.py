"""The training loop: a generator of records. Progress bar, tracking and previews hang on it from outside."""

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion import checkpoint
from diffusion.config import TrainedConfig, to_dict
from diffusion.data import Batches, Dataset, to_tensor
from diffusion.ema import EMA, ema_decay
from diffusion.errors import UserError
from diffusion.loss import Loss
from diffusion.optim import learning_rate, make_optimizer
from diffusion.provenance import code_digest
from diffusion.runtime import generator, resolve_precision, seeded
from diffusion.schedules import make_schedule
from diffusion.unet import UNet

MAX_BAD_STEPS = 10  # non-finite losses in a row before a rollback
MAX_ROLLBACKS = 3
SMOOTHING = 0.9  # of the smoothed loss, a logged row


@dataclass
class Progress:
    """Everything of a training's state that is not a tensor."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    skipped: int = 0  # steps not taken because their loss or gradient was not finite
    bad_in_a_row: int = 0
    rollbacks: int = 0
    seconds: float = 0.0  # of training, over all sittings
    loss_rows: list[dict[str, float]] = field(default_factory=list)
    val_rows: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Record:
    """What a step was like. `row` and `val_loss` are there on the steps that log and validate."""

    step: int  # steps done
    loss: float
    row: dict[str, float] | None = None
    val_loss: float | None = None


def fingerprint(config: TrainedConfig, data_digest: str) -> str:
    """Names a training: same params, data and code, same run folder. 16 hex digits."""
    identity = {"config": to_dict(config), "data": data_digest, "code": code_digest(Path(__file__))}
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Trainer:
    """Network, EMA, optimiser and data of one training, resumed from the newest checkpoint in `folder`."""

    def __init__(self, config: TrainedConfig, data: Dataset, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.dtype = resolve_precision(config.train.precision, device)
        self.schedule = make_schedule(config.diffusion.schedule, config.diffusion.num_steps).to(device)
        with seeded(config.seed, "init", 0, torch.device("cpu")):
            net = UNet(config.model)
        self.net: nn.Module = net.to(device).to(memory_format=torch.channels_last)
        self.ema = EMA(self.net)
        self.best = copy.deepcopy(self.ema.net.state_dict())
        self.optimizer = make_optimizer(self.net, config.train)
        self.loss = Loss(self.schedule, config.diffusion.prediction, config.train.loss_weight, self.dtype)
        self.batches = Batches(data.train, config.train.batch_size, config.seed, flip=config.train.flip, device=device)
        self.val = to_tensor(data.val.to(device))
        self.progress = Progress()
        self._recent: list[float] = []
        self._restore()

    def step(self) -> Record:
        """One optimiser step on the batch of `progress.step`; a non-finite loss is counted and not stepped on."""
        progress, config = self.progress, self.config.train
        lr = learning_rate(progress.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = self._gradients()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.ema.update(self.net, ema_decay(progress.step, config.ema_decay))
            progress.bad_in_a_row = 0
            self._recent.append(loss)
        else:
            progress.skipped += 1
            progress.bad_in_a_row += 1
        progress.step += 1
        row = self._log(lr, grad_norm) if progress.step % config.log_every == 0 else None
        return Record(progress.step, loss, row)

    def validate(self) -> float:
        """Validation loss of the EMA weights; the best ones are kept."""
        progress = self.progress
        value = self.loss.validation(self.ema.net, self.val, self.config.seed, 2 * self.config.train.batch_size)
        progress.val_rows.append({"step": progress.step, "val_loss": value})
        if value < progress.best_val_loss:
            progress.best_step, progress.best_val_loss = progress.step, value
            self.best = copy.deepcopy(self.ema.net.state_dict())
        return value

    def save(self) -> None:
        """Checkpoint the state as it is now."""
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress) | {"recent": self._recent},
        }
        checkpoint.save(state, self.folder, self.progress.step)

    def roll_back(self) -> None:
        """Return to the last checkpoint, with other noise from there on.

        Raises:
            UserError: it was tried MAX_ROLLBACKS times already.
        """
        step, rollbacks, skipped = self.progress.step, self.progress.rollbacks + 1, self.progress.skipped
        if rollbacks > MAX_ROLLBACKS:
            raise UserError(
                f"the loss was not finite for {MAX_BAD_STEPS} steps in a row at step {step}, after {MAX_ROLLBACKS} "
                "rollbacks: lower train.lr or train.grad_clip, or set train.precision: fp32"
            )
        self._restore()
        self.progress.rollbacks, self.progress.skipped, self.progress.bad_in_a_row = rollbacks, skipped, 0

    def _gradients(self) -> tuple[float, float]:
        """Fill the gradients, clipped; (loss, gradient norm before clipping)."""
        progress, seed = self.progress, self.config.seed
        salt = f"/{progress.rollbacks}" if progress.rollbacks else ""
        source = generator(seed, "train" + salt, progress.step, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with seeded(seed, "dropout" + salt, progress.step, self.device):
            loss = self.loss.training(self.net, self.batches(progress.step), source)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.train.grad_clip)
        return float(loss.detach()), float(norm)

    def _log(self, lr: float, grad_norm: float) -> dict[str, float]:
        progress = self.progress
        loss = sum(self._recent) / len(self._recent) if self._recent else math.nan
        self._recent = []
        row = {
            "step": progress.step,
            "loss": loss,
            "loss_smoothed": smoothed(progress.loss_rows, loss),
            "lr": lr,
            "grad_norm": grad_norm,
        }
        progress.loss_rows.append(row)
        return row

    def _restore(self) -> None:
        state = checkpoint.latest(self.folder, self.device)
        if state is None:
            self.save()  # a rollback always finds one
            return
        self.net.load_state_dict(state["net"])
        self.ema.net.load_state_dict(state["ema"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        values: dict[str, Any] = state["progress"]
        self._recent = values.pop("recent")
        self.progress = Progress(**values)


def smoothed(rows: Sequence[Mapping[str, float]], loss: float) -> float:
    """Next value of the smoothed loss: an average with warm-up like the weights'; a loss of NaN leaves it as it is."""
    before = rows[-1]["loss_smoothed"] if rows else math.nan
    if math.isnan(before) or math.isnan(loss):
        return loss if math.isnan(before) else before
    decay = ema_decay(len(rows), SMOOTHING)
    return decay * before + (1 - decay) * loss


def train(trainer: Trainer) -> Iterator[Record]:
    """Run `trainer` to its last step, yielding after each; validates and checkpoints on the way.

    Whoever stops iterating may call `trainer.save()`: every yield is between two steps.

    Raises:
        UserError: the training diverges and rollbacks do not help.
    """
    config, progress = trainer.config.train, trainer.progress
    while progress.step < config.steps:
        start = time.perf_counter()
        record = trainer.step()
        if progress.bad_in_a_row >= MAX_BAD_STEPS:
            trainer.roll_back()
            progress = trainer.progress
        last = progress.step == config.steps
        if last or progress.step % config.validate_every == 0:
            record.val_loss = trainer.validate()
        progress.seconds += time.perf_counter() - start
        if last or (progress.step % config.checkpoint_every == 0 and not progress.bad_in_a_row):
            trainer.save()  # never amid bad steps: a rollback must lead back to before them
        yield record
