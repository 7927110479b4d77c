"""The optimiser, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.config import TrainConfig

# Share of train.lr that is left at progress u in [0, 1] after the warm-up.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),  # Loshchilov & Hutter 2017, eq. 5, without restarts
    "linear": lambda u: 1.0 - u,
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up to train.lr, then the decay, at 0 only after the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    return config.lr * DECAYS[config.lr_schedule](min(1.0, (step - config.warmup_steps) / span))


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices and kernels only, not on biases and norms."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)


def clipped_step(optimizer: torch.optim.AdamW, net: nn.Module, loss: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Step with the gradients scaled to a norm of at most `clip`, unless `loss` () or that norm is not finite.

    Returns (gradient norm before scaling, whether the step was taken), both () on the device: the host does not wait.
    The fused optimiser divides by `grad_scale`, and leaves everything as it is where `found_inf` is 1, as it does for
    torch.amp.GradScaler.
    """
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    taken = loss.isfinite() & norm.isfinite()
    optimizer.grad_scale = (norm / clip).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm, taken
