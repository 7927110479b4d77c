"""What a study leaves: a table of its trials, the best values, figures, and the figures of the study's MLflow run."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from optuna.importance import FanovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as charts
from ruamel.yaml import YAML

from diffusion import paths
from diffusion.atomic import write_text
from diffusion.config import Params
from diffusion.tracking.tracker import Tracker
from diffusion.tuning.space import RECIPE, Value, read_space, recipe_digest, settings
from diffusion.tuning.storage import quiet
from diffusion.tuning.study import COUNTED, best, trials

IMPORTANCE, SLICE, INTERMEDIATE = "importance.png", "slice.png", "intermediate.png"
FIGURES = {  # file in tuning/figures/ -> function of optuna.visualization.matplotlib
    "history.png": "plot_optimization_history",
    IMPORTANCE: "plot_param_importances",
    "parallel.png": "plot_parallel_coordinate",
    SLICE: "plot_slice",
    INTERMEDIATE: "plot_intermediate_values",
}


class Ledger:
    """Keeps tables, the study's run and whoever watches up to date; one process of a machine has it."""

    def __init__(self, study: Study, params: Params, tracker: Tracker) -> None:
        self.study, self.params, self.tracker, self.space = study, params, tracker, read_space(params)
        self._said = {trial.number for trial in trials(study, *COUNTED, TrialState.FAIL)}

    def update(self) -> None:
        """Say, and write down, what has ended since the last call."""
        new = [trial for trial in trials(self.study, *COUNTED, TrialState.FAIL) if trial.number not in self._said]
        for trial in new:
            self._said.add(trial.number)
            self._track(trial)
            self._say(trial)
        if new:
            self.write()

    def write(self) -> None:
        """Write tuning/trials.csv and tuning/best.yaml, a part of a params.yaml; empty before a trial is done.

        The study's run is told the best too, which another machine may have found.
        """
        table, keys = io.StringIO(), [dimension.key for dimension in self.space]
        rows = csv.DictWriter(table, ["number", "state", "value", "error", *keys, "seconds", "retry_of", "reason"])
        rows.writeheader()
        rows.writerows(self._row(trial) for trial in trials(self.study))
        write_text(paths.TRIALS_CSV, table.getvalue())
        leader, tree = best(self.study), dict[str, dict[str, Value]]()
        values = settings(self.params, self._values(leader)) if leader else {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        text = io.StringIO()
        text.write(f"{RECIPE}{recipe_digest(self.params)}\n")
        YAML().dump(tree, text)
        write_text(paths.BEST_YAML, text.getvalue())
        if leader:
            found = {f"best_{key}": str(value) for key, value in values.items()}
            self.tracker.tags({"best_trial": str(leader.number), "best_fd_lite0": f"{leader.values[0]:.4f}", **found})

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        state, errors = trial.state.name, trial.intermediate_values
        return {
            "number": trial.number,
            "state": state,
            "value": trial.values[0] if state == "COMPLETE" else None,  # Optuna's of a pruned one is an error
            "error": errors[max(errors)] if errors else None,
            **self._values(trial),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "retry_of": trial.system_attrs.get("failed_trial"),
            "reason": _reason(trial),
        }

    def _values(self, trial: FrozenTrial) -> dict[str, Value]:
        return {d.key: d.used(trial.params[d.key]) for d in self.space if d.key in trial.params}

    def _track(self, trial: FrozenTrial) -> None:
        leader = best(self.study)
        if leader is None or trial.state.name != "COMPLETE":
            return
        self.tracker.metrics({"trial/fd_lite0": trial.values[0], "best/fd_lite0": leader.values[0]}, trial.number)

    def _say(self, trial: FrozenTrial) -> None:
        done, total, leader = trials(self.study, *COUNTED), self.params.tune.trials, best(self.study)
        state = trial.state.name
        result = f"fd_lite0 {trial.values[0]:.2f}" if state == "COMPLETE" else f"{state} ({_reason(trial)})"
        values = ", ".join(f"{key} {value}" for key, value in self._values(trial).items()) or "-"
        top = f"{leader.values[0]:.2f} (trial {leader.number})" if leader else "none"
        seconds = [t.duration.total_seconds() for t in done if t.duration]
        left = sum(seconds) / max(1, len(seconds)) * max(0, total - len(done)) / self.params.tune.workers / 60
        clear = "\r\x1b[2K" if sys.stdout.isatty() else ""  # a worker's line may stand there
        line = f"trial {trial.number} ({len(done)} of {total}): {result}; {values}; best {top}; {left:.0f} min left"
        sys.stdout.write(f"{clear}{line}\n")
        sys.stdout.flush()


def plot_figures(study: Study) -> None:
    """Plot FIGURES into tuning/figures/; one that these trials are too few for is left out.

    Importances are shares of the variance (fANOVA: Hutter et al. 2014). Optuna's own choice, PED-ANOVA, looks at the
    best tenth of the trials alone, which is one or two here.
    """
    reasons = []
    for name, function in FIGURES.items():
        path = paths.TUNING_FIGURES / name
        path.unlink(missing_ok=True)
        try:
            with quiet():
                options: dict[str, Any] = {} if name == INTERMEDIATE else {"target_name": "fd_lite0"}
                if name == IMPORTANCE:
                    options["evaluator"] = FanovaImportanceEvaluator(seed=0)
                plotted = getattr(charts, function)(study, **options)
        except (ValueError, RuntimeError, ImportError) as error:
            reasons.append(f"{name} ({' '.join(str(error).split())[:80]})")
            continue
        axes = np.ravel(np.asarray(plotted, dtype=object))
        if name == INTERMEDIATE:
            axes[0].set(title="What the pruner sees", xlabel="images seen", ylabel="error on common noise levels")
        if name == SLICE:
            axes[0].figure.set_size_inches(4.5 * len(axes), 4)  # room for the numbers of a log axis
        _save(axes[0].figure, path)
    if reasons and len(trials(study, TrialState.COMPLETE)) > 1:
        print(f"tune: not plotted: {', '.join(reasons)}", file=sys.stderr)


def _save(figure: Any, path: Path) -> None:
    """As large as what is in it: Optuna leaves labels and legends outside of the figure."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(figure)


def _reason(trial: FrozenTrial) -> str:
    if trial.state.name == "FAIL":
        return str(trial.user_attrs.get("reason") or "its worker was killed")
    return str(trial.user_attrs.get("reason", "")) if trial.state.name == "PRUNED" else ""
