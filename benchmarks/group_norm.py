"""GroupNorm forward + backward in bf16, channels last, by channels a group: why params/laptop.yaml has 4 groups."""

import statistics
import time

import torch
from machine import report
from torch import Tensor

REPEATS = 30
SHAPE = (64, 64, 16, 16)  # (B, C, H, W): the first level of the laptop recipe


def seconds(groups: int) -> float:
    """Median time of one forward and backward pass."""
    norm = torch.nn.GroupNorm(groups, SHAPE[1])
    x = torch.randn(SHAPE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn_like(x)
    times = [_once(norm, x, upstream) for _ in range(REPEATS + 5)][5:]
    return statistics.median(times)


def _once(norm: torch.nn.GroupNorm, x: Tensor, upstream: Tensor) -> float:
    start = time.perf_counter()
    norm(x).backward(upstream)
    return time.perf_counter() - start


if __name__ == "__main__":
    milliseconds = {groups: round(1000 * seconds(groups), 3) for groups in (32, 16, 8, 4, 2)}
    result = {"shape": SHAPE, "milliseconds_by_groups": milliseconds}
    report("group_norm", {**result, "ratio_32_to_4": round(milliseconds[32] / milliseconds[4], 1)})
