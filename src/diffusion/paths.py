"""Every path that dvc.yaml names, and the state that lives beside the pipeline.

Stage outputs are relative to the working folder, so that `dvc exp run --temp` keeps each experiment's outputs apart.
State that must outlive a stage (checkpoints, downloads, the MLflow store) is anchored at the repository: DVC sets
DVC_ROOT to it, also when it runs a stage in a temporary copy.
"""

import os
from pathlib import Path

ROOT = Path(os.environ.get("DVC_ROOT", ".")).resolve()

PARAMS = Path("params.yaml")

# download
CIFAR10 = Path("data/cifar10")
CIFAR10_TRAIN = CIFAR10 / "train.npz"
CIFAR10_TEST = CIFAR10 / "test.npz"

# prepare
IMAGES = Path("data/images")
TRAIN_IMAGES = IMAGES / "train.npy"
TRAIN_LABELS = IMAGES / "train_labels.npy"
TEST_IMAGES = IMAGES / "test.npy"  # if the source has any
PREPARED = Path("data/prepared")
SPLIT = PREPARED / "split.npz"
DATA_CARD = PREPARED / "data.json"

# weights
WEIGHTS_CARD = Path("data/weights.json")

# reference
REFERENCE = Path("reference")

# train
MODEL = Path("models/model.safetensors")
MODEL_CARD = Path("models/model.json")
TRAIN_METRICS = Path("metrics/train.json")
LOSS_CSV = Path("plots/loss.csv")
VAL_LOSS_CSV = Path("plots/val_loss.csv")
FD_CSV = Path("plots/fd_lite0.csv")
PREVIEWS = Path("plots/previews")

TRAIN_LOCK = Path("runs/workspace.lock")  # relative: one trainer a workspace, also in a temporary one
SAMPLE_LOCK = Path("runs/samples.lock")  # the same for who writes samples/

# sample
SAMPLES = Path("samples")
SAMPLES_NPZ = SAMPLES / "images.npz"
SAMPLES_CARD = SAMPLES / "card.json"

# evaluate
EVALUATE_METRICS = Path("metrics/evaluate.json")

# report
REPORT = Path("report")

# tune, which is no DVC stage
TUNING = Path("tuning")
TRIALS_CSV = TUNING / "trials.csv"
BEST_YAML = TUNING / "best.yaml"
TUNING_FIGURES = TUNING / "figures"

# outside DVC's outs, which DVC deletes before a stage runs
DOWNLOADS = ROOT / "data/downloads"
WEIGHTS = ROOT / "data/weights"
RUNS = ROOT / "runs"
OPTUNA_DB = ROOT / "optuna/study.db"
MLFLOW_DB = ROOT / "mlflow.db"
MLFLOW_ARTIFACTS = ROOT / "mlartifacts"


def named(path: str) -> Path:
    """What a key of params.yaml names: ~ is the home folder, and what is relative lies in the repository, also where
    DVC runs an experiment in a copy. data.source is the exception: DVC hashes it, knows no ~, and has it in the copy.
    """
    return ROOT / os.path.expanduser(path)  # noqa: PTH111 (Path.expanduser fails for an unknown user)
