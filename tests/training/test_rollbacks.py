"""Losses that are not finite: skipped, rolled back, and in the end an error."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.states import same

from diffusion.config import trained
from diffusion.errors import UserError
from diffusion.training.loop import Trainer, train

CPU = torch.device("cpu")


def poisoned(trainer: Trainer, bad: set[int] | range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of these steps hold a NaN, in the session's own count (a rollback does not heal them)."""
    batches, calls = trainer.batches, itertools.count()

    def batch(step: int) -> torch.Tensor:
        x0 = batches(step)
        return x0 * math.nan if next(calls) in bad else x0

    monkeypatch.setattr(trainer, "batches", batch)


def test_a_non_finite_loss_is_never_stepped_on(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(trained(tiny()), tiny_data, tmp_path, CPU)
    poisoned(trainer, {2}, monkeypatch)
    trainer.step(), trainer.step()
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.ema.net.state_dict().items()}
    assert math.isnan(trainer.step().loss)
    assert same(before, trainer.net.state_dict())
    assert same(average, trainer.ema.net.state_dict())
    assert (trainer.progress.step, trainer.progress.skipped, trainer.progress.bad_in_a_row) == (3, 1, 1)
    assert math.isfinite(trainer.step().loss)
    assert (trainer.progress.skipped, trainer.progress.bad_in_a_row) == (1, 0)


def test_ten_in_a_row_roll_back_to_the_last_checkpoint(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(trained(tiny(**{"train.steps": 30, "train.checkpoint_every": 4})), tiny_data, tmp_path, CPU)
    poisoned(trainer, range(6, 16), monkeypatch)
    steps = [record.step for record in train(trainer)]
    assert steps == [*range(1, 17), *range(5, 31)]  # not to steps 8 or 12, which were amid the bad ones
    assert (trainer.progress.rollbacks, trainer.progress.skipped) == (1, 10)
    validated = [row["step"] for row in trainer.progress.val_rows]
    assert validated == [*range(4, 30, 4), 30]  # once each, though it was at 4 twice
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_a_stop_amid_bad_steps_leaves_the_checkpoint_before_them(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(tiny(**{"train.steps": 30, "train.checkpoint_every": 4}))
    trainer = Trainer(config, tiny_data, tmp_path, CPU)
    poisoned(trainer, range(5, 10_000), monkeypatch)
    for record in train(trainer):
        if record.step == 9:
            trainer.save()
            break
    assert Trainer(config, tiny_data, tmp_path, CPU).progress.step == 4


def test_three_rollbacks_without_recovery_end_in_a_clear_line(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(trained(tiny(**{"train.steps": 500})), tiny_data, tmp_path, CPU)
    poisoned(trainer, range(5, 10_000), monkeypatch)
    with pytest.raises(UserError, match=r"after 3 rollbacks: lower train\.lr"):
        for _ in train(trainer):
            pass
    assert trainer.progress.skipped == 40


@pytest.mark.parametrize("bad", [range(3, 9), range(6, 17)], ids=str)
def test_losses_read_late_change_nothing_but_the_time_of_a_rollback(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: range
) -> None:
    """As on a GPU: losses are read every tenth step and when a row is due, here every eighth; stopped on the way."""
    config = trained(tiny(**{"train.steps": 22, "train.checkpoint_every": 5, "train.log_every": 8}))

    def run(folder: Path, late: bool, stop: int = 0) -> Trainer:
        trainer = Trainer(config, tiny_data, folder, CPU)
        trainer.reads_every_step = not late
        batches = trainer.batches

        def poisoned_once(step: int) -> torch.Tensor:
            return batches(step) * (math.nan if step in bad and not trainer.progress.rollbacks else 1.0)

        monkeypatch.setattr(trainer, "batches", poisoned_once)
        for record in train(trainer):
            if record.step == stop:
                break
        return trainer

    exact, late = run(tmp_path / "exact", late=False), run(tmp_path / "late", late=True)
    run(tmp_path / "parts", late=True, stop=13)
    resumed = run(tmp_path / "parts", late=True)
    for other in (exact, resumed):
        assert other.progress.step == late.progress.step == 22
        for name in ("rollbacks", "bad_in_a_row"):
            assert getattr(other.progress, name) == getattr(late.progress, name), name
    for a, b in zip(late.net.parameters(), resumed.net.parameters(), strict=True):
        assert a.equal(b)
    np.testing.assert_equal(resumed.progress.loss_rows, late.progress.loss_rows)  # NaN equals NaN
    assert resumed.progress.skipped == late.progress.skipped
    assert exact.progress.rollbacks == (1 if len(bad) > 10 else 0)
    for a, b in zip(exact.ema.net.parameters(), late.ema.net.parameters(), strict=True):
        torch.testing.assert_close(a, b)
