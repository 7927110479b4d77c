import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion import training
from diffusion.config import trained
from diffusion.errors import UserError
from diffusion.training import Trainer, fingerprint, train

CPU = torch.device("cpu")


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, for nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_training_equals_the_one_that_was_not(
    tiny, tiny_data, tmp_path: Path, precision: str
) -> None:
    """Bit for bit: weights, average, best, optimiser, history; stopped between checkpoints, twice."""
    config = trained(tiny(**{"train.precision": precision, "model.dropout": 0.2, "train.steps": 11}))
    whole = Trainer(config, tiny_data, tmp_path / "whole", CPU)
    for _ in train(whole):
        pass

    for stop in (4, 8):  # checkpoints are at 3, 6, 9: steps are lost and done again
        for record in train(Trainer(config, tiny_data, tmp_path / "parts", CPU)):
            torch.randn(7)  # whatever the process did before must not matter
            if record.step == stop:
                break
    parts = Trainer(config, tiny_data, tmp_path / "parts", CPU)
    assert parts.progress.step == 6
    for _ in train(parts):
        pass

    assert same(parts.net.state_dict(), whole.net.state_dict())
    assert same(parts.ema.net.state_dict(), whole.ema.net.state_dict())
    assert same(parts.best, whole.best)
    assert same(parts.optimizer.state_dict(), whole.optimizer.state_dict())
    for name in ("loss_rows", "val_rows", "best_step", "best_val_loss", "skipped"):
        assert getattr(parts.progress, name) == getattr(whole.progress, name), name


def test_a_finished_training_is_not_continued(tiny, tiny_data, tmp_path: Path) -> None:
    config = trained(tiny())
    for _ in train(Trainer(config, tiny_data, tmp_path, CPU)):
        pass
    assert list(train(Trainer(config, tiny_data, tmp_path, CPU))) == []


def test_training_is_plain_adamw_on_the_mean_squared_error(tiny, tiny_data, tmp_path: Path) -> None:
    """Three steps done by hand with torch's own AdamW, loss and clipping."""
    config = trained(
        tiny(
            **{
                "train.grad_clip": 0.5,
                "train.weight_decay": 0.0,
                "train.optimizer": "adamw",
                "train.timesteps": "uniform",
            }
        )
    )
    trainer = Trainer(config, tiny_data, tmp_path, CPU)
    twin = Trainer(config, tiny_data, tmp_path / "twin", CPU)
    net = twin.net
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, config.train.adam_beta2), weight_decay=0.0, fused=False)
    for k in range(3):
        trainer.step()
        source = training.generator(config.seed, "train", k)
        x0 = twin.batches(k)
        t = torch.randint(50, (4,), generator=source)
        eps = torch.empty_like(x0).normal_(generator=source)
        alpha_bar = twin.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t), v).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = config.train.lr * min(1.0, (k + 1) / 2)
        optimizer.step()
    for a, b in zip(trainer.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_learns(tiny, tiny_data, tmp_path: Path) -> None:
    config = trained(
        tiny(**{"train.steps": 200, "train.validate_every": 100, "train.checkpoint_every": 100, "train.lr": 5e-3})
    )
    trainer = Trainer(config, tiny_data, tmp_path, CPU)
    before = trainer.validate()
    for _ in train(trainer):
        pass
    assert trainer.progress.best_val_loss < 0.7 * before


def test_the_best_weights_are_kept_not_the_last(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(trained(tiny()), tiny_data, tmp_path, CPU)
    values = iter([0.5, 0.1, 0.3])
    monkeypatch.setattr(trainer.loss, "validation", lambda *_: next(values))
    kept = []
    for _ in range(3):
        trainer.step()
        trainer.validate()
        kept.append({k: v.clone() for k, v in trainer.ema.net.state_dict().items()})
    assert (trainer.progress.best_step, trainer.progress.best_val_loss) == (2, 0.1)
    assert same(trainer.best, kept[1])
    assert not same(trainer.best, kept[2])


def poisoned(trainer: Trainer, bad: set[int] | range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of these steps hold a NaN, in the sitting's own count (a rollback does not heal them)."""
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
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_three_rollbacks_without_recovery_end_in_a_clear_line(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(trained(tiny(**{"train.steps": 500})), tiny_data, tmp_path, CPU)
    poisoned(trainer, range(5, 10_000), monkeypatch)
    with pytest.raises(UserError, match=r"after 3 rollbacks: lower train\.lr"):
        for _ in train(trainer):
            pass
    assert trainer.progress.skipped == 40


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
    monkeypatch.setattr(training, "code_digest", lambda _: "edited")
    names.add(fingerprint(config, "a"))
    assert len(names) == 5
    assert fingerprint(trained(tiny(**{"sample.num_images": 3})), "a") == fingerprint(config, "a")
