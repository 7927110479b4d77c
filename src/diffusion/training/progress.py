"""How far a training is: its numbers over all its sessions, what one step was like, and the smoothed loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diffusion.training.ema import ema_decay

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
    seconds: float = 0.0  # of training, over all sessions
    loss_rows: list[dict[str, float]] = field(default_factory=list)
    val_rows: list[dict[str, float]] = field(default_factory=list)
    best_fd_lite0: float = math.inf
    fd_rows: list[dict[str, float]] = field(default_factory=list)

    def log(self, losses: Sequence[float], lr: float, grad_norm: float) -> dict[str, float]:
        """Append a row to `loss_rows`: the mean of `losses`, those of the steps since the row before."""
        loss = sum(losses) / len(losses) if losses else math.nan
        smooth = smoothed(self.loss_rows, loss)
        row = {"step": self.step, "loss": loss, "loss_smoothed": smooth, "lr": lr, "grad_norm": grad_norm}
        self.loss_rows.append(row)
        return row


@dataclass
class Record:
    """What a step was like. `row`, `val_loss` and `fd_lite0` are there on the steps that log, validate and evaluate."""

    step: int  # steps done
    device_loss: Tensor  # () on the device; may be of a step that it has not computed yet
    row: dict[str, float] | None = None
    val_loss: float | None = None
    fd_lite0: float | None = None

    @property
    def loss(self) -> float:
        """Loss of the global batch; waits for the device."""
        return float(self.device_loss)


def smoothed(rows: Sequence[Mapping[str, float]], loss: float) -> float:
    """Next value of the smoothed loss: an average with warm-up like the weights'; a loss of NaN leaves it as it is."""
    before = rows[-1]["loss_smoothed"] if rows else math.nan
    if math.isnan(before) or math.isnan(loss):
        return loss if math.isnan(before) else before
    decay = ema_decay(len(rows), SMOOTHING)
    return decay * before + (1 - decay) * loss
