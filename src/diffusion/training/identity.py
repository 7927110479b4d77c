"""The name of a training: what would change its weights changes it."""

import json
from functools import cache
from hashlib import sha256
from modulefinder import ModuleFinder
from pathlib import Path

from diffusion.config import TrainedConfig, to_dict

# Keys of the train section that say how the same steps are computed: a training may go on with others.
HOW = ("micro_batch", "compile", "processes", "checkpoint_every")


def fingerprint(config: TrainedConfig, data: str) -> str:
    """Same params (but HOW), data (`Dataset.identity`) and code: same name, same run folder. 16 hex digits."""
    tree = to_dict(config)
    for key in HOW:
        del tree["train"][key]
    identity = {"config": tree, "data": data, "code": code_digest(LIBRARY / "training/loop.py")}
    if config.train.evaluate_every:  # else nothing depends on it
        identity["scoring"] = code_digest(LIBRARY / "training/scoring.py")
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


LIBRARY = Path(__file__).parents[1]


@cache
def import_closure(script: Path, root: Path = LIBRARY.parent) -> frozenset[Path]:
    """The files below `root` that running `script` can import, the script included; nothing is executed."""
    finder = ModuleFinder(path=[str(root)])
    finder.run_script(str(script))
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    return frozenset(Path(file) for file in files if file)


def code_digest(script: Path) -> str:
    """sha256 over the import closure of `script`: changes whenever code that it depends on does."""
    sha = sha256()
    for path in sorted(import_closure(script)):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()
