"""Models from and to diffusers, held against its own UNet2DModel and schedulers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

from diffusion import config, interchange, interchange_layers
from diffusion.errors import UserError
from diffusion.export import save_model
from diffusion.unet import UNet

diffusers = pytest.importorskip("diffusers")

SHAPES: dict[str, dict[str, Any]] = {
    "paper, shrunk": {},
    "symmetric, several heads": {"model.downsample": "symmetric", "model.head_channels": 16},
    "grey, 16 pixels": {"model.image_channels": 1, "model.image_size": 16, "model.attention_resolutions": [8]},
    "classes": {"model.num_classes": 10},
}


def small(**overrides: Any) -> config.TrainedConfig:
    """The paper's recipe with few channels."""
    narrow = {"model.channels": 32, "model.multipliers": [1, 2, 2], "model.norm_groups": 8, "model.dropout": 0.0}
    return config.trained(config.load(REPO / "params/paper.yaml", {**narrow, **overrides}))


def randomised(trained: config.TrainedConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(trained.model).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.2)
    return net


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_computes_the_same(shape: str, tmp_path: Path) -> None:
    trained = small(**SHAPES[shape])
    net = randomised(trained)
    interchange.write_pipeline(net, trained, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t = torch.randn(3, *trained.model.image_shape), torch.tensor([0, 400, 999])
    labels = torch.tensor([0, 9, 10]) if trained.model.num_classes else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        ours = net(x, t) if labels is None else net(x, t, torch.where(labels == 10, -1, labels))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    back, diffusion = interchange.read_pipeline(tmp_path)
    assert back.config == trained.model
    assert diffusion == trained.diffusion
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {k: v.tolist() for k, v in net.state_dict().items()}


def test_the_published_layout_is_read_with_its_old_names(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32: 35.7M parameters, attention is query, key, value, proj_attn; betas by name."""
    trained = config.trained(config.load(REPO / "params/paper.yaml"))
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()
    theirs.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(num_train_timesteps=1000).save_pretrained(tmp_path / "scheduler")
    weights, old = tmp_path / "unet/diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(weights).items():
        for past, new in interchange_layers.OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{past}.") if ".attentions." in name else name
        old[name] = tensor
    save_file(old, weights)
    net, diffusion = interchange.read_pipeline(tmp_path)
    assert (diffusion.schedule, diffusion.prediction, diffusion.num_steps) == ("linear", "eps", 1000)
    assert net.config == config.load(REPO / "params/paper.yaml", {"model.dropout": 0.0}).model
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert trained.model.downsample == "same"
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 900])
    with torch.no_grad():
        torch.testing.assert_close(net(x, t), theirs(x, t).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "edm"])
def test_their_scheduler_has_our_betas(schedule: str, prediction: str, tmp_path: Path) -> None:
    overrides = {"diffusion.schedule": schedule, "diffusion.prediction": prediction}
    trained = small(**overrides)
    interchange.write_pipeline(randomised(trained), trained, tmp_path)
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    ours = interchange.configured_schedule(trained.diffusion)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert theirs.config.prediction_type == interchange.PREDICTIONS[prediction]
    assert interchange.read_pipeline(tmp_path)[1] == trained.diffusion


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.patch_size": 2}, "model.patch_size = 2"),
        ({"model.upsample": "shuffle"}, "model.upsample = shuffle"),
        ({"model.norm_groups": 5}, "model.norm_groups = 5"),
        ({"diffusion.prediction": "edm"}, "diffusion.prediction = edm"),
    ],
)
def test_what_has_no_counterpart_is_refused(overrides: dict[str, Any], words: str, tmp_path: Path) -> None:
    trained = small(**overrides)
    with pytest.raises(UserError, match=words):
        interchange.write_pipeline(UNet(trained.model), trained, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "other U-Net", "other betas", "other weights", "no JSON"])
def test_unusable_folders_are_one_line(damage: str, tmp_path: Path) -> None:
    trained = small()
    interchange.write_pipeline(UNet(trained.model), trained, tmp_path)
    unet, scheduler = tmp_path / "unet/config.json", tmp_path / "scheduler/scheduler_config.json"
    if damage == "missing":
        unet.unlink()
    elif damage == "other U-Net":
        unet.write_text(json.dumps(json.loads(unet.read_text()) | {"flip_sin_to_cos": True}))
    elif damage == "other betas":
        scheduler.write_text(json.dumps({"trained_betas": [0.1] * 1000}))
    elif damage == "other weights":
        save_file({"x": torch.zeros(1)}, tmp_path / "unet" / interchange.WEIGHTS)
    else:
        scheduler.write_text("{")
    with pytest.raises(UserError) as caught:
        interchange.read_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_goes_both_ways(tmp_path: Path) -> None:
    trained = small()
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    save_model(tmp_path / "models/model.safetensors", randomised(trained).state_dict(), trained, {"step": 3})
    before = load_file(tmp_path / "models/model.safetensors")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffusion.interchange", *arguments]
        environment = {"PYTHONPATH": str(REPO / "src"), "PATH": "", "DVC_ROOT": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run("write", "out").returncode == 0
    (tmp_path / "models/model.safetensors").unlink()
    result = run("read", "out")
    assert result.returncode == 0, result.stderr
    after = load_file(tmp_path / "models/model.safetensors")
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    wrong = run("read", "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: nowhere is not a diffusers pipeline")
