"""fd_lite0 during training: of a few EMA samples from the same noise every time, against the first training images.

So few samples bias the distance upwards, at every step alike: the curve shows progress and picks weights, but its
values are no results to quote.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion.config import SampleConfig, TrainConfig, TrainedConfig
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.metrics.extraction import AGAIN, features_of_batch
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import Reference, make_reference
from diffusion.sampling import generation
from diffusion.training.loop import Trainer

REAL = 2048  # training images of the reference
BATCH = 64


class Scorer:
    """fd_lite0 of a trainer's averaged weights; the ranks share the samples, and each gets the value of all of them."""

    def __init__(self, config: TrainedConfig, data: Dataset, folder: Path, device: torch.device) -> None:
        """`folder` keeps the reference of the training images, which a resumed training reads again."""
        self.extractor = EfficientNetLite0().to(device)
        self.config, self.folder, self.device = config.train, folder, device
        self.images = data.read(data.train[:REAL]).cpu().numpy()
        self._reference: Reference | None = None

    def __call__(self, trainer: Trainer) -> float:
        from diffusion.metrics.moments import Moments

        world, count = trainer.world, self.config.evaluate_images
        config = preview_config(self.config, count, min(count, generation.CPU_BATCH))
        found, mine, denoiser = Moments(self.extractor.dim), world.share(count), trainer.denoiser()
        for batch in generation.generate(denoiser, config, trainer.config.seed, mine, self.device) if mine else ():
            for part in batch.split(BATCH):
                found.update(features_of_batch(part.numpy(), self.extractor, self.device))
        found.sync(should_sync=world.size > 1)
        value = world.together(lambda: found.distance(self.reference()) if world.is_main else 0.0)
        return float(world.broadcast(value))

    def reference(self) -> Reference:
        """Of the training images; computed when it is first asked for, then read from the training's folder.

        A file that does not serve (torn, of another version's features) is replaced, with one line that says why.
        """
        if self._reference is None:
            path, about = self.folder / "fd_lite0.npz", self.extractor.describe()
            try:
                if path.exists():
                    self._reference = Reference.load(path, about, images=len(self.images))
            except UserError as error:
                reason = str(error).removesuffix(f": {AGAIN}")
                tqdm.write(f"the reference of fd_lite0 is made anew ({reason})", file=sys.stderr)
            if self._reference is None:
                self._reference = make_reference(self.images, "training", self.extractor, BATCH, self.device)
                self._reference.save(path)
        return self._reference


def preview_config(config: TrainConfig, images: int | None = None, batch_size: int | None = None) -> SampleConfig:
    """How previews are sampled: few deterministic steps, sized by the train section, but for what is given."""
    return SampleConfig(
        sampler="ddim",
        steps=config.preview_steps,
        spacing="trailing",
        eta=0.0,
        variance="fixed_small",
        clip_x0=True,
        guidance=1.0,
        labels="balanced",
        num_images=images or config.preview_images,
        batch_size=batch_size or config.preview_images,
        compile="off",
        save_png=False,
        processes=1,
        device=config.device,
        precision=config.precision,
    )
