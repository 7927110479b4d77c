import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion import sampling
from diffusion.config import trained
from diffusion.errors import UserError
from diffusion.export import load_model, save_model
from diffusion.parameterization import Denoiser
from diffusion.schedules import make_schedule
from diffusion.unet import UNet

CPU = torch.device("cpu")


@pytest.fixture
def denoiser(tiny) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(tiny().model)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    return Denoiser(net.eval(), make_schedule("cosine", 50), "v", clip_x0=True)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}], ids=str
)
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(
    tiny, denoiser: Denoiser, options: dict[str, object]
) -> None:
    config = dataclasses.replace(tiny().sample, **options)
    sets = []
    for batch_size in (1, 5, 12):
        sized = dataclasses.replace(config, batch_size=batch_size)
        sets.append(torch.cat(list(sampling.generate(denoiser, sized, 7, range(12), CPU))))
    for other in sets[1:]:
        assert int((sets[0].int() - other.int()).abs().max()) <= 1  # float rounding may differ between batch shapes
    assert not sets[0][0].equal(sets[0][1])
    later = torch.cat(list(sampling.generate(denoiser, config, 7, range(9, 12), CPU)))
    assert int((later.int() - sets[0][9:].int()).abs().max()) <= 1


def test_another_seed_is_another_set(tiny, denoiser: Denoiser) -> None:
    config = tiny().sample
    one, other = (torch.cat(list(sampling.generate(denoiser, config, seed, range(4), CPU))) for seed in (0, 1))
    assert all(not a.equal(b) for a, b in zip(one, other, strict=True))


def test_stages_begin_with_noise_and_end_with_the_image(tiny, denoiser: Denoiser) -> None:
    config = tiny().sample
    frames = sampling.stages(denoiser, config, 0, range(3), CPU, columns=4)
    assert frames.shape == (4, 3, 32, 32, 3)
    assert frames[-1].equal(torch.cat(list(sampling.generate(denoiser, config, 0, range(3), CPU))))
    x_T = next(iter(sampling.trajectory(denoiser, config, 0, range(3), CPU)))
    assert frames[0].equal(sampling.to_uint8(x_T))


def test_a_model_comes_back_as_it_was_saved(tiny, tmp_path: Path) -> None:
    config = trained(tiny())
    net = UNet(config.model).eval()
    torch.nn.init.normal_(net.head.weight)
    save_model(tmp_path / "m.safetensors", net.state_dict(), config, {"step": 3})
    loaded, loaded_config = load_model(tmp_path / "m.safetensors")
    assert loaded_config == config
    assert not loaded.training
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 30])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), net(x, t), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "m.json").read_text())["step"] == 3


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
