"""Pictures during training: none is lost to a kill, and they need no more memory than the training."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import run, run_all, write_params
from PIL import Image

from diffusion import config, paths
from diffusion.model.denoiser import Denoiser
from diffusion.sampling import panels


@pytest.mark.parametrize(("every", "steps"), [(100, [8]), (4, [4, 8])], ids=["its only one", "the first"])
def test_a_training_killed_at_a_preview_draws_it_when_it_goes_on(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_params(**{"train.preview_every": every, "train.checkpoint_every": 4})
    run_all("prepare")
    with monkeypatch.context() as patch:
        patch.setattr("diffusion.pipeline.train.write_previews", killed)
        assert run("train").exit_code == 130
    run_all("train")
    names = [f"step_{step:06d}{kind}.png" for step in steps for kind in ("", "_denoising")]
    assert sorted(p.name for p in paths.PREVIEWS.iterdir()) == sorted(names)


def test_previews_take_no_more_memory_than_micro_batches_and_stay_the_same(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stages = panels.stages

    def watched(denoiser: Denoiser, how: config.SampleConfig, seed: int, indices: range, *rest: Any) -> torch.Tensor:
        seen.append(len(indices))
        return stages(denoiser, how, seed, indices, *rest)

    monkeypatch.setattr(panels, "stages", watched)
    pictures = []
    for micro_batch in (None, 1):
        write_params(**{"train.micro_batch": micro_batch, "train.preview_images": 5, "train.preview_every": 8})
        run_all("prepare", "train")
        pictures.append(np.asarray(Image.open(paths.PREVIEWS / "step_000008.png")).astype(int))
        shutil.rmtree(paths.RUNS)
    assert seen == [5, 2, 2, 1]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
