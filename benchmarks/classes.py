"""Does a conditional model draw the class that is asked for, and what does guidance cost?

params/conditional.yaml is trained; a linear classifier on EfficientNet-Lite0's features of 10,000 real images, checked
on 2,000 test images, then judges balanced samples at several guidances, which are scored as fd_lite0 too.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from laptop_quality import REFERENCE
from machine import report
from torch import Tensor, nn

from diffusion.config import trained
from diffusion.data.dataset import Dataset, real_images
from diffusion.metrics import Moments
from diffusion.metrics.extraction import features_of_batch
from diffusion.metrics.features import EfficientNetLite0
from diffusion.params_file import load
from diffusion.paths import CIFAR10_TEST, TRAIN_LABELS
from diffusion.runtime import keep_freed_memory, resolve_device
from diffusion.sampling import generation, panels
from diffusion.training.loop import Trainer, train

RECIPE = "params/conditional.yaml"
TEST_IMAGES = 2000


@click.command()
@click.option("--samples", default=1000, show_default=True, help="Images at each guidance.")
@click.option("--steps", type=int, help="Of training.  [default: as the recipe says]")
def main(samples: int, steps: int | None) -> None:
    """Train, sample, classify, score; write results/classes.json."""
    keep_freed_memory()
    params = load(RECIPE, {} if steps is None else {"train.steps": steps})
    device = resolve_device(params.train.device)
    judge = Judge(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trained(params), Dataset.load(), Path(folder), device)
        for record in train(trainer):
            if record.step % 500 == 0:
                click.echo(f"step {record.step} of {params.train.steps}", err=True)
    trainer.ema.net.load_state_dict(trainer.best)
    result: dict[str, Any] = {}
    for guidance in panels.GUIDANCES:
        config = params.sample.model_copy(update={"guidance": guidance})
        drawn = torch.cat([*generation.generate(trainer.denoiser(), config, params.seed, range(samples), device)])
        labels = generation.labels_of(config, params.model.num_classes, range(samples))
        assert labels is not None
        result[f"guidance {guidance:g}"] = judge(drawn, labels)
        click.echo(f"guidance {guidance:g}: {result[f'guidance {guidance:g}']}", err=True)
    found = {"real test images": {"accuracy": judge.accuracy_on_test_images()}, **result}
    seen = trainer.progress.step * params.train.batch_size
    report("classes", {"recipe": RECIPE, "images_seen": seen, "samples": samples, "chance": 0.1, **found})


class Judge:
    """A linear classifier of real images by their features, and their Gaussian."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.extractor = device, EfficientNetLite0().to(device)
        features = self.features(torch.from_numpy(np.array(real_images("train")[:REFERENCE])))
        labels = torch.from_numpy(np.load(TRAIN_LABELS)[:REFERENCE].astype(np.int64))
        self.real = moments(features)
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.linear = fitted((features - self.mean) / self.std, labels)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and fd_lite0 of uint8 images (N, H, W, C)."""
        features = self.features(images)
        distance = moments(features).distance(self.real)
        return {"accuracy": self.accuracy(features, labels), "fd_lite0": round(distance, 1)}

    def features(self, images: Tensor) -> Tensor:
        """float32 (N, 1280)."""
        return torch.cat(
            [features_of_batch(batch.numpy(), self.extractor, self.device).cpu() for batch in images.split(100)]
        )

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of `features` that the classifier gives their label."""
        with torch.no_grad():
            answers = self.linear((features - self.mean) / self.std).argmax(dim=1)
        return round(float((answers == labels).float().mean()), 3)

    def accuracy_on_test_images(self) -> float:
        """The classifier's own: no sample can be expected to do much better."""
        with np.load(CIFAR10_TEST) as archive:
            images, labels = archive["images"][:TEST_IMAGES], archive["labels"][:TEST_IMAGES]
        return self.accuracy(self.features(torch.from_numpy(images)), torch.from_numpy(labels.astype(np.int64)))


def moments(features: Tensor) -> Moments:
    """Mean and covariance."""
    found = Moments(features.shape[1])
    found.update(features)
    return found


def fitted(features: Tensor, labels: Tensor) -> nn.Linear:
    """Multinomial logistic regression with weight decay, by L-BFGS."""
    torch.manual_seed(0)
    linear = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * linear.weight.square().sum()
        loss = nn.functional.cross_entropy(linear(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


if __name__ == "__main__":
    main()
