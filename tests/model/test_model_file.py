"""Models as files: what was saved comes back, what cannot be used is one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.config import trained
from diffusion.errors import UserError
from diffusion.model.model_file import load_denoiser, load_model, save_model
from diffusion.model.parameterization import PARAMETERIZATIONS
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet


def test_a_model_comes_back_as_it_was_saved(tiny, tmp_path: Path) -> None:
    config = trained(tiny())
    net = UNet(config.model).eval()
    torch.nn.init.normal_(net.head.weight)
    save_model(tmp_path / "m.safetensors", net.state_dict(), config, {"step": 3})
    loaded, loaded_config = load_model(tmp_path / "m.safetensors")
    assert loaded_config == config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.stem.weight.is_contiguous(memory_format=torch.channels_last)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 30])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), net(x, t), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "m.json").read_text())["step"] == 3


def test_a_denoiser_is_what_the_model_was_trained_as(tiny, tmp_path: Path) -> None:
    """Schedule and parameterisation of the file, precision and clipping as the section to sample by says."""
    params = tiny(**{"diffusion.prediction": "x0", "diffusion.schedule": "sigmoid", "sample.precision": "bf16"})
    save_model(tmp_path / "m.safetensors", UNet(params.model).state_dict(), trained(params), {})
    for clip in (False, True):
        section = params.sample.model_copy(update={"clip_x0": clip})
        found = load_denoiser(tmp_path / "m.safetensors", section, torch.device("cpu"))
        assert (found.dtype, found.clip_x0) == (torch.bfloat16, clip)
        assert found.parameterization is PARAMETERIZATIONS["x0"]
        assert found.schedule.betas.equal(make_schedule("sigmoid", 50).betas)


@pytest.mark.parametrize(("dropout", "guidable"), [(0.0, False), (0.1, True)])
def test_guidance_needs_a_network_that_was_also_trained_without_classes(
    tiny, tmp_path: Path, dropout: float, guidable: bool
) -> None:
    params = tiny(**{"model.num_classes": 10, "train.label_dropout": dropout})
    save_model(tmp_path / "m.safetensors", UNet(params.model).state_dict(), trained(params), {})
    assert load_model(tmp_path / "m.safetensors")[1].guidable == guidable


@pytest.mark.parametrize("damage", ["no weights", "no card", "cut weights", "other weights", "no JSON", "old card"])
def test_an_unusable_model_is_one_line(tiny, tmp_path: Path, damage: str) -> None:
    config = trained(tiny())
    path, card = tmp_path / "m.safetensors", tmp_path / "m.json"
    save_model(path, UNet(config.model).state_dict(), config, {})
    if damage == "no weights":
        path.unlink()
    elif damage == "no card":
        card.unlink()
    elif damage == "cut weights":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other weights":
        save_file({"x": torch.zeros(1)}, path)
    elif damage == "no JSON":
        card.write_text("{")
    else:
        card.write_text(card.read_text().replace("patch_size", "patches"))
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
