"""The sections of params.yaml as frozen dataclasses, which the library takes; params_file.py reads and checks it.

Every key of params.yaml is a field here and every number lives there: the dataclasses have no defaults.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from diffusion.errors import UserError


@dataclass(frozen=True)
class Range:
    """Closed interval of allowed values, read by pydantic and printed in error messages."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), "ge": self.low, "le": self.high}

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


Seed = Annotated[int, Range(0, 2**63 - 1)]
Count = Annotated[int, Range(1, 10**9)]
CountOrOff = Annotated[int, Range(0, 10**9)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Schedule = Literal["linear", "cosine", "sigmoid", "edm"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
Measure = Literal["frechet", "kid", "precision_recall", "copies", "infinity"]
Processes = Annotated[int, Range(1, 64)]


@dataclass(frozen=True)
class DataConfig:
    source: str
    path: str | None
    sources: tuple[Literal["local", "mirrors", "npm", "official"], ...]
    val_images: Annotated[int, Range(10, 40_000)]


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Schedule
    num_steps: Annotated[int, Range(2, 100_000)]
    zero_terminal_snr: bool
    prediction: Literal["eps", "x0", "v", "edm"]


@dataclass(frozen=True)
class ModelConfig:
    image_size: Annotated[int, Range(4, 1024)]
    image_channels: Annotated[int, Range(1, 4)]
    patch_size: Literal[1, 2, 4]
    channels: Annotated[int, Range(8, 1024)]
    multipliers: tuple[Annotated[int, Range(1, 16)], ...]
    num_blocks: Annotated[int, Range(1, 8)]
    attention_resolutions: tuple[Annotated[int, Range(1, 1024)], ...]
    head_channels: Annotated[int, Range(8, 1024)] | None
    downsample: Literal["symmetric", "same"]
    upsample: Literal["conv", "shuffle"]
    norm_groups: Annotated[int, Range(1, 128)]
    dropout: Fraction
    num_classes: Annotated[int, Range(1, 100_000)] | None
    augment: Fraction

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_channels, self.image_size, self.image_size


@dataclass(frozen=True)
class TrainConfig:
    steps: Count
    batch_size: Annotated[int, Range(1, 65_536)]
    optimizer: Literal["adamw", "muon"]
    lr: Annotated[float, Range(1e-8, 1.0)]
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: CountOrOff
    weight_decay: Fraction
    adam_beta2: Annotated[float, Range(0.5, 0.99999)]
    grad_clip: Annotated[float, Range(1e-6, 1e6)]
    ema_decay: Annotated[float, Range(0.0, 0.999999)]
    loss_weight: Literal["simple", "min_snr", "own"]
    timesteps: Literal["uniform", "stratified", "lognormal"]
    flip: bool
    label_dropout: Fraction
    device: Device
    precision: Precision
    micro_batch: Annotated[int, Range(1, 65_536)] | None
    compile: Compile
    processes: Processes
    log_every: Count
    validate_every: Count
    evaluate_every: CountOrOff
    evaluate_images: Annotated[int, Range(2, 50_000)]
    best_by: Literal["val_loss", "fd_lite0", "last"]
    preview_every: Count
    preview_images: Annotated[int, Range(1, 1024)]
    preview_steps: Annotated[int, Range(1, 1000)]
    checkpoint_every: Count


@dataclass(frozen=True)
class TrainedConfig:
    """The sections that decide what a trained model is; its JSON card carries them."""

    seed: Seed
    diffusion: DiffusionConfig
    model: ModelConfig
    train: TrainConfig


@dataclass(frozen=True)
class SampleConfig:
    sampler: Literal["ddpm", "ddim", "heun", "dpmpp_2m", "unipc"]
    steps: Annotated[int, Range(1, 100_000)]
    spacing: Literal["uniform", "quadratic", "trailing", "logsnr", "karras"]
    eta: Fraction
    variance: Literal["fixed_small", "fixed_large"]
    clip_x0: bool
    guidance: Annotated[float, Range(0.0, 100.0)]
    labels: Literal["balanced"] | tuple[Annotated[int, Range(0, 100_000)], ...]
    num_images: Count
    batch_size: Annotated[int, Range(1, 65_536)] | None
    compile: Compile
    save_png: bool
    processes: Processes
    device: Device
    precision: Precision


@dataclass(frozen=True)
class EvaluateConfig:
    reference_split: Literal["train", "test"]
    reference_images: Annotated[int, Range(2, 10**9)]
    inception: Literal["auto", "local", "require", "off"]
    inception_weights: str | None
    inception_images: Annotated[int, Range(2, 10**9)]
    measures: tuple[Measure, ...]
    repeats: Annotated[int, Range(1, 1000)]
    kept_features: Annotated[int, Range(2, 10**9)]
    precision: Literal["fp32", "bf16"]
    batch_size: Annotated[int, Range(1, 65_536)]
    processes: Processes
    device: Device


@dataclass(frozen=True)
class TuneConfig:
    trials: Count
    workers: Processes
    images_per_trial: Count
    sample_images: Annotated[int, Range(2, 50_000)]
    sampler: Literal["tpe", "random", "gp"]
    pruner: Literal["median", "hyperband", "none"]
    storage: str | None
    seed: Seed | None
    space: dict[str, Any]  # dotted key -> description: tuning/space.py reads it


@dataclass(frozen=True)
class TrackingConfig:
    enabled: bool
    experiment: str


@dataclass(frozen=True)
class Params:
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


def trained(params: Params) -> TrainedConfig:
    """The part of params.yaml that a trained model depends on."""
    return TrainedConfig(params.seed, params.diffusion, params.model, params.train)


def trained_from_dict(tree: Mapping[str, Any]) -> TrainedConfig:
    """Inverse of `to_dict` for a model's card, which was validated when it was written.

    Raises:
        UserError: the card was written by another version of this project.
    """
    try:
        return TrainedConfig(
            tree["seed"],
            section_from_dict(DiffusionConfig, tree["diffusion"]),
            section_from_dict(ModelConfig, tree["model"]),
            section_from_dict(TrainConfig, tree["train"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the model's config does not fit this version ({error}): train it again") from None


def section_from_dict(kind: Any, values: Mapping[str, Any]) -> Any:
    """A section's dataclass from the values that `to_dict` made of it; nothing is checked."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values (JSON types) of a config dataclass: the inverse of `from_dict`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def flat(config: Any, section: str = "") -> dict[str, object]:
    """Dotted key -> value of a config dataclass; a section's keys begin with its name, which has to be given."""
    found: dict[str, object] = {}
    for name, value in to_dict(config).items():
        key = f"{section}.{name}" if section else name
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return found
