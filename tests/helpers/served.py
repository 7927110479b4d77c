"""Small models for the tests of registry and serving: random weights, so that their images say something."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers.project import REPO, TINY

from diffusion import config, params_file
from diffusion.model import model_file
from diffusion.model.unet import UNet
from diffusion.serving import registry


def params_of(**overrides: Any) -> config.Params:
    return params_file.load(REPO / "params.yaml", {**TINY, **overrides})


def write_model(folder: Path, params: config.Params, seed: int = 0) -> Path:
    """A model file with its card, as the train stage leaves them."""
    torch.manual_seed(seed)
    net = UNet(params.model)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    about = {"origin": {"git.commit": "c0ffee", "device": "cpu"}, "fingerprint": "f", "run_id": None, "step": 1}
    model_file.save_model(folder / "model.safetensors", net.state_dict(), config.trained(params), about)
    return folder / "model.safetensors"


def described(weights: Path, params: config.Params, code: str = "c", **scores: float) -> dict[str, Any]:
    """What `evaluate` hands to the registry; all scores are of equal conditions."""
    card = json.loads(weights.with_suffix(".json").read_text())
    found = [{"metric": name, "value": value, "of": "12 samples against 20"} for name, value in scores.items()]
    return registry.described("faces", weights, card, params.sample.model_dump(mode="json"), found, code)
