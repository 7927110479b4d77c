"""Models from and to diffusers, held against its own UNet2DModel and schedulers."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.project import REPO
from safetensors.torch import load_file, save_file

from diffusion import config, params_file
from diffusion.__main__ import main
from diffusion.errors import UserError
from diffusion.model import diffusers_format, diffusers_layers
from diffusion.model.model_file import save_model
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet

diffusers = pytest.importorskip("diffusers")

SHAPES: dict[str, dict[str, Any]] = {
    "paper, shrunk": {},
    "symmetric, several heads": {"model.downsample": "symmetric", "model.head_channels": 16},
    "grey, 16 pixels, no attention": {
        "model.image_channels": 1,
        "model.image_size": 16,
        "model.attention_resolutions": [],
    },
    "classes": {"model.num_classes": 10, "train.label_dropout": 0.1},
    "classes, never left out": {"model.num_classes": 10, "train.label_dropout": 0.0},
}


def small(**overrides: Any) -> config.TrainedConfig:
    """The paper's recipe with few channels."""
    narrow = {"model.channels": 32, "model.multipliers": [1, 2, 2], "model.norm_groups": 8, "model.dropout": 0.0}
    return config.trained(params_file.load(REPO / "params/paper.yaml", {**narrow, **overrides}))


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
    diffusers_format.write_pipeline(net, trained, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t = torch.randn(3, *trained.model.image_shape), torch.tensor([0, 400, 999])
    labels = torch.tensor([0, 9, 10]) if trained.model.num_classes else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        ours = net(x, t) if labels is None else net(x, t, torch.where(labels == 10, -1, labels))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    back, imported = diffusers_format.read_pipeline(tmp_path)
    assert back.config == trained.model
    assert imported.diffusion == trained.diffusion
    assert imported.guidable == trained.guidable
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {k: v.tolist() for k, v in net.state_dict().items()}


def test_the_published_layout_is_read_with_its_old_names(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32: 35.7M parameters, attention is query, key, value, proj_attn; betas by name."""
    trained = config.trained(params_file.load(REPO / "params/paper.yaml"))
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
        for past, new in diffusers_layers.OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{past}.") if ".attentions." in name else name
        old[name] = tensor
    save_file(old, weights)
    net, imported = diffusers_format.read_pipeline(tmp_path)
    diffusion = imported.diffusion
    assert (diffusion.schedule, diffusion.prediction, diffusion.num_steps) == ("linear", "eps", 1000)
    assert net.config == params_file.load(REPO / "params/paper.yaml", {"model.dropout": 0.0}).model
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
    diffusers_format.write_pipeline(randomised(trained), trained, tmp_path)
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    ours = diffusers_format.configured_schedule(trained.diffusion)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert theirs.config.prediction_type == diffusers_format.PREDICTIONS[prediction]
    assert diffusers_format.read_pipeline(tmp_path)[1].diffusion == trained.diffusion


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
        diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained_betas", [False, True], ids=["by name", "as numbers"])
def test_rescaled_betas_are_a_schedule_without_terminal_signal(trained_betas: bool) -> None:
    betas = {"trained_betas": diffusers.DDPMScheduler().betas.tolist()} if trained_betas else {}
    given = {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    theirs = diffusers.DDPMScheduler(**given, **betas)
    read = diffusers_format.diffusion_config(dict(theirs.config))
    assert read == config.DiffusionConfig(schedule="linear", num_steps=1000, zero_terminal_snr=True, prediction="v")
    ours = diffusers_format.configured_schedule(read).alphas_cumprod
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours, rtol=1e-3, atol=1e-6)


without_signal = make_schedule("linear", 1000, zero_terminal_snr=True).betas


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"prediction_type": "flow"}, "prediction_type flow is none of epsilon, sample, v_prediction"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule scaled_linear cannot be read"),
        ({"beta_end": 0.03}, "the betas are those of no schedule"),
        ({"trained_betas": without_signal.tolist(), "num_train_timesteps": 999}, "the betas are those of no schedule"),
        ({"rescale_betas_zero_snr": True}, "no terminal signal and prediction_type epsilon"),
        ({"trained_betas": without_signal.tolist()}, "no terminal signal and prediction_type epsilon"),
        ({"num_train_timesteps": 0}, "diffusion.num_steps = 0 .* 2 to 100000"),
        ({"num_train_timesteps": "many"}, "diffusion.num_steps = 'many' .* a whole number"),
    ],
    ids=str,
)
def test_a_scheduler_that_is_none_of_ours_is_one_line(scheduler: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        diffusers_format.diffusion_config(scheduler)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}, "up_block_types"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4; only None"),
        ({"layers_per_block": None}, "layers_per_block is missing"),
        ({"layers_per_block": 1}, "does not fit its config.json"),
        ({"layers_per_block": [2, 2, 2]}, r"model.num_blocks = \[2, 2, 2\] is not allowed"),
        ({"sample_size": [32, 16]}, r"sample_size = \[32, 16\]: only square images"),
        ({"sample_size": "32"}, "sample_size = '32': only square images"),
        ({"sample_size": 30}, "divides model.image_size = 30"),
        ({"norm_num_groups": "none"}, "model.norm_groups = 'none' is not allowed"),
        ({"dropout": 2.0}, "model.dropout = 2.0 is not allowed: it must be a number from 0 to 1"),
        ({"num_class_embeds": 0}, "model.num_classes = 0 is not allowed"),
        ({"out_channels": 6}, "out_channels = 6 is not in_channels"),
    ],
    ids=str,
)
def test_a_network_of_another_kind_is_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    trained = small()
    diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    file = tmp_path / "unet/config.json"
    changed = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    with pytest.raises(UserError, match=words) as caught:
        diffusers_format.read_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_config_leaves_out_is_diffusers_own_default() -> None:
    """As UNet2DModel itself would fill it in, although that is not what this U-Net is."""
    signature = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    theirs = {name: signature[name].default for name in diffusers_format.DEFAULTS}
    assert theirs == diffusers_format.DEFAULTS
    assert set(diffusers_format.UNET_FIXED) <= set(theirs)


@pytest.mark.parametrize("key", ["flip_sin_to_cos", "freq_shift", "norm_eps"])
def test_a_config_without_a_key_whose_default_is_another_network_is_refused(key: str, tmp_path: Path) -> None:
    trained = small()
    diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    file = tmp_path / "unet/config.json"
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{key} = .*; only"):
        diffusers_format.read_pipeline(tmp_path)


def test_a_pair_of_equal_sizes_is_read(tmp_path: Path) -> None:
    trained = small()
    diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    file = tmp_path / "unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": [32, 32]}))
    assert diffusers_format.read_pipeline(tmp_path)[0].config == trained.model


def test_weights_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    trained = small()
    diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    file = tmp_path / "unet" / diffusers_format.WEIGHTS
    save_file({**load_file(file), "down_blocks.0.attentions.0.group_norm.weight": torch.ones(32)}, file)
    with pytest.raises(UserError, match=r"has down_blocks\.0\.attentions\.0\.group_norm\.weight"):
        diffusers_format.read_pipeline(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "other U-Net", "other betas", "other weights", "no JSON"])
def test_unusable_folders_are_one_line(damage: str, tmp_path: Path) -> None:
    trained = small()
    diffusers_format.write_pipeline(UNet(trained.model), trained, tmp_path)
    unet, scheduler = tmp_path / "unet/config.json", tmp_path / "scheduler/scheduler_config.json"
    if damage == "missing":
        unet.unlink()
    elif damage == "other U-Net":
        unet.write_text(json.dumps(json.loads(unet.read_text()) | {"flip_sin_to_cos": True}))
    elif damage == "other betas":
        scheduler.write_text(json.dumps({"trained_betas": [0.1] * 1000}))
    elif damage == "other weights":
        save_file({"x": torch.zeros(1)}, tmp_path / "unet" / diffusers_format.WEIGHTS)
    else:
        scheduler.write_text("{")
    with pytest.raises(UserError) as caught:
        diffusers_format.read_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_all_files_in_one_is_read(tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32 lies on the hub."""
    trained = small()
    net = randomised(trained)
    diffusers_format.write_pipeline(net, trained, tmp_path / "deep")
    for path in [*(tmp_path / "deep").rglob("*.*")]:
        path.rename(tmp_path / path.name)
    shutil.rmtree(tmp_path / "deep")
    found, known = diffusers_format.read_pipeline(tmp_path)
    assert known.diffusion == trained.diffusion
    assert all(value.equal(found.state_dict()[name]) for name, value in net.state_dict().items())


def test_the_command_goes_both_ways(tmp_path: Path) -> None:
    trained = small()
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    save_model(tmp_path / "models/model.safetensors", randomised(trained).state_dict(), trained, {"step": 3})
    before = load_file(tmp_path / "models/model.safetensors")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    assert run("interchange", "write", "out").exit_code == 0
    (tmp_path / "models/model.safetensors").unlink()
    result = run("interchange", "read", "out")
    assert result.exit_code == 0, result.output
    after = load_file(tmp_path / "models/model.safetensors")
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    lineage = run("lineage")
    assert lineage.exit_code == 0, lineage.output
    explained = dict(line.split(maxsplit=1) for line in lineage.output.splitlines())
    assert explained["weights"] == "imported"
    assert explained["fingerprint"].startswith("imported-")
    assert explained["diffusion.schedule"] == "linear"
    card = json.loads((tmp_path / "models/model.json").read_text())
    assert set(card["config"]) == {"diffusion", "model", "guidable"}  # how it was trained is not known
    wrong = run("interchange", "read", "nowhere")
    assert wrong.exit_code == 2
    assert wrong.output.startswith("error: nowhere is not a diffusers pipeline")
