"""The search for learning rate and schedules: an Optuna study whose trials are ordinary, shorter trainings.

A trial's value is fd_lite0 of samples, not its validation loss: the noise schedule decides how hard the validation
images are to denoise, so the losses of different schedules are not comparable.
"""

import csv
import io
import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ruamel.yaml import YAML
from tqdm import tqdm

from diffusion import paths, tracking
from diffusion.config import Params, TrainedConfig, TuneConfig, flat, from_dict, to_dict, trained
from diffusion.data import Dataset
from diffusion.errors import UserError
from diffusion.extraction import moments_of
from diffusion.features import EfficientNetLite0
from diffusion.fit import StopRequest, only_trainer
from diffusion.journal import Tracker
from diffusion.metrics import frechet_distance
from diffusion.parameterization import Denoiser
from diffusion.previews import preview_config
from diffusion.provenance import code_digest
from diffusion.reference import Reference
from diffusion.runtime import generator, keep_freed_memory, resolve_device
from diffusion.sampling import generate
from diffusion.training import Trainer, fingerprint, train

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

SEARCHED = ("train.lr", "train.lr_schedule", "diffusion.schedule")
COUNTED = ("COMPLETE", "PRUNED")  # states that use up one of `tune.trials`


def tune(params: Params) -> None:
    """Search until the study has `tune.trials` trials over all sittings; keep tuning/trials.csv and best.yaml current.

    Raises:
        UserError: data or the reference are missing, or another trainer is at work.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM); the trial at work is marked FAIL.
    """
    data, extractor = Dataset.load(), EfficientNetLite0(precision=params.evaluate.precision)
    reference = load_reference(params, extractor)
    name = study_name(params, data.digest, reference)
    keep_freed_memory()
    with only_trainer(paths.RUNS / name), StopRequest() as stop:
        study = open_study(name, params.seed, params.tune)
        run_id = study.user_attrs.get("mlflow_run_id")  # of an earlier sitting
        tracker = tracking.open_run(params.tracking, name=f"tune-{name}", run_folder=paths.RUNS / name, run_id=run_id)
        study.set_user_attr("mlflow_run_id", tracker.run_id or run_id)
        tracker.params(flat(params.tune, "tune"))
        search = Search(params, data, reference, extractor, tracker, stop)
        with tracking.closing_status(tracker, "tune"):
            try:
                write_tables(study)  # another study's may lie there
                while len(trials(study, *COUNTED)) < params.tune.trials:
                    study.optimize(search.objective, n_trials=1, callbacks=[search.report])
            except KeyboardInterrupt:
                done = len(trials(study, *COUNTED))
                raise KeyboardInterrupt(f"stopped after {done} trials; `make tune` goes on from there") from None
            finally:
                write_tables(study)
                tracker.artifact(paths.TRIALS_CSV, "tuning")
        print(f"{params.tune.trials} trials are done: {paths.TRIALS_CSV}, {paths.BEST_YAML}")


def study_name(params: Params, data_digest: str, reference: Reference) -> str:
    """16 hex digits that name all a study's values depend on, code included; `tune.trials` may be raised later."""
    first = (params.tune.lr[0], params.tune.lr_schedules[0], params.tune.schedules[0])  # what is searched is no setting
    identity = {
        "tune": to_dict(params.tune) | {"trials": None},
        "training": fingerprint(trial_config(params, dict(zip(SEARCHED, first, strict=True))), data_digest),
        "reference": reference.key,
        "code": code_digest(Path(__file__)),
    }
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def open_study(name: str, seed: int, config: TuneConfig) -> "Study":
    """The study of that name, new or as it was left. The caller holds its lock: whatever is RUNNING is dead."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs a traceback for Ctrl-C
    paths.OPTUNA_DB.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(f"sqlite:///{paths.OPTUNA_DB.as_posix()}", heartbeat_interval=30)
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    for trial in trials(study, "RUNNING"):  # the heartbeat alone would need a minute, and misses one that never beat
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    study.sampler = optuna.samplers.TPESampler(
        seed=generator(seed, "tune", len(study.trials)).initial_seed() % 2**32,  # else each sitting repeats the first
        n_startup_trials=min(10, max(2, config.trials // 3)),  # random; Optuna's 10 would leave a short study no search
    )
    return study


def trial_config(params: Params, values: Mapping[str, Any]) -> TrainedConfig:
    """What a trial trains: `params` with `values` (dotted keys), cut to `tune.images_per_trial`.

    Warm-up and the distance between validations keep their share of the training; no distance exceeds its length.
    """
    base, tree = params.train, to_dict(params)
    steps = max(1, params.tune.images_per_trial // base.batch_size)
    share = min(1.0, steps / base.steps)
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    tree["train"] |= {
        "steps": steps,
        "evaluate_every": 0,  # a trial is scored at its end
        "best_by": "val_loss",
        "warmup_steps": round(base.warmup_steps * share),
        "validate_every": max(1, round(base.validate_every * share)),
        **{key: min(getattr(base, key), steps) for key in ("log_every", "preview_every", "checkpoint_every")},
    }
    return trained(from_dict(tree))


@dataclass
class Search:
    """What the trials of one sitting share."""

    params: Params
    data: Dataset
    reference: Reference
    extractor: EfficientNetLite0
    tracker: Tracker
    stop: StopRequest

    def objective(self, trial: "Trial") -> float:
        """Train as `trial` proposes and score it: fd_lite0. Divergence prunes, with user attribute `reason`."""
        from optuna import TrialPruned

        space = self.params.tune
        trial.suggest_float("train.lr", *space.lr, log=True)
        trial.suggest_categorical("train.lr_schedule", space.lr_schedules)
        trial.suggest_categorical("diffusion.schedule", space.schedules)
        config = trial_config(self.params, trial.params)
        folder = paths.RUNS / fingerprint(config, self.data.digest)
        trainer = Trainer(config, self.data, folder, resolve_device(config.train.device))
        reason = self._train(trainer, f"trial {trial.number}")
        value = math.nan if reason else score(trainer, self.params, self.reference, self.extractor)
        if not math.isfinite(value):
            trial.set_user_attr("reason", reason or f"fd_lite0 is {value}")
            raise TrialPruned
        return value

    def report(self, study: "Study", trial: "FrozenTrial") -> None:
        """After each trial: tables, tracker, one line; then stop, if that was asked for while it was scored."""
        write_tables(study)
        done, total, leader = trials(study, *COUNTED), self.params.tune.trials, best(study)
        if leader and trial.value is not None:
            self.tracker.metrics({"trial/fd_lite0": trial.value, "best/fd_lite0": leader.values[0]}, trial.number)
        result = trial.user_attrs.get("reason") or f"fd_lite0 {trial.value:.2f}"
        drawn = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        top = f"{leader.values[0]:.2f} (trial {leader.number})" if leader else "none"
        seconds = sum(t.duration.total_seconds() for t in done if t.duration) / len(done) * (total - len(done))
        line = f"trial {trial.number} ({len(done)} of {total}): {result}; {drawn}; best {top}"
        print(f"{line}; {seconds / 60:.0f} min left", flush=True)
        if self.stop.asked and len(done) < total:
            raise KeyboardInterrupt

    def _train(self, trainer: Trainer, what: str) -> str:
        """Train to the end, from the checkpoint if there is one; the reason if that diverged, or an empty text."""
        pace = 0.5 if sys.stderr.isatty() else 30
        total, done = trainer.config.train.steps, trainer.progress.step
        try:
            for record in tqdm(train(trainer), what, total, initial=done, unit=" steps", mininterval=pace):
                if self.stop.asked and record.step < total:
                    trainer.save()
                    raise KeyboardInterrupt
        except UserError as error:  # training's only one: rollbacks did not help
            return str(error)
        return "" if math.isfinite(trainer.progress.best_val_loss) else "the validation loss was never finite"


def load_reference(params: Params, extractor: EfficientNetLite0) -> Reference:
    """Moments of the real images that the evaluate section names; UserError if the reference stage has to make them."""
    path, config = paths.REFERENCE / f"{extractor.metric}.npz", params.evaluate
    reference = Reference.load(path, extractor.describe())
    if (reference.key["split"], reference.key["images"]) != (config.reference_split, config.reference_images):
        raise UserError(f"{path} is of other images than the evaluate section names: run `dvc repro reference`")
    return reference


def score(trainer: Trainer, params: Params, reference: Reference, extractor: EfficientNetLite0) -> float:
    """fd_lite0 of `tune.sample_images` images by the EMA weights that the train stage would keep.

    Sampled as previews are, from the same noise in every trial. So few images bias the distance upwards, in all trials
    alike: it ranks them and is not a result to quote.
    """
    config = preview_config(trainer.config.train)
    config = replace(config, num_images=params.tune.sample_images, batch_size=params.sample.batch_size)
    trainer.ema.net.load_state_dict(trainer.best)
    prediction = trainer.config.diffusion.prediction
    denoiser = Denoiser(trainer.ema.net, trainer.schedule, prediction, dtype=trainer.dtype, clip_x0=config.clip_x0)
    images = torch.cat([*generate(denoiser, config, trainer.config.seed, range(config.num_images), trainer.device)])
    moments = moments_of(images.numpy(), extractor, params.evaluate.batch_size, trainer.device, extractor.metric)
    return frechet_distance(moments.mean, moments.cov, reference.mean, reference.cov)


def trials(study: "Study", *states: str) -> "list[FrozenTrial]":
    """Trials by number, of the named states."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in states]


def best(study: "Study") -> "FrozenTrial | None":
    """The complete trial of least value."""
    return min(trials(study, "COMPLETE"), key=lambda trial: trial.values[0], default=None)


def write_tables(study: "Study") -> None:
    """tuning/trials.csv, and tuning/best.yaml (sections and keys as in params.yaml) once a trial is complete."""
    table, leader = io.StringIO(), best(study)
    rows = csv.DictWriter(table, ["number", "state", "value", *SEARCHED, "reason"])
    rows.writeheader()
    for t in study.get_trials(deepcopy=False):
        reason = t.user_attrs.get("reason")
        rows.writerow({"number": t.number, "state": t.state.name, "value": t.value, "reason": reason, **t.params})
    _replace(paths.TRIALS_CSV, table.getvalue())
    tree: dict[str, dict[str, Any]] = {}
    for key, value in leader.params.items() if leader else ():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    text = io.StringIO()
    YAML().dump(tree, text)
    _replace(paths.BEST_YAML, text.getvalue())


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.new").write_text(text, newline="")
    path.with_name(f"{path.name}.new").replace(path)
