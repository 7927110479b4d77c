"""The train stage around the loop; its trainings are in test_training.py and test_stages.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion import config, fit
from diffusion.journal import NullTracker


def test_the_params_file_that_is_uploaded_has_no_passwords(
    tiny: Callable[..., config.Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_described_data", lambda: dict.fromkeys(("name", "digest", "source"), ""))
    params = tiny(**{"tune.storage": "postgresql://me:secret@host/db"})
    fit._describe(params, tmp_path, NullTracker())
    uploaded = config.load(tmp_path / "params.yaml")
    assert uploaded.tune.storage is None
    assert "secret" not in (tmp_path / "params.yaml").read_text()
    assert (uploaded.train, uploaded.model) == (params.train, params.model)
