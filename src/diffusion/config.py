"""The sections of params.yaml as frozen pydantic models, each with its ranges and the rules between its keys.

Every key of params.yaml is a field here and every number lives there: the models have no defaults.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffusion import rules
from diffusion.errors import UserError

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrOff = Annotated[int, Field(ge=0, le=10**9)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["linear", "cosine", "sigmoid", "edm"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
Measure = Literal["frechet", "kid", "precision_recall", "copies", "infinity"]
Processes = Annotated[int, Field(ge=1, le=64)]


class Section(BaseModel):
    """What all sections are: no unknown keys, and values that stay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        for problem in self.broken():
            raise ValueError(problem)
        return self

    def broken(self) -> Iterator[str]:
        """One line for each rule between keys that the values break: the keys, and what to do."""
        yield from ()


class DataConfig(Section):
    source: str
    path: str | None
    sources: tuple[Literal["local", "mirrors", "npm", "official"], ...]
    fit: Literal["refuse", "crop", "pad", "stretch"]
    labels: Literal["auto", "prefix"]
    max_pixels: int = Field(ge=1, le=10**10)
    val_images: int = Field(ge=1, le=40_000)

    def broken(self) -> Iterator[str]:
        if not self.sources:
            yield "data.sources is empty: name at least one of local, mirrors, npm, official"
        if self.path is not None and "local" not in self.sources:
            yield "data.path is set but data.sources lacks local: add it, or set data.path: null"
        if self.source.startswith("~"):
            home = os.path.expanduser(self.source)  # noqa: PTH111
            yield f"data.source = {self.source}: DVC, which hashes the images, does not know ~: write {home}"


class DiffusionConfig(Section):
    schedule: Schedule
    num_steps: int = Field(ge=2, le=100_000)
    zero_terminal_snr: bool
    prediction: Literal["eps", "x0", "v", "edm"]

    def broken(self) -> Iterator[str]:
        if self.zero_terminal_snr and self.prediction == "eps":
            yield "diffusion.zero_terminal_snr leaves nothing to predict x0 from with prediction eps: use v, x0 or edm"


class ModelConfig(Section):
    image_size: int = Field(ge=4, le=1024)
    image_channels: int = Field(ge=1, le=4)
    patch_size: Literal[1, 2, 4]
    channels: int = Field(ge=8, le=1024)
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...]
    num_blocks: int = Field(ge=1, le=8)
    attention_resolutions: tuple[Annotated[int, Field(ge=1, le=1024)], ...]
    head_channels: int | None = Field(ge=8, le=1024)
    downsample: Literal["symmetric", "same"]
    upsample: Literal["conv", "shuffle"]
    norm_groups: int = Field(ge=1, le=128)
    dropout: Fraction
    num_classes: int | None = Field(ge=1, le=100_000)
    augment: Fraction

    def broken(self) -> Iterator[str]:
        if not self.multipliers:
            yield "model.multipliers is empty: give one whole number a level, for example [1, 2, 2]"
        stride = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if self.image_size % stride:
            yield (
                f"model.multipliers has {len(self.multipliers)} levels, which with model.patch_size = "
                f"{self.patch_size} divides model.image_size = {self.image_size} by {stride}: use fewer levels, or "
                "another size"
            )
        sizes = [self.image_size // self.patch_size // 2**level for level in range(len(self.multipliers))]
        for size in self.attention_resolutions:
            if size not in sizes:
                yield f"model.attention_resolutions = {size}: the levels' feature maps have the sizes {sizes}"
        for width in {self.channels * m for m in self.multipliers}:
            if self.head_channels and width % self.head_channels:
                yield (
                    f"model.head_channels = {self.head_channels} does not divide a level's width of {width}: "
                    "change it, or null for one head"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_channels, self.image_size, self.image_size


class TrainConfig(Section):
    steps: Count
    batch_size: int = Field(ge=1, le=65_536)
    optimizer: Literal["adamw", "muon"]
    lr: float = Field(ge=1e-8, le=1.0)
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: CountOrOff
    weight_decay: Fraction
    adam_beta2: float = Field(ge=0.5, le=0.99999)
    grad_clip: float = Field(ge=1e-6, le=1e6)
    ema_decay: float = Field(ge=0.0, le=0.999999)
    loss_weight: Literal["simple", "min_snr", "own"]
    timesteps: Literal["uniform", "stratified", "lognormal"]
    flip: bool
    label_dropout: Fraction
    device: Device
    precision: Precision
    micro_batch: int | None = Field(ge=1, le=65_536)
    compile: Compile
    processes: Processes
    log_every: Count
    validate_every: Count
    evaluate_every: CountOrOff
    evaluate_images: int = Field(ge=2, le=50_000)
    best_by: Literal["val_loss", "fd_lite0", "last"]
    preview_every: Count
    preview_images: int = Field(ge=1, le=1024)
    preview_steps: int = Field(ge=1, le=1000)
    checkpoint_every: Count

    def broken(self) -> Iterator[str]:
        if self.processes > self.batch_size:
            yield (
                f"train.processes = {self.processes} is more than train.batch_size = {self.batch_size}, "
                "which they share: lower it"
            )
        if self.warmup_steps > self.steps:
            yield (
                f"train.warmup_steps = {self.warmup_steps} is more than train.steps = {self.steps}, so train.lr would "
                "never be reached: lower it"
            )
        if self.best_by == "fd_lite0" and not self.evaluate_every:
            yield "train.best_by = fd_lite0 needs values of it: set train.evaluate_every, or train.best_by: val_loss"


class TrainedConfig(Section):
    """The sections that decide what a trained model is; its JSON card carries them."""

    seed: Seed
    diffusion: DiffusionConfig
    model: ModelConfig
    train: TrainConfig

    @property
    def guidable(self) -> bool:
        """Whether the network was also trained without classes, as guidance asks it."""
        return self.model.num_classes is not None and self.train.label_dropout > 0


class ImportedConfig(Section):
    """What is known of a model that was trained elsewhere, in the place of TrainedConfig."""

    diffusion: DiffusionConfig
    model: ModelConfig
    guidable: bool


class SampleConfig(Section):
    sampler: Literal["ddpm", "ddim", "heun", "dpmpp_2m", "unipc"]
    steps: int = Field(ge=1, le=100_000)
    spacing: Literal["uniform", "quadratic", "trailing", "logsnr", "karras"]
    eta: Fraction
    variance: Literal["fixed_small", "fixed_large"]
    clip_x0: bool
    guidance: float = Field(ge=0.0, le=100.0)
    labels: Literal["balanced"] | tuple[Annotated[int, Field(ge=0, le=100_000)], ...]
    num_images: Count
    batch_size: int | None = Field(ge=1, le=65_536)
    compile: Compile
    save_png: bool
    processes: Processes
    device: Device
    precision: Precision

    def broken(self) -> Iterator[str]:
        if not self.labels:
            yield "sample.labels is empty: give balanced, or at least one class"


class EvaluateConfig(Section):
    reference_split: Literal["train", "test"]
    reference_images: int = Field(ge=2, le=10**9)
    inception: Literal["auto", "local", "require", "off"]
    inception_weights: str | None
    inception_images: int = Field(ge=2, le=10**9)
    measures: tuple[Measure, ...]
    repeats: int = Field(ge=1, le=1000)
    kept_features: int = Field(ge=2, le=10**9)
    precision: Literal["fp32", "bf16"]
    batch_size: int = Field(ge=1, le=65_536)
    processes: Processes
    device: Device

    def broken(self) -> Iterator[str]:
        if not self.measures:
            yield "evaluate.measures is empty: name at least one of frechet, kid, precision_recall, copies, infinity"


class TuneConfig(Section):
    trials: Count
    workers: Processes
    images_per_trial: Count
    sample_images: int = Field(ge=2, le=50_000)
    sampler: Literal["tpe", "random", "gp"]
    pruner: Literal["median", "hyperband", "none"]
    storage: str | None
    seed: Seed | None
    space: dict[str, Any]  # dotted key -> description: tuning/space.py reads it


class TrackingConfig(Section):
    enabled: bool
    experiment: str


class Params(Section):
    """The whole of params.yaml: one section a stage or noun."""

    seed: Seed
    data: DataConfig
    diffusion: DiffusionConfig
    model: ModelConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    tune: TuneConfig
    tracking: TrackingConfig

    def broken(self) -> Iterator[str]:
        return rules.broken(self)


def trained(params: Params) -> TrainedConfig:
    """The part of params.yaml that a trained model depends on."""
    return TrainedConfig(seed=params.seed, diffusion=params.diffusion, model=params.model, train=params.train)


def trained_from_dict(tree: Mapping[str, Any]) -> TrainedConfig | ImportedConfig:
    """What a model's card says that it was trained with, as far as that is known.

    Raises:
        UserError: the card was written by another version of this project.
    """
    try:
        return (TrainedConfig if "train" in tree else ImportedConfig).model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"the model's config does not fit this version ({reason}): train it again") from None


def flat(config: Section, section: str = "") -> dict[str, object]:
    """Dotted key -> plain value of all that `config` holds; a section's keys begin with its name, if that is given."""
    found: dict[str, object] = {}
    for name, value in config.model_dump(mode="json").items():
        key = f"{section}.{name}" if section else name
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return found
