"""The reference stage: statistics of real images."""

from pathlib import Path

from diffusion import paths
from diffusion.config import Params
from diffusion.data.dataset import real_images
from diffusion.distributed import joined
from diffusion.metrics.extraction import for_reference, inception_weights, kept_images, reference_images
from diffusion.metrics.reference import make_reference
from diffusion.runtime import keep_freed_memory


def write_references(params: Params, folder: Path = paths.REFERENCE) -> None:
    """The reference stage: reference/fd_lite0.npz, and reference/fid.npz if `evaluate.inception` and the weights allow.

    A file of an earlier run that this one does not write is removed.

    Raises:
        UserError: the split has too few images, fewer images than features are asked for, or Inception is required and
            its weights cannot be had.
    """
    config = params.evaluate
    keep_freed_memory()
    with joined(config.device) as (world, device):
        images = world.together(lambda: real_images(config.reference_split))
        weights = world.broadcast(world.together(lambda: inception_weights(config) if world.is_main else None))
        extractors = world.together(lambda: for_reference(config, weights, len(images), speak=world.is_main))
        if world.is_main:
            (folder / "fid.npz").unlink(missing_ok=True)
        for extractor in extractors:
            chosen, split = images[: reference_images(config, extractor)], config.reference_split
            keep = kept_images(config, len(chosen))
            reference = make_reference(chosen, split, extractor, config.batch_size, device, world, keep=keep)
            if world.is_main:
                reference.save(folder / f"{extractor.metric}.npz")
