"""The convolutions and matrix products of a training step, done alone."""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "linear"}
REPEATS = 5


class Like:
    """A tensor's shape, strides and type: equal for operations that cost the same."""

    def __init__(self, tensor: Tensor) -> None:
        self.key = (tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Like) and self.key == other.key

    def tensor(self) -> Tensor:
        """Another one like it."""
        shape, stride, dtype = self.key
        own = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]  # 0: expanded
        return torch.empty_strided(own, stride, dtype=dtype).normal_().expand(shape)


class Recorder(TorchDispatchMode):
    """Counts the products that run inside it, by operator and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, Any]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS and not kwargs:
            frozen = tree_map(lambda a: Like(a) if isinstance(a, Tensor) else a, args)
            self.counts[func, _hashable(frozen)] += 1
        return func(*args, **(kwargs or {}))


def products_alone(step: Callable[[], object]) -> float:
    """Seconds of all convolutions and matrix products of one `step`, each repeated alone on arguments of its kind."""
    with Recorder() as recorder:
        step()
    if not recorder.counts:
        raise RuntimeError("the step has no convolution or matrix product: torch renamed them")
    total = 0.0
    for (func, frozen), count in recorder.counts.items():
        args = _thawed(frozen)
        seconds = []
        with torch.no_grad():
            func(*args)
            for _ in range(REPEATS):
                start = time.perf_counter()
                func(*args)
                seconds.append(time.perf_counter() - start)
        total += count * median(seconds)
    return total


def _hashable(value: Any) -> Any:
    return ("list", *map(_hashable, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == ("list",):
        return [_thawed(v) for v in value[1:]]
    return value.tensor() if isinstance(value, Like) else value
