"""The model file: EMA weights as safetensors, everything else about them in a JSON card beside it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from diffusion.atomic import replacing, write_json
from diffusion.config import ImportedConfig, SampleConfig, TrainedConfig, trained_from_dict
from diffusion.errors import UserError
from diffusion.model.card import card_path, read_card
from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.runtime import resolve_precision, use_fast_kernels


def save_model(
    path: Path, weights: dict[str, torch.Tensor], config: TrainedConfig | ImportedConfig, about: dict[str, Any]
) -> None:
    """Write `path` (safetensors) and its card (same name, .json): {"config": ..., **about}; each whole or not."""
    with replacing(path) as file:  # save_file would say that a disk is full in words of its own
        file.write(save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}))
    write_json(card_path(path), {"config": config.model_dump(mode="json"), **about})


def load_model(path: Path | str) -> tuple[UNet, TrainedConfig | ImportedConfig]:
    """The network, in eval mode on the CPU, and its config.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the config.
    """
    path = Path(path)
    config = trained_from_dict(read_card(path)["config"])
    net = UNet(config.model)
    try:
        net.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro train`") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used ({reason}): restore it, or run `dvc repro -f train`") from None
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last), config


def load_denoiser(path: Path | str, config: SampleConfig, device: torch.device) -> Denoiser:
    """What samplers ask, from a model file: on `device`, in the precision and with the clipping that `config` says.

    Raises:
        UserError: see `load_model`.
    """
    use_fast_kernels(device)
    net, trained = load_model(path)
    denoiser = Denoiser(
        net.to(device),
        configured_schedule(trained.diffusion).to(device),
        trained.diffusion.prediction,
        dtype=resolve_precision(config.precision, device),
        clip_x0=config.clip_x0,
    )
    denoiser.guidable = trained.guidable
    return denoiser
