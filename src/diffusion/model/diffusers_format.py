"""Models from and to Hugging Face diffusers: a pipeline folder with a UNet2DModel and its scheduler, as safetensors.

    python -m diffusion interchange write FOLDER      models/model.safetensors as a diffusers pipeline
    python -m diffusion interchange read FOLDER       the pipeline as models/model.safetensors, for the sample stage

Nothing of diffusers is needed for either. In Python: `DDPMPipeline.from_pretrained(FOLDER)`.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from diffusion import paths
from diffusion.atomic import replacing, write_json
from diffusion.config import DiffusionConfig, ImportedConfig, ModelConfig, TrainedConfig
from diffusion.errors import UserError
from diffusion.model.diffusers_layers import DEFAULTS, SHAPE, UNET_FIXED, joined, layers, split
from diffusion.model.model_file import load_model, save_model
from diffusion.model.schedules import SCHEDULES, configured_schedule, make_schedule, without_terminal_signal
from diffusion.model.unet import UNet
from diffusion.params_file import Kind, checked

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
WEIGHTS, SCHEDULER = "diffusion_pytorch_model.safetensors", "scheduler_config.json"
NO_CLASS = "_last_class_is_none"  # in config.json if an embedding stands for no class: whether it was trained
CLASSES = "class_embedding.weight"


def write_pipeline(net: UNet, config: TrainedConfig | ImportedConfig, folder: Path) -> None:
    """Write `folder` as a diffusers DDPMPipeline: model_index.json, unet/ and scheduler/.

    Raises:
        UserError: the network, or what it predicts, has no counterpart there.
    """
    unet, scheduler = unet_config(config.model), scheduler_config(config.diffusion)
    if config.model.num_classes:
        unet[NO_CLASS] = config.guidable
    state = net.state_dict()
    weights = {theirs: part for ours, theirs in layers(net) for theirs, part in split(ours, theirs, state)}
    for name, content in (("unet", unet), ("scheduler", scheduler)):
        file = "config.json" if name == "unet" else "scheduler_config.json"
        write_json(folder / name / file, content)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with replacing(folder / "unet" / WEIGHTS) as written:
        written.write(save(tensors))
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    write_json(folder / "model_index.json", index)


def read_pipeline(folder: Path) -> tuple[UNet, ImportedConfig]:
    """The network of a diffusers pipeline folder, perhaps with all files in one, and what is known of it.

    All classes of a foreign network are classes here; to be of none then adds nothing, and was never trained.

    Raises:
        UserError: a file is missing or damaged, or the network is of another kind.
    """
    weights = _weights(folder)
    place = weights.parent
    beside = [place / SCHEDULER, place.parent / "scheduler" / SCHEDULER]
    try:
        unet = DEFAULTS | json.loads((place / "config.json").read_text())
        found = load_file(weights)
        scheduler = json.loads(next((file for file in beside if file.exists()), beside[1]).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a diffusers pipeline with safetensors ({error})") from None
    net = UNet(model_config(unet))
    if NO_CLASS not in unet and CLASSES in found:
        found[CLASSES] = torch.nn.functional.pad(found[CLASSES], (0, 0, 0, 1))
    try:
        net.load_state_dict({ours: joined(ours, theirs, found) for ours, theirs in layers(net)})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{weights} does not fit its config.json ({' '.join(str(error).split())[:200]})") from None
    if found:
        raise UserError(f"{weights} has {min(found)}, of which its config.json knows nothing")
    diffusion, guidable = diffusion_config(scheduler), unet.get(NO_CLASS) is True
    known = ImportedConfig(diffusion=diffusion, model=net.config, guidable=guidable)
    return net.eval().requires_grad_(False), known


def _weights(folder: Path) -> Path:
    """Raises UserError if a pipeline's weights are a pickle."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    pickled = place / WEIGHTS.replace(".safetensors", ".bin")
    if pickled.exists() and not (place / WEIGHTS).exists():
        raise UserError(
            f"{pickled} is a pickle, which can run any code: with diffusers, where you trust it, UNet2DModel"
            f".from_pretrained({str(place)!r}).save_pretrained({str(place)!r}) writes {WEIGHTS}"
        )
    return place / WEIGHTS


def unet_config(model: ModelConfig) -> dict[str, Any]:
    """Config.json of the UNet2DModel that computes the same.

    Raises:
        UserError: there is none.
    """
    for key, only in (("patch_size", 1), ("upsample", "conv"), ("augment", 0.0)):
        if getattr(model, key) != only:
            raise UserError(f"diffusers' UNet2DModel has no model.{key} = {getattr(model, key)}, only {only}")
    widths = [model.channels * m for m in model.multipliers]
    for width in widths:
        if width % model.norm_groups:
            raise UserError(f"diffusers' UNet2DModel wants model.norm_groups = {model.norm_groups} to divide {width}")
    attends = [model.image_size // 2**level in model.attention_resolutions for level in range(len(widths))]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": model.image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_blocks,
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "attention_head_dim": model.head_channels,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
        "downsample_padding": 0 if model.downsample == "same" else 1,
        "num_class_embeds": model.num_classes + 1 if model.num_classes else None,
        **UNET_FIXED,
    }


def model_config(unet: dict[str, Any]) -> ModelConfig:
    """Inverse of `unet_config`.

    Raises:
        UserError: this U-Net cannot compute what that one does.
    """
    if missing := [key for key in SHAPE if unet.get(key) is None]:
        raise UserError(f"config.json: {missing[0]} is missing")
    widths, kinds = unet["block_out_channels"], unet["down_block_types"]
    size, classes = _side(unet["sample_size"]), unet["num_class_embeds"]
    if unet["out_channels"] != unet["in_channels"]:
        raise UserError(f"config.json: out_channels = {unet['out_channels']!r} is not in_channels: cannot be read")
    if any(width % widths[0] for width in widths) or not set(kinds) <= {"DownBlock2D", "AttnDownBlock2D"}:
        raise UserError(f"config.json: levels {kinds} of {widths} channels cannot be read")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    for key, value in {**UNET_FIXED, "up_block_types": mirrored}.items():
        if unet[key] != value:
            raise UserError(f"config.json: {key} = {unet[key]!r}; only {value!r} can be read")
    values = {
        "image_size": size,
        "image_channels": unet["in_channels"],
        "patch_size": 1,
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "num_blocks": unet["layers_per_block"],
        "attention_resolutions": [size // 2**i for i, kind in enumerate(kinds) if "Attn" in kind],
        "head_channels": unet["attention_head_dim"],
        "upsample": "conv",
        "downsample": "same" if unet["downsample_padding"] == 0 else "symmetric",
        "norm_groups": unet["norm_num_groups"],
        "dropout": unet["dropout"],
        "num_classes": classes - 1 if NO_CLASS in unet and isinstance(classes, int) else classes,
        "augment": 0.0,
    }
    return _checked("config.json", ModelConfig, values)


def _side(sample_size: Any) -> int:
    """Of square images: a number, or diffusers' pair of equal ones."""
    sides = {*sample_size} if isinstance(sample_size, list) else {sample_size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"config.json: sample_size = {sample_size!r}: only square images can be read")
    return side


def _checked(file: str, kind: type[Kind], values: dict[str, Any]) -> Kind:
    """As a section of params.yaml: another file's values must be what that may hold."""
    try:
        return checked(kind, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """scheduler_config.json of the DDPMScheduler with the same betas, which other diffusers schedulers read too.

    Raises:
        UserError: the prediction has no counterpart there.
    """
    if diffusion.prediction not in PREDICTIONS:
        raise UserError(f"diffusers' schedulers have no diffusion.prediction = {diffusion.prediction}")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.num_steps,
        "trained_betas": configured_schedule(diffusion).betas.tolist(),
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "variance_type": "fixed_small",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }


def diffusion_config(scheduler: dict[str, Any]) -> DiffusionConfig:
    """Inverse of `scheduler_config`; also of diffusers' named schedules that are ours.

    Raises:
        UserError: the betas are those of no schedule here.
    """
    num_steps = scheduler.get("num_train_timesteps", 1000)
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    predicted = scheduler.get("prediction_type", "epsilon")
    if predicted not in predictions:
        raise UserError(f"scheduler_config.json: prediction_type {predicted} is none of {', '.join(predictions)}")
    prediction = predictions[predicted]
    about = {"schedule": "linear", "num_steps": num_steps, "zero_terminal_snr": False, "prediction": prediction}
    ours = _checked("scheduler_config.json", DiffusionConfig, about)
    betas = scheduler.get("trained_betas")
    if betas is None:
        betas = _named_betas(scheduler, num_steps)
    if scheduler.get("rescale_betas_zero_snr"):  # twice changes nothing
        betas = without_terminal_signal(np.asarray(betas, dtype=np.float64))
    for name in SCHEDULES:
        for zero in (False, True):
            known = make_schedule(name, num_steps, zero_terminal_snr=zero).betas.numpy()
            if len(betas) == len(known) and np.allclose(betas, known, rtol=1e-5, atol=1e-9):
                if zero and prediction == "eps":
                    raise UserError(f"scheduler_config.json: no terminal signal and prediction_type {predicted}")
                return ours.model_copy(update={"schedule": name, "zero_terminal_snr": zero})
    raise UserError("scheduler_config.json: the betas are those of no schedule that this project has")


def _named_betas(scheduler: dict[str, Any], num_steps: int) -> np.ndarray:
    kind = scheduler.get("beta_schedule", "linear")
    if kind == "squaredcos_cap_v2":
        return make_schedule("cosine", num_steps).betas.numpy()
    if kind == "linear":
        return np.linspace(scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02), num_steps)
    raise UserError(f"scheduler_config.json: beta_schedule {kind} cannot be read")


@click.command()
@click.argument("action", type=click.Choice(["write", "read"]))
@click.argument("folder", type=click.Path(path_type=Path))
def main(action: str, folder: Path) -> None:
    """Write models/model.safetensors into FOLDER as a diffusers pipeline, or read it from there."""
    click.echo({"write": _write, "read": _read}[action](folder))


def _write(folder: Path) -> str:
    write_pipeline(*load_model(paths.MODEL), folder)
    return f"{folder}: diffusers.DDPMPipeline.from_pretrained({str(folder)!r})"


def _read(folder: Path) -> str:
    net, known = read_pipeline(folder)
    digest = sha256(_weights(folder).read_bytes())
    about = {
        "weights": "imported",
        "step": 0,
        "val_loss": None,
        "data_digest": None,
        "fingerprint": f"imported-{digest.hexdigest()[:16]}",  # else all imports would share one MLflow run
        "run_id": None,
    }
    save_model(paths.MODEL, net.state_dict(), known, about)
    diffusion = known.diffusion
    return f"{paths.MODEL}: {diffusion.schedule} schedule, {diffusion.prediction} prediction; then: dvc repro -s sample"
