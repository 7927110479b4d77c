"""Which of the training's timesteps a sampler visits."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion.model.schedules import SIGMA_MAX, NoiseSchedule


def sampling_timesteps(spacing: str, schedule: NoiseSchedule, count: int) -> Tensor:
    """int64 (count,), descending: the steps of `schedule` that a sampler of `count` steps visits.

    uniform: evenly from the last to 0; quadratic: even in sqrt(t), dense near 0 (Song et al. 2021, appendix D.2, with
    the last step kept); trailing: evenly, ending at the last step (Lin et al. 2023, table 2); logsnr: even in
    log(a / s) (Lu et al. 2022, DPM-Solver, section 3.3); karras: even in sigma^(1/7) with sigma = s / a (Karras et al.
    2022, eq. 5). The last two begin where sigma is SIGMA_MAX, if the schedule goes beyond: cosine's ends at 20,000.

    Raises:
        ValueError: unknown spacing, or count outside 1 .. num_steps.
    """
    num_steps = schedule.num_steps
    if not 1 <= count <= num_steps:
        raise ValueError(f"{count} sampling steps of {num_steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"no spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    return _distinct(np.round(SPACINGS[spacing](schedule, count)).astype(np.int64))


def _down(num_steps: int, count: int) -> np.ndarray:
    """Lin et al.'s own arithmetic, whose rounding errors decide at exact halves."""
    return np.arange(num_steps, 0, -num_steps / count)[:count]


def _even_in(of_log_sigma: Callable[[np.ndarray], np.ndarray]) -> Callable[[NoiseSchedule, int], np.ndarray]:
    def steps(schedule: NoiseSchedule, count: int) -> np.ndarray:
        log_sigma = -schedule.log_ratio().cpu().numpy()
        largest = math.log(SIGMA_MAX)
        usable = min(max(int((log_sigma < largest).sum()) + 1, count), len(log_sigma))
        table = of_log_sigma(np.minimum(log_sigma[:usable], max(largest, log_sigma[0])))
        return np.interp(np.linspace(table[-1], table[0], count), table, np.arange(usable))

    return steps


def _distinct(descending: np.ndarray) -> Tensor:
    """Push equal neighbours apart (spacings that are dense at one end repeat steps) without leaving 0 .. first."""
    first = descending[0]
    for i in range(len(descending) - 2, -1, -1):
        descending[i] = max(descending[i], descending[i + 1] + 1)
    descending[0] = first
    for i in range(1, len(descending)):
        descending[i] = min(descending[i], descending[i - 1] - 1)
    return torch.from_numpy(descending)


SPACINGS: dict[str, Callable[[NoiseSchedule, int], np.ndarray]] = {
    "uniform": lambda schedule, count: np.linspace(schedule.num_steps - 1, 0, count),
    "quadratic": lambda schedule, count: np.linspace(math.sqrt(schedule.num_steps - 1), 0, count) ** 2,
    "trailing": lambda schedule, count: np.round(_down(schedule.num_steps, count)) - 1,
    "logsnr": _even_in(lambda log_sigma: log_sigma),
    "karras": _even_in(lambda log_sigma: np.exp(log_sigma / 7.0)),
}
