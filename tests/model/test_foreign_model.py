"""A model of classes that diffusers itself made: read, written again, and sampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.project import REPO, TINY

from diffusion import params_file, paths
from diffusion.__main__ import main
from diffusion.errors import UserError
from diffusion.model import diffusers_format
from diffusion.pipeline import sample

diffusers = pytest.importorskip("diffusers")


def foreign(folder: Path) -> Any:
    """A pipeline of 10 classes as diffusers' own examples make it: none of them stands for no class."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        num_class_embeds=10,
    ).eval()
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(folder)
    return theirs


def test_all_classes_of_a_foreign_model_are_read(tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "theirs")
    net, imported = diffusers_format.read_pipeline(tmp_path / "theirs")
    assert (net.num_classes, imported.guidable) == (10, False)
    x, t, labels = torch.randn(10, 3, 16, 16), torch.arange(0, 1000, 100), torch.arange(10)
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(net(x, t, labels), expected, rtol=0, atol=1e-5)
        diffusers_format.write_pipeline(net, imported, tmp_path / "ours")
        again = diffusers_format.read_pipeline(tmp_path / "ours")
        torch.testing.assert_close(again[0](x, t, labels), expected, rtol=0, atol=1e-5)
    assert again[1] == imported


def test_a_foreign_model_of_classes_is_sampled_as_any_other(tmp_path: Path) -> None:
    foreign(tmp_path / "theirs")
    changes = {"model.num_classes": 10, "sample.num_images": 3, "sample.steps": 2, "sample.labels": [9]}
    params_file.write_yaml(params_file.load(REPO / "params.yaml", {**TINY, **changes}), paths.PARAMS)
    assert CliRunner().invoke(main, ["interchange", "read", "theirs"]).exit_code == 0
    sample.sample(params_file.load(paths.PARAMS))
    with np.load(paths.SAMPLES_NPZ) as samples:
        assert samples["images"].shape == (3, 16, 16, 3)
        assert samples["labels"].tolist() == [9, 9, 9]
    guided = params_file.load(paths.PARAMS, {"sample.guidance": 2.0, "train.label_dropout": 0.1})
    with pytest.raises(UserError, match="never trained without a class"):
        sample.sample(guided)


@pytest.mark.parametrize("place", ["unet", "."])
def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, place: str) -> None:
    """As diffusers itself writes one when it is asked to."""
    foreign(tmp_path / "theirs").save_pretrained(tmp_path / "theirs/unet", safe_serialization=False)
    (tmp_path / "theirs/unet" / diffusers_format.WEIGHTS).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"\.bin is a pickle, which can run any code: .*save_pretrained"):
        diffusers_format.read_pipeline(tmp_path / "theirs" / place if place == "unet" else tmp_path / "theirs")
