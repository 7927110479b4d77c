"""The training loop: a generator of records. Progress bar, tracking and previews hang on it from outside."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config import TrainedConfig
from diffusion.data.dataset import Batches, Dataset
from diffusion.data.pixels import to_tensor
from diffusion.distributed import SINGLE_PROCESS, World, data_parallel
from diffusion.errors import DivergedError
from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.runtime import compiled, generator, resolve_precision, seeded, use_fast_kernels
from diffusion.training import augment, checkpoint
from diffusion.training.ema import EMA, ema_decay
from diffusion.training.loss import Loss
from diffusion.training.optim import clipped_step, learning_rate, make_optimizer
from diffusion.training.progress import Progress, Record

MAX_BAD_STEPS = 10  # non-finite losses in a row before a rollback
MAX_ROLLBACKS = 3


class Trainer:
    """Network, EMA, optimiser and data of one training, resumed from the newest checkpoint in rank 0's `folder`.

    The ranks of `world` share each batch. All its numbers (images, flips, t, noise) are functions of seed, step and
    position in the batch, so that they do not depend on the number of ranks; only dropout's masks do.
    """

    def __init__(
        self,
        config: TrainedConfig,
        data: Dataset,
        folder: Path,
        device: torch.device,
        world: World = SINGLE_PROCESS,
        score: "Callable[[Trainer], float] | None" = None,  # of the averaged weights; all ranks get the same
        origin: Mapping[str, str] | None = None,  # commit, machine, ... for the checkpoints, which keep the first
    ) -> None:
        if config.train.best_by == "fd_lite0" and score is None:
            raise ValueError("train.best_by = fd_lite0 and nothing computes it")
        self.config, self.folder, self.device, self.world, self._score = config, folder, device, world, score
        self.begun = {"config": config.model_dump(mode="json"), "origin": dict(origin or {})}  # how the training began
        self.share = world.share(config.train.batch_size)  # positions in the batch
        if world.size > config.train.batch_size:
            world.fail(f"{world.size} processes cannot share train.batch_size = {config.train.batch_size}: raise it")
        if data.image_shape != (shape := config.model.image_shape):
            world.fail(f"the images have the shape {data.image_shape} and the model wants {shape}: run `dvc repro`")
        if config.model.num_classes and (classes := int(data.labels.max()) + 1) > config.model.num_classes:
            world.fail(f"the images have {classes} classes: set model.num_classes: {classes}")
        use_fast_kernels(device)
        self.dtype = resolve_precision(config.train.precision, device)
        self.schedule = configured_schedule(config.diffusion).to(device)
        with seeded(config.seed, "init", 0, torch.device("cpu")):
            net = UNet(config.model)
        self.net: nn.Module = net.to(device).to(memory_format=torch.channels_last)
        self.ema = EMA(self.net)
        self.best = copy.deepcopy(self.ema.net.state_dict())
        self.optimizer = make_optimizer(self.net, config.train)
        how = config.train
        self.loss = Loss(self.schedule, config.diffusion.prediction, how.loss_weight, self.dtype, how.timesteps)
        self.batches = Batches(data, how.batch_size, config.seed, flip=how.flip, device=device, share=self.share)
        self.val = to_tensor(data.read(data.val).to(device))
        self.val_given = {"labels": data.labels[data.val].to(device)} if config.model.num_classes else {}
        self.progress = Progress()
        self.reads_every_step = device.type == "cpu"  # there it costs nothing
        self._unread: list[Tensor] = []  # [loss, gradient norm] of the steps that `settle` has not seen
        self._recent: list[float] = []
        self._grad_norm = math.nan
        self._restore()
        self._parallel = data_parallel(self.net) if world.size > 1 else None
        self._forward = compiled(self._parallel or self.net, config.train.compile, device, config.train.steps)

    def step(self) -> Record:
        """One optimiser step on the batch of `progress.step`; a non-finite loss is counted and not stepped on.

        Loss and gradient norm stay on the device until `settle`: the host does not wait for a GPU.
        """
        progress, config = self.progress, self.config.train
        lr = learning_rate(progress.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._gradients()
        norm, taken = clipped_step(self.optimizer, self.net, loss, config.grad_clip)
        decay = ema_decay(progress.step, config.ema_decay)
        if not self.reads_every_step:
            self.ema.update_where(taken, self.net, decay)
        elif taken:
            self.ema.update(self.net, decay)
        self._unread.append(torch.stack([loss, norm]))
        progress.step += 1
        if self.reads(progress.step):
            self.settle()
        record = Record(progress.step, loss)
        if progress.step % config.log_every == 0:
            record.row = progress.log(self._recent, lr, self._grad_norm)
            self._recent = []
        return record

    def reads(self, step: int) -> bool:
        """Whether losses are read, and divergence is judged, after `step`: fixed steps, so that a resumed training and
        all ranks decide alike.
        """
        due = step % MAX_BAD_STEPS == 0 or step % self.config.train.log_every == 0 or step == self.config.train.steps
        return self.reads_every_step or due

    def settle(self) -> None:
        """Wait for the device and count the steps since the last call as taken or skipped."""
        progress = self.progress
        for loss, norm in torch.stack(self._unread).tolist() if self._unread else []:
            self._grad_norm = norm
            if math.isfinite(loss) and math.isfinite(norm):
                progress.bad_in_a_row = 0
                self._recent.append(loss)
            else:
                progress.skipped += 1
                progress.bad_in_a_row += 1
        self._unread = []

    def validate(self) -> float:
        """Validation loss of the EMA weights; the best ones are kept."""
        size = 2 * (self.config.train.micro_batch or len(self.share))
        value = self.loss.validation(self.ema.net, self.val, self.config.seed, size, self.world, **self.val_given)
        return self._noted("val_loss", self.progress.val_rows, value)

    def evaluate(self) -> float:
        """fd_lite0 of the EMA weights; the best ones are kept if `train.best_by` says so. All ranks call it."""
        assert self._score is not None
        return self._noted("fd_lite0", self.progress.fd_rows, self._score(self))

    def evaluates(self, step: int) -> bool:
        """Whether `evaluate` is due after `step`."""
        every, steps = self.config.train.evaluate_every, self.config.train.steps
        return bool(self._score and every and (step % every == 0 or step == steps))

    def keep(self) -> None:
        """Take the EMA weights of now for the ones to export."""
        self.progress.best_step = self.progress.step
        self.best = copy.deepcopy(self.ema.net.state_dict())

    def denoiser(self) -> Denoiser:
        """Of the EMA weights of now, clipping x0, in the training's precision; it shares their memory."""
        return Denoiser(self.ema.net, self.schedule, self.config.diffusion.prediction, dtype=self.dtype, clip_x0=True)

    def save(self) -> None:
        """Checkpoint the state as it is now; all ranks call it, and rank 0 writes.

        Not amid bad steps, but at the end: a rollback, in this session or the next, must lead back to before them.
        """
        self.settle()
        amid = self.progress.bad_in_a_row and self.progress.step < self.config.train.steps
        if amid or not self.world.is_main:
            return
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress) | {"recent": self._recent},
            "precision": str(self.dtype).removeprefix("torch."),
            **self.begun,
        }
        checkpoint.save(state, self.folder, self.progress.step)

    def roll_back(self) -> None:
        """Return to the last checkpoint, with other noise from there on.

        Raises:
            DivergedError: it was tried MAX_ROLLBACKS times already.
        """
        step, rollbacks, skipped = self.progress.step, self.progress.rollbacks + 1, self.progress.skipped
        if rollbacks > MAX_ROLLBACKS:
            self.world.fail(
                f"the loss was not finite for {MAX_BAD_STEPS} steps in a row at step {step}, after {MAX_ROLLBACKS} "
                "rollbacks: lower train.lr or train.grad_clip, or set train.precision: fp32",
                DivergedError,
            )
        self._restore()
        self.progress.rollbacks, self.progress.skipped, self.progress.bad_in_a_row = rollbacks, skipped, 0

    def _gradients(self) -> Tensor:
        """Fill the gradients of the global batch's mean loss, micro-batch by micro-batch; that loss, ()."""
        step, config, world = self.progress.step, self.config.train, self.world
        salt = f"/{self.progress.rollbacks}" if self.progress.rollbacks else ""
        x0, share = self.batches(step), slice(self.share.start, self.share.stop)
        # Every rank draws the whole batch's numbers, which is cheap, and takes its share of them.
        drawn = self.loss.draw(x0, config.batch_size, generator(self.config.seed, "train" + salt, step, self.device))
        t, eps, given = drawn[0][share], drawn[1][share], self._given(salt)
        if "augment" in given:
            x0 = augment.applied(x0, given["augment"])
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        size = config.micro_batch or len(x0)
        for start in range(0, len(x0), size):
            part = slice(start, start + size)
            with self._reduced(start + size >= len(x0)), self._dropout(salt, share.start + start):
                of_part = {name: value[part] for name, value in given.items()}
                mean = self.loss.training(self._forward, x0[part], t[part], eps[part], **of_part)
                loss = mean * (len(x0[part]) / config.batch_size)
                # DDP takes the mean over ranks, whatever their shares: the factor makes it the mean over images.
                (loss * world.size).backward()
            total += loss.detach()
        return world.sum_(total)

    def _given(self, salt: str) -> dict[str, Tensor]:
        """What the network is told of this rank's images beside x and t.

        labels: int64 (B,), -1 where dropped (Ho & Salimans 2022, algorithm 1); augment: float32 (B, AUGMENT_LABELS).
        """
        step, config, given = self.progress.step, self.config, {}
        count, share = config.train.batch_size, slice(self.share.start, self.share.stop)
        if config.model.num_classes:
            source = generator(config.seed, "labels" + salt, step, self.device)
            dropped = torch.rand(count, generator=source, device=self.device) < config.train.label_dropout
            given["labels"] = self.batches.labels(step).masked_fill(dropped[share], -1)
        if config.model.augment:
            source = generator(config.seed, "augment" + salt, step, self.device)
            given["augment"] = augment.draw(count, config.model.augment, source)[share]
        return given

    def _reduced(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Only the last micro-batch's backward pass sums gradients over the ranks."""
        if last or self._parallel is None:
            return contextlib.nullcontext()
        return self._parallel.no_sync()

    def _dropout(self, salt: str, position: int) -> contextlib.AbstractContextManager[None]:
        """Dropout's random numbers, by step and position of the first image; nothing to do without dropout."""
        if not self.config.model.dropout:
            return contextlib.nullcontext()
        return seeded(self.config.seed, f"dropout{salt}/{position}", self.progress.step, self.device)

    def _noted(self, name: str, rows: list[dict[str, float]], value: float) -> float:
        """`value` of the EMA weights, once it is in its curve; the weights are kept if it is train.best_by's best."""
        rows.append({"step": self.progress.step, name: value})
        if value < getattr(self.progress, best := f"best_{name}"):
            setattr(self.progress, best, value)
            if self.config.train.best_by == name:
                self.keep()
        return value

    def _restore(self) -> None:
        """Take up rank 0's newest checkpoint; the other ranks need not see its folder."""
        device = self.device if self.world.size == 1 else "cpu"
        state = checkpoint.latest(self.folder, device, self.config) if self.world.is_main else None
        state = self.world.broadcast(state)
        if state is None:
            self.save()  # a rollback always finds one
            return
        self.net.load_state_dict(state["net"])
        self.ema.net.load_state_dict(state["ema"])
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.train.precision == "auto":  # what it was begun with, whatever this machine would choose
            self.dtype = self.loss.dtype = getattr(torch, state["precision"])
        self.begun = {key: state.get(key, value) for key, value in self.begun.items()}
        values: dict[str, Any] = state["progress"]
        self._recent, self._unread = values.pop("recent"), []
        self.progress = Progress(**values)


def train(trainer: Trainer) -> Iterator[Record]:
    """Run `trainer` to its last step, yielding after each; validates, evaluates and checkpoints on the way.

    Whoever stops iterating may call `trainer.save()`: every yield is between two steps.

    Raises:
        DivergedError: rollbacks do not help.
    """
    config, progress = trainer.config.train, trainer.progress
    while progress.step < config.steps:
        start = time.perf_counter()
        record = trainer.step()
        if trainer.reads(progress.step) and progress.bad_in_a_row >= MAX_BAD_STEPS:
            trainer.roll_back()
            progress = trainer.progress
            yield record  # of a step that does not count any more
            continue
        last = progress.step == config.steps
        if last and config.best_by == "last":
            trainer.keep()
        if last or progress.step % config.validate_every == 0:
            record.val_loss = trainer.validate()
        if trainer.evaluates(progress.step):
            record.fd_lite0 = trainer.evaluate()
        progress.seconds += time.perf_counter() - start
        if last or progress.step % config.checkpoint_every == 0:
            trainer.save()
        yield record
