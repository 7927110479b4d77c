"""Which trials are not worth their end."""

import copy
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner

from diffusion.config import TuneConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

MARGIN = 0.02  # of the median: errors on common noise levels that are closer have ended in any order of fd_lite0


class MedianWithMargin(BasePruner):
    """Optuna's median pruner, for a trial whose present error is worse by more than MARGIN.

    The median is that of complete trials at the same step. Optuna's own would compare a trial's least error so far.
    """

    def __init__(self, startup: int, warmup: int) -> None:
        """Ask after `startup` complete trials, from step `warmup` on."""
        self.median = MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)

    def prune(self, study: "Study", trial: "FrozenTrial") -> bool:
        """Whether to stop `trial` now."""
        step, better = trial.last_step, copy.copy(trial)
        if step is None:
            return False
        better.intermediate_values = {step: trial.intermediate_values[step] / (1 + MARGIN)}
        return bool(self.median.prune(study, better))


def make_pruner(config: TuneConfig) -> Any:
    """The pruner that `tune.pruner` names; its steps are images seen.

    The first quarter of a trial tells warm-ups apart, and not what comes of them.
    """
    images = config.images_per_trial
    if config.pruner == "median":
        return MedianWithMargin(startup=max(3, config.trials // 4), warmup=images // 4)
    if config.pruner == "hyperband":
        return HyperbandPruner(min_resource=max(1, images // 4), max_resource=images)
    return NopPruner()
