"""Does a large data set cost memory or speed? 1,000,000 synthetic images against 50,000, through the same code.

For each size an npz file of noise goes through the prepare stage in a process of its own; then training steps of the
default recipe, and batches alone, on what it wrote, take turns. Needs 7 GB of disk for a few minutes (--folder).
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import report
from turns import compete

from diffusion.config import trained
from diffusion.data.dataset import Batches, Dataset
from diffusion.params_file import load
from diffusion.runtime import keep_freed_memory
from diffusion.training.loop import Trainer

REPO = Path(__file__).parents[1]
CPU = torch.device("cpu")
CHUNK = 10_000  # images


@click.command()
@click.option("--images", default="1000000,50000", show_default=True, help="Sizes of the sets, the large one first.")
@click.option("--turns", default=5, show_default=True, help="Turns of each size.")
@click.option("--seconds", default=10.0, show_default=True, help="Length of a turn.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files go.  [default: the system's]")
def main(images: str, turns: int, seconds: float, folder: Path | None) -> None:
    """Measure, print one JSON line, write results/data_scale.json."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        sizes = {f"{int(n):,} images": Path(root, n) for n in images.split(",")}
        prepared = {name: prepare(place, int(place.name)) for name, place in sizes.items()}
        batch = load(REPO / "params.yaml").train.batch_size
        timed = partial(compete, turns=turns, seconds=seconds)
        training = timed({name: partial(our_training, place) for name, place in sizes.items()}, batch)
        loading = timed({name: partial(our_batches, place) for name, place in sizes.items()}, batch)
    found = {"prepare": prepared, "training_images_a_second": training, "batches_images_a_second": loading}
    report("data_scale", found | {"note": "ours_is_times: the rate of the large set in units of this one's"})


def prepare(place: Path, count: int) -> dict[str, Any]:
    """Run the prepare stage on `count` images of noise in `place`: its peak memory and the bytes that it wrote."""
    place.mkdir()
    recipe = (REPO / "params.yaml").read_text()
    (place / "params.yaml").write_text(recipe.replace("source: data/cifar10 ", "source: noise.npz "))
    noise = place / "noise.npz"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(noise, "w") as archive, archive.open("images.npy", "w", force_zip64=True) as file:
        shape = (count, 32, 32, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, count, CHUNK):
            file.write(rng.integers(0, 256, (min(CHUNK, count - start), *shape[1:]), dtype=np.uint8).tobytes())
    environment = {**os.environ, "DVC_ROOT": str(place), "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    process = subprocess.Popen([sys.executable, "-m", "stages.prepare"], cwd=place, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the prepare stage failed")
    noise.unlink()
    written = sum(path.stat().st_size for path in (place / "data").rglob("*.np?"))
    return {"peak_memory_mb": usage.ru_maxrss // 1024, "written_mb": written // 2**20}


def our_training(place: Path) -> Callable[[], object]:
    """The step of the train stage with the default recipe."""
    keep_freed_memory()  # as the stage does
    os.chdir(place)
    return Trainer(trained(load("params.yaml")), Dataset.load(), place / "runs", CPU).step


def our_batches(place: Path) -> Callable[[], object]:
    """What a step reads, alone."""
    os.chdir(place)
    config = load("params.yaml")
    batches = Batches(Dataset.load(), config.train.batch_size, config.seed, flip=config.train.flip, device=CPU)
    steps = iter(range(10**9))
    return lambda: batches(next(steps))


if __name__ == "__main__":
    main()
