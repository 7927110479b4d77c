"""What a trial is scored by: two numbers that mean the same whatever is searched.

The validation loss of a training does not: the noise schedule and the prediction decide how hard its images are to
denoise. `common_error` (cheap, during a trial) gives every network the same noisy images. `score` (at its end) looks
at samples. benchmarks/tune_rank.py measures how well each foretells the result of a whole training.
"""

import torch

from diffusion import paths
from diffusion.config import Params
from diffusion.metrics.extraction import features_of_batch
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import Reference
from diffusion.model.parameterization import SIGMA_DATA
from diffusion.model.process import column
from diffusion.runtime import autocast, generator
from diffusion.sampling.generation import generate
from diffusion.training.loop import Trainer
from diffusion.training.loss import LOG_SIGMA_MEAN, LOG_SIGMA_STD
from diffusion.training.scoring import preview_config

IMAGES = 512  # of the validation images
BATCH = 128


def common_error(trainer: Trainer) -> float:
    """EDM's loss (Karras et al. 2022, eq. 8 and table 1) of the EMA weights, whatever they were trained with.

    Each of IMAGES validation images has one noise and one sigma, a quantile of EDM's log-normal distribution: the same
    for all trainings of a data set. The network sees x_t of exactly that signal-to-noise ratio, and is told the nearest
    step of its schedule. Errors of x0 are weighted as EDM does, so that a network that knows nothing has about 1.
    """
    x0 = trainer.val[:IMAGES]
    source = generator(0, "common error")
    quantiles = (torch.randperm(len(x0), generator=source).double() + 0.5) / len(x0)
    log_sigma = LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.special.ndtri(quantiles)
    eps = torch.randn(x0.shape, generator=source)
    # The error of x0 over c_out^2 = (sigma sigma_data)^2 / (sigma^2 + sigma_data^2).
    weights = torch.exp(-2 * log_sigma) + SIGMA_DATA**-2
    total = 0.0
    for start in range(0, len(x0), BATCH):
        part = slice(start, start + BATCH)
        given = {name: value[part] for name, value in trainer.val_given.items()}
        errors = _x0_errors(trainer, x0[part], log_sigma[part], eps[part].to(x0.device), **given)
        total += float((weights[part] * errors).sum())
    return total / len(x0)


def load_reference(params: Params, extractor: EfficientNetLite0) -> Reference:
    """Moments of the real images that the evaluate section names; UserError if the reference stage has to make them."""
    config = params.evaluate
    expected = {"split": config.reference_split, "images": config.reference_images}
    return Reference.load(paths.REFERENCE / f"{extractor.metric}.npz", extractor.describe(), **expected)


def samples(trainer: Trainer, params: Params) -> torch.Tensor:
    """uint8 (tune.sample_images, H, W, C) by the EMA weights that the trial kept.

    Sampled as previews are, from the same noise in every trial.
    """
    config = preview_config(trainer.config.train)
    config = config.model_copy(update={"num_images": params.tune.sample_images, "batch_size": params.sample.batch_size})
    trainer.ema.net.load_state_dict(trainer.best)
    batches = generate(trainer.denoiser(), config, trainer.config.seed, range(config.num_images), trainer.device)
    return torch.cat([*batches])


def score(
    images: torch.Tensor, params: Params, reference: Reference, extractor: EfficientNetLite0, device: torch.device
) -> float:
    """fd_lite0 of a trial's images.

    So few images bias the distance upwards, in all trials alike: it ranks them and is not a result to quote.
    """
    from diffusion.metrics.moments import Moments

    extractor.to(device)
    moments = Moments(extractor.dim)
    for batch in images.split(params.evaluate.batch_size):
        moments.update(features_of_batch(batch.numpy(), extractor, device))
    return moments.distance(reference)


@torch.inference_mode()
def _x0_errors(
    trainer: Trainer, x0: torch.Tensor, log_sigma: torch.Tensor, eps: torch.Tensor, **given: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of x0 for each image at its own sigma = s / a, float64 (B,) on the CPU."""
    a, s = column(torch.sigmoid(-2 * log_sigma).sqrt(), x0), column(torch.sigmoid(2 * log_sigma).sqrt(), x0)
    table = -trainer.schedule.log_ratio().cpu()  # ascending
    t = torch.searchsorted((table[1:] + table[:-1]) / 2, log_sigma.contiguous()).to(x0.device)
    x_t, way = a * x0 + s * eps, trainer.loss.parameterization
    with autocast(x0.device, trainer.dtype):
        output = trainer.ema.net(way.net_input(x_t, a, s), t, **given).float()
    return (way.x0(output, x_t, a, s) - x0).square().mean(dim=(1, 2, 3)).double().cpu()
