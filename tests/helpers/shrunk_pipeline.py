"""`dvc repro` in this very clone, shrunk and on random images: the workspace is then as `make run` leaves it.

CI runs the quick tests once more after it. params.yaml comes back as it was.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.project import REPO, TINY

from diffusion import params_file


def main() -> None:
    """Run the whole pipeline in the repository's folder."""
    images, params = REPO / "data/random.npz", REPO / "params.yaml"
    images.parent.mkdir(exist_ok=True)
    rng, labels = np.random.default_rng(0), np.arange(60) % 10
    np.savez(images, images=rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), labels=labels.astype(np.uint8))
    before = params.read_bytes()
    tree = params_file.load(params, {**TINY, "data.source": "data/random.npz"}).model_dump(mode="json")
    try:
        YAML().dump(tree, params)
        subprocess.run(["dvc", "repro"], cwd=REPO, check=True)
    finally:
        params.write_bytes(before)


if __name__ == "__main__":
    main()
