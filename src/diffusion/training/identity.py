"""The name of a training: what would change its weights changes it."""

import json
from hashlib import sha256

from diffusion.config import TrainedConfig, to_dict
from diffusion.provenance import LIBRARY, code_digest

# Keys of the train section that say how the same steps are computed: a training may go on with others.
HOW = ("micro_batch", "compile", "processes", "checkpoint_every")


def fingerprint(config: TrainedConfig, data: str) -> str:
    """Same params (but HOW), data (`Dataset.identity`) and code: same name, same run folder. 16 hex digits."""
    tree = to_dict(config)
    for key in HOW:
        del tree["train"][key]
    identity = {"config": tree, "data": data, "code": code_digest(LIBRARY / "training.py")}
    if config.train.evaluate_every:  # else nothing depends on it
        identity["scoring"] = code_digest(LIBRARY / "scoring.py")
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
