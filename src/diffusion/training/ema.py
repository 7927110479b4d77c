"""Exponential moving average of the weights: what is validated, sampled, evaluated and exported."""

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, decay: float) -> float:
    """Decay after `step` updates: min(decay, (1 + step) / (10 + step)).

    Without this warm-up (TensorFlow's ExponentialMovingAverage rule) the average keeps the random start for about
    1 / (1 - decay) steps, and a short run samples noise.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """A frozen copy of `net` in float32, moved towards it by `update`."""

    def __init__(self, net: nn.Module) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, decay: float) -> None:
        """Average = decay * average + (1 - decay) * weights."""
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1.0 - decay)

    @torch.no_grad()
    def update_where(self, taken: Tensor, net: nn.Module, decay: float) -> None:
        """As `update`, if the bool `taken` () is true; the host does not wait to know. `net` is finite either way."""
        steps = torch._foreach_sub(list(net.parameters()), list(self.net.parameters()))
        torch._foreach_mul_(steps, (1.0 - decay) * taken.float())
        torch._foreach_add_(list(self.net.parameters()), steps)
