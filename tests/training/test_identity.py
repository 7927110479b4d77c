"""The name of a training: what would change its weights changes it, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.config import trained
from diffusion.training.identity import fingerprint


def test_the_fingerprint_changes_with_params_data_and_code(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(tiny())
    names = {
        fingerprint(config, "a"),
        fingerprint(config, "b"),
        fingerprint(trained(tiny(**{"train.lr": 0.1})), "a"),
        fingerprint(trained(tiny(seed=1)), "a"),
    }
    assert fingerprint(config, "a") in names
    monkeypatch.setattr("diffusion.training.identity.code_digest", lambda _: "edited")
    names.add(fingerprint(config, "a"))
    assert len(names) == 5
    for same_training in ("sample.num_images", "train.processes", "train.micro_batch"):
        assert fingerprint(trained(tiny(**{same_training: 3})), "a") == fingerprint(config, "a")
    assert fingerprint(trained(tiny(**{"train.compile": "on"})), "a") == fingerprint(config, "a")


def test_another_split_of_the_same_images_is_other_data(tiny_data) -> None:
    """Else a changed data.val_images would find the old training finished, or go on with it on other images."""
    moved = replace(tiny_data, train=tiny_data.train[1:], val=torch.cat([tiny_data.train[:1], tiny_data.val]))
    swapped = replace(tiny_data, train=tiny_data.val, val=tiny_data.train)
    relabelled = replace(tiny_data, digest="other labels")
    assert len({data.identity for data in (tiny_data, moved, swapped, relabelled)}) == 4
    assert replace(tiny_data, train=tiny_data.train.clone()).identity == tiny_data.identity
