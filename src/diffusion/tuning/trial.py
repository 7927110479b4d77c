"""One trial: the ordinary training, shorter, and its score, in a run of its own below the study's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from optuna import Trial
from tqdm import tqdm

from diffusion.config import Params, TuneConfig, flat
from diffusion.data import grids
from diffusion.data.dataset import Dataset
from diffusion.errors import DivergedError, UserError
from diffusion.metrics.features import EfficientNetLite0
from diffusion.runtime import keep_freed_memory, resolve_device
from diffusion.tracking import runs
from diffusion.tracking.tracker import Tracker
from diffusion.training.loop import Trainer, train
from diffusion.training.progress import Record
from diffusion.tuning.objective import common_error, load_reference, samples, score
from diffusion.tuning.space import Value, trial_config
from diffusion.tuning.storage import quiet

REPORTS = 8  # intermediate values a trial
SHOWN = 64  # images of a trial's picture
WHOLE = "whole."  # begins the names of the values searched, as params.yaml has them; without it: as the trial trains


class PrunedError(Exception):
    """The trial is not worth its end; the message is the reason, one line."""


@dataclass
class Attempt:
    """A trial as its objective sees it: what to try, where, and how to say how it goes."""

    number: int  # Optuna's; a trial that is tried again has a new one
    values: Mapping[str, Value]  # by dotted key
    folder: Path  # the same for all tries of a trial
    tags: Mapping[str, str]  # of its MLflow run
    asked_to_stop: Callable[[], bool]
    worker: int  # its number on this machine
    config: TuneConfig
    trial: Trial

    def report(self, images_seen: int, value: float) -> None:
        """An intermediate value at images seen that are the same for all trials; Optuna keeps the first of each.

        Raises:
            PrunedError: it is not finite, or the pruner says that others do better.
            optuna.exceptions.UpdateFinishedTrialError: the trial was given to another worker.
        """
        with quiet():  # of values that an earlier try reported
            self.trial.report(value, images_seen)
        if not math.isfinite(value):
            raise PrunedError(f"the error is {value} after {images_seen:,} images")
        if self.trial.should_prune():
            raise PrunedError(f"{self.config.pruner}: an error of {value:.4g} after {images_seen:,} images")


Objective = Callable[[Attempt], float]


class Trainings:
    """The objective: what the trials of one worker share, and how one is done."""

    def __init__(self, params: Params) -> None:
        """Raises UserError if data or the reference are missing."""
        self.params, self.data, self.extractor = (
            params,
            Dataset.load(),
            EfficientNetLite0(precision=params.evaluate.precision),
        )
        self.reference = load_reference(params, self.extractor)
        keep_freed_memory()

    def __call__(self, attempt: Attempt) -> float:
        """Train as `attempt` says, from the checkpoint if there is one, and return fd_lite0.

        Raises:
            PrunedError: the values do not go together, the training diverges or has no room, or it is not worth it.
            UserError: no trial can be done here.
            KeyboardInterrupt: it was asked to stop; the state was saved first.
        """
        try:
            config = trial_config(self.params, attempt.values)
        except UserError as error:
            raise PrunedError(str(error)) from None
        tracker = runs.open_run(
            self.params.tracking, name=f"trial {attempt.number}", run_folder=attempt.folder, tags=attempt.tags
        )
        pruned: PrunedError | None = None
        with runs.closing_status(tracker, "trial"):
            tracker.params(flat(config) | {f"{WHOLE}{key}": value for key, value in attempt.values.items()})
            tracker.tags({"trial.state": "RUNNING"})
            try:
                trainer = Trainer(config, self.data, attempt.folder, resolve_device(config.train.device))
                self._train(trainer, attempt, tracker)
                value = self._score(trainer, attempt, tracker)
                tracker.tags({"trial.state": "COMPLETE"})
            except torch.OutOfMemoryError:
                pruned = PrunedError("it does not fit into the device's memory")
            except (PrunedError, DivergedError) as error:
                pruned = PrunedError(str(error))
            except Exception:
                tracker.tags({"trial.state": "FAIL"})
                raise
            if pruned:
                tracker.tags({"trial.state": "PRUNED", "trial.reason": str(pruned)})
        if pruned:
            raise pruned
        return value

    def _train(self, trainer: Trainer, attempt: Attempt, tracker: Tracker) -> None:
        """Train to the end; report the common error at REPORTS points that are the same for all trials."""
        config, budget = trainer.config.train, self.params.tune.images_per_trial
        due = {max(1, k * config.steps // REPORTS): k * budget // REPORTS for k in range(1, REPORTS + 1)}
        bar = tqdm(
            total=config.steps,
            initial=trainer.progress.step,
            desc=f"worker {attempt.worker}: trial {attempt.number}",
            position=attempt.worker,
            leave=False,
            mininterval=0.5,
            disable=None,  # where there is no terminal
        )

        def report(step: int) -> None:
            if step != trainer.progress.step or step not in due:
                return  # or it was rolled back and does not count
            error = common_error(trainer)
            tracker.metrics({"val/common_error": error}, step)
            bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            attempt.report(due[step], error)

        with bar:
            report(trainer.progress.step)  # a kill may have come between checkpoint and report
            for record in train(trainer):
                _track(record, tracker)
                bar.update(record.step - bar.n)
                report(record.step)
                if record.step < config.steps and attempt.asked_to_stop():
                    trainer.save()
                    raise KeyboardInterrupt
        if not math.isfinite(trainer.progress.best_val_loss):
            raise PrunedError("the validation loss was never finite")

    def _score(self, trainer: Trainer, attempt: Attempt, tracker: Tracker) -> float:
        """fd_lite0 of the trial's images, of which some go into its run."""
        images = samples(trainer, self.params)
        value = score(images, self.params, self.reference, self.extractor, trainer.device)
        if not math.isfinite(value):
            raise PrunedError(f"fd_lite0 is {value}")
        picture, shown = attempt.folder / "samples.png", images[:SHOWN].numpy()
        grids.save_png(grids.grid(shown, columns=8, scale=grids.zoom(shown)), picture)
        tracker.artifact(picture, "samples")
        tracker.metrics({"fd_lite0": value}, trainer.config.train.steps)
        return value


def _track(record: Record, tracker: Tracker) -> None:
    if record.row:
        tracker.metrics({f"train/{key}": value for key, value in record.row.items() if key != "step"}, record.step)
    if record.val_loss is not None:
        tracker.metrics({"val/loss": record.val_loss}, record.step)
