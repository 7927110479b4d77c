"""The optimiser, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config import TrainConfig

# Share of train.lr that is left at progress u in [0, 1] after the warm-up.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),  # Loshchilov & Hutter 2017, eq. 5, without restarts
    "linear": lambda u: 1.0 - u,
}

OUTER = frozenset({"stem", "head", "embedding", "class_embedding", "augment_embedding", "embed"})  # not Muon's
NEWTON_SCHULZ_STEPS = 3  # usually 5: on a CPU these are a fifth of a small step, and no loss was seen


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up to train.lr, then the decay, at 0 only after the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    return config.lr * DECAYS[config.lr_schedule](min(1.0, (step - config.warmup_steps) / span))


def make_optimizer(net: nn.Module, config: TrainConfig) -> "torch.optim.AdamW | MuonAdamW":
    """What `train.optimizer` names, over all parameters of `net`."""
    if config.optimizer == "muon":
        return MuonAdamW(net, config)
    return adamw(list(net.parameters()), config)


def adamw(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices and kernels only, not on biases and norms."""
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)


def clipped_step(
    optimizer: "torch.optim.AdamW | MuonAdamW", net: nn.Module, loss: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Step with the gradients scaled to a norm of at most `clip`, unless `loss` () or that norm is not finite.

    Returns (gradient norm before scaling, whether the step was taken), both () on the device. With AdamW the host does
    not wait for it: the fused optimiser divides by `grad_scale`, and leaves everything as it is where `found_inf` is 1,
    as it does for torch.amp.GradScaler. Muon has no such switch, nor has AdamW on mps, so there the host looks.
    """
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    taken = loss.isfinite() & norm.isfinite()
    scale = (norm / clip).clamp(min=1.0)
    if isinstance(optimizer, torch.optim.AdamW) and norm.device.type != "mps":  # mps takes both and heeds neither
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif taken:
        torch._foreach_div_(gradients, scale)
        optimizer.step()
    return norm, taken


class MuonAdamW:
    """Muon (Jordan et al. 2024) for the matrices and kernels inside the network, AdamW for all other parameters.

    A kernel (C', C, k, k) counts as the matrix (C', C k k). Updates are scaled to the size of AdamW's (Liu et al. 2025,
    section 2.2), so that one train.lr serves both. First and last layer and what embeds the timestep are AdamW's, as
    Jordan et al. advise.
    """

    def __init__(self, net: nn.Module, config: TrainConfig) -> None:
        named = list(net.named_parameters())
        inner = [p for name, p in named if p.ndim > 1 and OUTER.isdisjoint(name.split("."))]
        ids = {id(p) for p in inner}
        self.kernels = [(p, nn.Parameter(_matrix(p.detach(), like=p))) for p in inner]  # the matrix is p's own memory
        self.muon = torch.optim.Muon(
            [matrix for _, matrix in self.kernels],
            lr=config.lr,
            weight_decay=config.weight_decay,
            ns_steps=NEWTON_SCHULZ_STEPS,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = adamw([p for _, p in named if id(p) not in ids], config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        """One step of both."""
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad, like=kernel)
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        for kernel, matrix in self.kernels:
            kernel.grad = matrix.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of both, for checkpoints."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def _matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """(C', ...) as (C', n), in the order in which `like` lies in memory: a view for a tensor that lies like it."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)
