"""Small models for the tests of registry and serving, with random weights; and requests to a server of one."""

import http.client
import json
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from helpers.project import REPO, TINY

from diffusion import config, params_file
from diffusion.model import model_file
from diffusion.model.unet import UNet
from diffusion.serving import registry

JSON = {"Content-Type": "application/json"}


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


def ask(client: TestClient, **inputs: Any) -> dict[str, Any]:
    answer = client.post("/invocations", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    predictions: dict[str, Any] = answer.json()["predictions"]
    return predictions


def call(port: int, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body, JSON)
    return connection.getresponse()
