"""Rules between sections of params.yaml; those between the keys of one section stand with it in config.py."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.config import DiffusionConfig, Params, SampleConfig

FEW_STEPS = 500  # for fixed_large
COARSE_STEPS = 50  # for multistep solvers that end with a long step
DIMS = {"fid": 2048, "fd_lite0": 1280}  # features of an image, by the distance in their space
INFINITY_ROWS = 5  # samples a feature, at least, for the distance at infinity (metrics/frechet.py says why)


def broken(params: "Params") -> Iterator[str]:
    """One line for each rule that `params` break: the keys, and what to do."""
    yield from _diffusion(params)
    yield from _classes(params)
    yield from _evaluation(params)


def doubtful(sample: "SampleConfig", diffusion: "DiffusionConfig") -> Iterator[str]:
    """One line for each pair of keys that is allowed and known to work badly, or to do nothing."""
    if sample.sampler == "ddpm" and sample.variance == "fixed_large" and sample.steps < FEW_STEPS:
        yield (
            f"sample.variance = fixed_large leaves noise in the images with {sample.steps} steps (published for 100: "
            "FID 46.5 against 11.2 with fixed_small)"
        )
    if sample.sampler in ("dpmpp_2m", "unipc") and sample.spacing == "uniform" and sample.steps < COARSE_STEPS:
        yield (
            f"sample.spacing = uniform makes the last step of {sample.sampler} so long that it overshoots with "
            f"{sample.steps} steps: use trailing"
        )
    if diffusion.prediction == "eps" and diffusion.schedule != "linear" and not sample.clip_x0:
        yield (
            f"sample.clip_x0 = false: the {diffusion.schedule} schedule leaves so little signal at its end that errors "
            "of eps become huge errors of x0; only clipping bounds them"
        )
    if sample.eta and sample.sampler != "ddim":
        yield f"sample.eta = {sample.eta:g} is of ddim alone: {sample.sampler} ignores it"


def _diffusion(params: "Params") -> Iterator[str]:
    num_steps = params.diffusion.num_steps
    for key, steps in (("sample.steps", params.sample.steps), ("train.preview_steps", params.train.preview_steps)):
        if steps > num_steps:
            yield f"{key} = {steps} is more than diffusion.num_steps = {num_steps}: lower it"
    if params.diffusion.zero_terminal_snr and params.train.loss_weight == "min_snr":
        yield (
            "train.loss_weight = min_snr gives no weight to the step without signal that diffusion.zero_terminal_snr "
            "makes, where sampling begins: use simple or own"
        )
    if params.diffusion.zero_terminal_snr and params.train.timesteps == "lognormal":
        yield (
            "train.timesteps = lognormal never draws the step without signal that diffusion.zero_terminal_snr makes, "
            "where sampling begins: use stratified or uniform"
        )


def _classes(params: "Params") -> Iterator[str]:
    classes, sample, dropout = params.model.num_classes, params.sample, params.train.label_dropout
    if classes is not None and sample.guidance != 1.0 and dropout == 0.0:
        yield (
            f"sample.guidance = {sample.guidance:g} needs a network that knows images without a class: set "
            "train.label_dropout above 0 (0.1 is usual), or guidance to 1"
        )
    if classes is not None and dropout == 1.0:
        yield "train.label_dropout = 1 hides every class from the network: lower it"
    if classes is None and (sample.guidance != 1.0 or sample.labels != "balanced"):
        yield "sample.guidance and sample.labels need classes: set model.num_classes (CIFAR-10: 10)"
    if classes is not None and sample.labels != "balanced" and not all(label < classes for label in sample.labels):
        yield f"sample.labels = {list(sample.labels)}: there are classes 0 to {classes - 1} (model.num_classes)"


def _evaluation(params: "Params") -> Iterator[str]:
    config, samples = params.evaluate, params.sample.num_images
    if 1 < config.repeats > samples // 2:
        yield f"evaluate.repeats = {config.repeats} blocks of sample.num_images = {samples} have fewer than 2: lower it"
    each, required = samples // config.repeats, config.inception == "require"
    if required and "frechet" in config.measures and each < DIMS["fid"]:
        yield (
            f"evaluate.inception = require: FID needs at least {DIMS['fid']} samples a block, and sample.num_images = "
            f"{samples} in evaluate.repeats = {config.repeats} is {each}: raise it, or take frechet out of "
            "evaluate.measures (kid is unbiased for few)"
        )
    found = {"fd_lite0": min(samples, config.kept_features)}
    if required:
        found["fid"] = min(found["fd_lite0"], config.repeats * config.inception_images)
    for metric, count in found.items():
        if "infinity" in config.measures and count < INFINITY_ROWS * DIMS[metric]:
            yield (
                f"evaluate.measures has infinity, which needs {INFINITY_ROWS * DIMS[metric]} samples for {metric}, and "
                f"{count} keep their features: raise sample.num_images and evaluate.kept_features"
                f"{' and evaluate.inception_images' if metric == 'fid' else ''}, or take it out"
            )
