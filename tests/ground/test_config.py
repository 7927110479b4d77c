import json
import re
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
from helpers.project import REPO
from ruamel.yaml import YAML

from diffusion import config, params_file
from diffusion.errors import UserError
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.rules import doubtful
from diffusion.sampling import samplers
from diffusion.training.identity import deciding, identity

RECIPES = sorted(REPO.glob("params/*.yaml"))


@pytest.mark.parametrize("path", [REPO / "params.yaml", *RECIPES], ids=lambda p: p.name)
def test_every_recipe_is_valid_and_complete(path: Path) -> None:
    params = params_file.load(path)
    assert set(config.flat(params)) == set(params_file.schema())


def test_the_laptop_recipe_is_the_default() -> None:
    assert (REPO / "params/laptop.yaml").read_text() == (REPO / "params.yaml").read_text()


# What the papers print (Ho et al. 2020, section 4 and appendix B; Karras et al. 2022, table 7 and appendix F), and what
# follows from it: parameters, images seen, network evaluations a sample.
PUBLISHED: dict[str, tuple[int, int, int, dict[str, object]]] = {
    "paper": (
        35_746_307,
        102_400_000,
        1000,
        {
            "diffusion.schedule": "linear",
            "diffusion.num_steps": 1000,
            "diffusion.prediction": "eps",
            "model.dropout": 0.1,
            "train.batch_size": 128,
            "train.lr": 2e-4,
            "train.lr_schedule": "constant",
            "train.warmup_steps": 5000,
            "train.ema_decay": 0.9999,
            "train.grad_clip": 1.0,
            "train.loss_weight": "simple",
            "train.timesteps": "uniform",
            "train.flip": True,
            "train.best_by": "last",
            "sample.sampler": "ddpm",
            "sample.variance": "fixed_large",
            "sample.clip_x0": True,
            "sample.num_images": 50_000,
        },
    ),
    "edm": (
        53_638_659,
        200_000_000,
        35,
        {
            "diffusion.schedule": "edm",
            "diffusion.prediction": "edm",
            "model.dropout": 0.13,
            "model.augment": 0.12,
            "train.batch_size": 512,
            "train.lr": 1e-3,
            "train.lr_schedule": "constant",
            "train.warmup_steps": 10_000_000 // 512,
            "train.ema_decay": round(0.5 ** (512 / 500_000), 5),
            "train.loss_weight": "own",
            "train.timesteps": "lognormal",
            "train.best_by": "last",
            "sample.sampler": "heun",
            "sample.spacing": "karras",
            "sample.steps": 18,
            "sample.clip_x0": False,
            "sample.num_images": 50_000,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_papers_recipe_is_what_the_paper_prints(name: str) -> None:
    parameters, images, evaluations, keys = PUBLISHED[name]
    params = params_file.load(REPO / f"params/{name}.yaml")
    assert sum(p.numel() for p in UNet(params.model).parameters()) == parameters
    assert params.train.steps * params.train.batch_size == images
    assert samplers.evaluations(params.sample, configured_schedule(params.diffusion)) == evaluations
    flat = config.flat(params)
    assert {key: flat[key] for key in keys} == keys
    assert not list(doubtful(params.sample, params.diffusion))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sample.sampler": "ddpm", "sample.variance": "fixed_large", "sample.steps": 100}, "fixed_large leaves noise"),
        ({"sample.sampler": "unipc", "sample.spacing": "uniform", "sample.steps": 10}, "uniform .* overshoots"),
        (
            {"diffusion.schedule": "cosine", "diffusion.prediction": "eps", "sample.clip_x0": False},
            "the cosine schedule leaves so little signal",
        ),
        ({"sample.sampler": "heun", "sample.eta": 0.5}, "heun ignores it"),
    ],
    ids=str,
)
def test_a_doubtful_pair_is_one_line(overrides: dict[str, object], words: str) -> None:
    params = params_file.load(REPO / "params.yaml", overrides)
    (line,) = doubtful(params.sample, params.diffusion)
    assert re.search(words, line)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.lrr": 1e-4}, ["train.lrr", "train.lr"]),
        ({"trian.lr": 1e-4}, ["trian.lr", "train.lr"]),
        ({"sample.smapler": "ddim"}, ["sample.smapler", "sample.sampler"]),
        ({"train.lr": 5.0}, ["train.lr = 5", "1e-08 to 1"]),
        ({"train.lr": float("nan")}, ["train.lr", "1e-08 to 1"]),
        ({"train.steps": 2.5}, ["train.steps = 2.5", "whole number"]),
        ({"train.steps": 0}, ["train.steps = 0", "from 1"]),
        ({"train.compile": "yes"}, ["train.compile", "auto, on, off"]),
        ({"train.micro_batch": 0}, ["train.micro_batch = 0", "from 1"]),
        ({"train.processes": 4, "train.batch_size": 3}, ["train.processes = 4", "train.batch_size = 3"]),
        ({"train.flip": "perhaps"}, ["train.flip", "true or false"]),
        ({"diffusion.schedule": "cosin"}, ["diffusion.schedule", "linear, cosine, sigmoid"]),
        ({"diffusion.schedule": None}, ["diffusion.schedule", "linear"]),
        ({"model.multipliers": [1, 0]}, ["model.multipliers", "1 to 16"]),
        ({"model.multipliers": []}, ["model.multipliers"]),
        ({"model.multipliers": [1, 1, 1, 1, 1, 1, 1]}, ["model.multipliers", "model.image_size = 32"]),
        ({"model.head_channels": 40}, ["model.head_channels = 40", "divide"]),
        ({"sample.steps": 5000}, ["sample.steps = 5000", "diffusion.num_steps"]),
        ({"diffusion.zero_terminal_snr": True, "diffusion.prediction": "eps"}, ["zero_terminal_snr", "prediction eps"]),
        ({"diffusion.zero_terminal_snr": True, "train.loss_weight": "min_snr"}, ["zero_terminal_snr", "min_snr"]),
        (
            {"diffusion.zero_terminal_snr": True, "train.timesteps": "lognormal", "train.loss_weight": "own"},
            ["lognormal"],
        ),
        (
            {"model.num_classes": 10, "sample.guidance": 3.0, "train.label_dropout": 0.0},
            ["guidance = 3", "label_dropout"],
        ),
        ({"model.num_classes": 10, "train.label_dropout": 1.0}, ["train.label_dropout = 1"]),
        ({"model.attention_resolutions": [5]}, ["model.attention_resolutions = 5", "[16, 8, 4]"]),
        ({"train.steps": 50, "train.warmup_steps": 100}, ["train.warmup_steps = 100", "train.steps = 50"]),
        ({"sample.guidance": 2.0}, ["sample.guidance", "model.num_classes"]),
        ({"sample.labels": [1]}, ["sample.labels", "model.num_classes"]),
        ({"sample.labels": [1, 10], "model.num_classes": 10}, ["sample.labels = [1, 10]", "0 to 9"]),
        ({"sample.labels": [], "model.num_classes": 10}, ["sample.labels is empty"]),
        ({"sample.labels": "all"}, ["sample.labels", "balanced", "a list of"]),
        ({"sample.sampler": "euler"}, ["sample.sampler", "dpmpp_2m"]),
        ({"data.sources": ["internet"]}, ["data.sources", "mirrors"]),
        ({"data.sources": []}, ["data.sources"]),
        ({"data.source": "~/photos"}, ["data.source = ~/photos", "DVC", f"write {Path.home()}/photos"]),
        ({"train.best_by": "fd_lite0"}, ["train.best_by", "train.evaluate_every"]),
        ({"evaluate.measures": []}, ["evaluate.measures", "frechet"]),
        ({"evaluate.measures": ["fid"]}, ["evaluate.measures", "precision_recall"]),
        ({"evaluate.precision": "auto"}, ["evaluate.precision", "fp32, bf16"]),
        (
            {"evaluate.inception": "require", "evaluate.repeats": 2},
            ["evaluate.inception = require", "2048 samples", "sample.num_images = 2048", "evaluate.repeats = 2", "kid"],
        ),
        ({"evaluate.repeats": 300, "sample.num_images": 599}, ["evaluate.repeats = 300", "sample.num_images = 599"]),
        (
            {"evaluate.measures": ["infinity"], "sample.num_images": 6399},
            ["6400 samples for fd_lite0", "6399", "sample.num_images", "evaluate.kept_features"],
        ),
        (
            {"evaluate.measures": ["infinity"], "sample.num_images": 50000, "evaluate.kept_features": 6399},
            ["6400 samples for fd_lite0", "6399"],
        ),
        (
            {"evaluate.measures": ["infinity"], "sample.num_images": 50000, "evaluate.inception": "require"},
            ["10240 samples for fid", "2048", "evaluate.inception_images"],
        ),
        ({"evaluate.inception": "never"}, ["evaluate.inception", "auto, local, require, off"]),
        ({"evaluate.repeats": 0}, ["evaluate.repeats = 0", "from 1"]),
        ({"tune.space": ["train.lr"]}, ["tune.space", "a mapping"]),
    ],
    ids=str,
)
def test_a_bad_key_is_one_line_that_helps(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        params_file.load(REPO / "params.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_every_missing_key_is_named(tmp_path: Path) -> None:
    lines = (REPO / "params.yaml").read_text().splitlines()
    section = ""
    for number, line in enumerate(lines):
        if re.match(r"\w+:$", line):
            section = line[:-1] + "."
        key = re.match(r"(  )?(\w+): ", line)
        if not key:
            continue
        name = section + key[2] if key[1] else key[2]
        path = tmp_path / "params.yaml"
        rest = [*dropwhile(lambda below: below.startswith("    "), lines[number + 1 :])]
        path.write_text("\n".join(lines[:number] + rest))
        with pytest.raises(UserError, match=re.escape(f"{name} is missing")):
            params_file.load(path)


def test_a_file_key_that_is_not_in_the_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((REPO / "params.yaml").read_text().replace("  lr: ", "  lrr: 1\n  lr: ", 1))
    with pytest.raises(UserError, match=r"unknown key train\.lrr: did you mean train\.lr\?"):
        params_file.load(path)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "train: 3\n", "\x00"], ids=repr)
def test_a_file_that_is_no_params_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        params_file.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        params_file.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_what_is_written_is_what_the_file_says(path: Path, tmp_path: Path) -> None:
    """Cards, checkpoints and the training's identity hold plain values, which owe nothing to how params are checked."""
    params, tree = params_file.load(path), YAML(typ="safe", pure=True).load(path)
    assert params.model_dump(mode="json") == tree
    card = {key: tree[key] for key in ("seed", "diffusion", "model", "train")}
    trained = config.trained(params)
    assert identity(trained, "data")["config"] == deciding(card)
    assert config.trained_from_dict(json.loads(json.dumps(card))) == trained
    params_file.write_yaml(params, tmp_path / "params.yaml")
    assert params_file.load(tmp_path / "params.yaml") == params


def test_a_card_of_another_version_is_one_line(tiny: Any) -> None:
    card = config.trained(tiny()).model_dump(mode="json")
    for changed, words in (({"lr": 1}, "model.lr"), ({"num_blocks": 0}, "model.num_blocks")):
        with pytest.raises(UserError, match=rf"does not fit this version \({words}[^\n]*: train it again$"):
            config.trained_from_dict({**card, "model": {**card["model"], **changed}})


def test_a_section_alone_is_checked_as_in_the_file(tiny: Any) -> None:
    model = tiny().model.model_dump(mode="json")
    assert params_file.checked(config.ModelConfig, model) == tiny().model
    for changed, words in (
        ({"channel": 8}, "unknown key model.channel: did you mean model.channels?"),
        ({"channels": 7}, "model.channels = 7 is not allowed: it must be a whole number from 8 to 1024"),
        ({"image_size": 30}, "divides model.image_size = 30"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            params_file.checked(config.ModelConfig, {**model, **changed})


def test_yaml_1_2_as_dvc_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (REPO / "params.yaml").read_text()
    path.write_text(re.sub(r"  lr: \S+", "  lr: 2e-4", text, count=1).replace("inception: auto", "inception: off"))
    params = params_file.load(path)
    assert params.train.lr == 2e-4
    assert params.evaluate.inception == "off"
