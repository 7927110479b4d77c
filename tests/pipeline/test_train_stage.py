"""The train stage around the loop; its trainings are in test_training.py and test_stages.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion import config, params_file
from diffusion.pipeline import train
from diffusion.tracking.tracker import Tracker


def test_the_params_file_that_is_uploaded_has_no_passwords(
    tiny: Callable[..., config.Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_described_data", lambda: dict.fromkeys(("name", "digest", "source"), ""))
    params = tiny(**{"tune.storage": "postgresql://me:secret@host/db"})
    train._describe(params, tmp_path, Tracker())
    uploaded = params_file.load(tmp_path / "params.yaml")
    assert uploaded.tune.storage is None
    assert "secret" not in (tmp_path / "params.yaml").read_text()
    assert (uploaded.train, uploaded.model) == (params.train, params.model)


@pytest.mark.parametrize(
    ("lr", "words"), [(2e-3, "lr2e-3"), (0.004685, "lr4.68e-3"), (1.5e-4, "lr1.5e-4"), (0.02, "lr2e-2"), (1.0, "lr1.0")]
)
def test_a_runs_name_has_three_digits_of_the_learning_rate(
    tiny: Callable[..., config.Params], lr: float, words: str
) -> None:
    schedules = {"train.lr_schedule": "linear", "diffusion.schedule": "cosine", "diffusion.prediction": "v"}
    assert train.run_name(tiny(**schedules, **{"train.lr": lr})) == f"{words}-linear-cosine-v"
