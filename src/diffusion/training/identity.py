"""The name of a training: what would change its weights changes it."""

import json
from hashlib import sha256
from typing import Any

import torch

from diffusion.code_digest import code_digests
from diffusion.config import TrainedConfig, to_dict

# Keys of the train section that say how the same steps are computed: a training may go on with others.
HOW = ("micro_batch", "compile", "processes", "checkpoint_every", "device")
# Code in the loop's import closure of which no bit of the weights depends.
NOT_IN_WEIGHTS = ("training/checkpoint.py", "training/previews.py")


def identity(config: TrainedConfig, data: str) -> dict[str, Any]:
    """All that decides the weights: params (but HOW), data (`Dataset.identity`), code file by file, torch's version."""
    tree = to_dict(config)
    for key in HOW:
        del tree["train"][key]
    scripts = ["training/loop.py"]
    if config.train.evaluate_every:  # else nothing depends on it
        scripts.append("training/scoring.py")
    code = code_digests(*scripts, without=NOT_IN_WEIGHTS)
    return {"config": tree, "data": data, "code": code, "torch": torch.__version__}


def fingerprint(config: TrainedConfig, data: str) -> str:
    """16 hex digits of `identity`, which name the run folder."""
    return sha256(json.dumps(identity(config, data), sort_keys=True).encode()).hexdigest()[:16]
