import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.states import same
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.config import trained
from diffusion.data.dataset import Batches, Dataset
from diffusion.training import augment, checkpoint, loop
from diffusion.training.loop import Trainer, train
from diffusion.training.loss import Loss

CPU = torch.device("cpu")


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
    assert [row["step"] for row in whole.progress.loss_rows] == [2, 4, 6, 8, 10]
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
                "train.loss_weight": "simple",
            }
        )
    )
    trainer = Trainer(config, tiny_data, tmp_path, CPU)
    twin = Trainer(config, tiny_data, tmp_path / "twin", CPU)
    net = twin.net
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, config.train.adam_beta2), weight_decay=0.0, fused=False)
    for k in range(3):
        trainer.step()
        source = loop.generator(config.seed, "train", k)
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
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)  # Adam makes small differences of gradients large


def test_it_learns(tiny, tiny_data, tmp_path: Path) -> None:
    config = trained(
        tiny(**{"train.steps": 100, "train.validate_every": 100, "train.checkpoint_every": 100, "train.lr": 5e-3})
    )
    trainer = Trainer(config, tiny_data, tmp_path, CPU)
    before = trainer.validate()
    for _ in train(trainer):
        pass
    assert trainer.progress.best_val_loss < 0.85 * before


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


def test_the_last_weights_are_kept_if_that_is_asked(tiny, tiny_data, tmp_path: Path) -> None:
    trainer = Trainer(trained(tiny(**{"train.best_by": "last"})), tiny_data, tmp_path, CPU)
    for _ in train(trainer):
        pass
    assert trainer.progress.best_step == 8
    assert same(trainer.best, trainer.ema.net.state_dict())
    assert same(Trainer(trainer.config, tiny_data, tmp_path, CPU).best, trainer.best)


def test_a_training_goes_on_in_the_precision_that_it_began_with(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(tiny(**{"train.precision": "auto"}))
    for chosen_here in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(loop, "resolve_precision", lambda *_, chosen=chosen_here: chosen)
        trainer = Trainer(config, tiny_data, tmp_path, CPU)
        assert trainer.dtype == trainer.loss.dtype == torch.bfloat16


EVERYTHING_RANDOM = {
    "model.num_classes": 10,
    "model.augment": 0.5,
    "model.dropout": 0.2,
    "train.batch_size": 16,
    "train.label_dropout": 0.5,
    "train.optimizer": "adamw",
}


def test_after_a_rollback_all_noise_is_other_noise(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images at the same step, but t, noise, dropped labels, augmentation and dropout are drawn anew."""
    trainer = Trainer(trained(tiny(**EVERYTHING_RANDOM)), tiny_data, tmp_path, CPU)
    seen: list[list[torch.Tensor]] = []
    training_loss = Loss.training

    def noting(
        self: Loss, net: Any, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, **given: torch.Tensor
    ) -> Any:
        seen.append([t, eps, given["labels"], given["augment"], torch.get_rng_state()])
        return training_loss(self, net, x0, t, eps, **given)

    monkeypatch.setattr(Loss, "training", noting)
    for rollbacks in (0, 1, 2, 1):
        trainer.progress.rollbacks = rollbacks
        trainer._gradients()
    never, once, twice, again = seen
    assert same(once, again)
    for a, b in ((never, once), (once, twice)):
        assert not any(x.equal(y) for x, y in zip(a, b, strict=True))


def test_a_rank_is_told_its_share_of_what_the_batch_is_told(tiny, tiny_data, tmp_path: Path) -> None:
    trainer = Trainer(trained(tiny(**EVERYTHING_RANDOM)), tiny_data, tmp_path, CPU)
    whole, parts = trainer._given(""), []
    for share in (range(5), range(5, 16)):
        trainer.share = share
        trainer.batches = Batches(tiny_data, 16, trainer.config.seed, flip=False, device=CPU, share=share)
        parts.append(trainer._given(""))
    assert len(whole["labels"].unique()) > 2
    for name, expected in whole.items():
        assert torch.cat([part[name] for part in parts]).equal(expected)


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by Python, which on a GPU make the host wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_unless_losses_are_read(tiny, tiny_data, tmp_path: Path) -> None:
    changes = {"train.optimizer": "adamw", "train.log_every": 100, "train.steps": 100, "train.micro_batch": 3}
    trainer = Trainer(trained(tiny(**changes, **{"model.dropout": 0.1})), tiny_data, tmp_path, CPU)
    trainer.reads_every_step = False
    with Reads() as reads:
        records = [trainer.step() for _ in range(9)]
        assert reads.count == 0
        assert math.isfinite(records[-1].loss)
        assert reads.count == 1, "the counter counts"
    assert [step for step in range(1, 101) if trainer.reads(step)] == [*range(10, 101, 10)]


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_micro_batches_add_up_to_the_batch(tiny, tiny_data, tmp_path: Path, micro_batch: int) -> None:
    found = []
    for size in (None, micro_batch):
        config = trained(tiny(**{"train.batch_size": 8, "train.micro_batch": size, "train.loss_weight": "min_snr"}))
        trainer = Trainer(config, tiny_data, tmp_path / str(size), CPU)
        with torch.no_grad():
            for p in trainer.net.parameters():
                p.add_(0.02)  # the last layer starts at zero, and would hide the gradients of the others
        found.append([trainer._gradients(), *[p.grad for p in trainer.net.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_bf16_follows_fp32_within_the_noise_of_seeds(tiny, tiny_data, tmp_path: Path) -> None:
    """Mean loss of each third of 60 steps: the two precisions differ, on every seed, by less than a fifth of the
    standard deviation over seeds.
    """
    curves: dict[str, list[torch.Tensor]] = {"fp32": [], "bf16": []}
    for precision, found in curves.items():
        for seed in range(3):
            config = trained(tiny(seed=seed, **{"train.precision": precision, "train.steps": 60, "train.lr": 2e-3}))
            trainer = Trainer(config, tiny_data, tmp_path / f"{precision}-{seed}", CPU)
            found.append(torch.tensor([trainer.step().loss for _ in range(60)]).view(3, 20).mean(dim=1))
    fp32, bf16 = torch.stack(curves["fp32"]), torch.stack(curves["bf16"])
    noise = fp32.std(dim=0)
    assert fp32[:, 2].mean() < fp32[:, 0].mean(), "it learns"
    assert not bf16.equal(fp32), "bf16 is not used"
    assert ((bf16 - fp32).abs() < 0.2 * noise).all(), (bf16 - fp32, noise)


def test_compiling_changes_neither_the_numbers_nor_the_names(
    tiny, tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torch.compile's tracer alone (backend "eager"): the same operations, so the same bits."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    trainers = []
    for choice in ("off", "on"):
        config = trained(tiny(**{"train.compile": choice, "train.batch_size": 3, "train.micro_batch": 2}))
        trainers.append(Trainer(config, tiny_data, tmp_path / choice, CPU))
        trainers[-1].step(), trainers[-1].step()
        trainers[-1].save()
    plain, other = trainers
    assert other._forward is not other.net
    assert same(plain.net.state_dict(), other.net.state_dict())
    assert same(plain.ema.net.state_dict(), other.ema.net.state_dict())
    assert same(checkpoint.latest(tmp_path / "on")["net"], plain.net.state_dict())


def test_the_network_is_told_the_class_of_all_images_but_the_dropped_ones(
    tiny, tiny_data: Dataset, tmp_path: Path
) -> None:
    overrides = {"model.num_classes": 10, "train.label_dropout": 0.3, "train.batch_size": 40}
    trainer = Trainer(trained(tiny(**overrides)), tiny_data, tmp_path, torch.device("cpu"))
    dropped = 0
    for step in range(100):
        trainer.progress.step = step
        told, true = trainer._given("")["labels"], trainer.batches.labels(step)
        assert told[told >= 0].tolist() == true[told >= 0].tolist()
        dropped += int((told == -1).sum())
    assert dropped / 4000 == pytest.approx(0.3, abs=0.03)  # four standard deviations


def test_the_network_sees_augmented_images_and_is_told_what_was_done(
    tiny, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are augmented before the noise is added, and a model that is not asked to does neither."""
    seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    training_loss = Loss.training

    def noting(self: Loss, net: Any, x0: torch.Tensor, *arguments: Any, **given: torch.Tensor) -> torch.Tensor:
        seen.append((x0, given))
        return training_loss(self, net, x0, *arguments, **given)

    monkeypatch.setattr(Loss, "training", noting)
    for probability in (0.0, 0.5):
        config = trained(tiny(**{"model.augment": probability}))
        trainer = Trainer(config, tiny_data, tmp_path / str(probability), torch.device("cpu"))
        trainer.step()
    (plain, nothing), (changed, told) = seen
    assert nothing == {}
    assert told["augment"].ne(0).any()
    assert changed.ne(plain).any()
    torch.testing.assert_close(changed, augment.applied(plain, told["augment"]))
    for _ in range(2):  # the head and the blocks' last convolutions begin at zero and let no gradient through
        trainer.step()
    assert trainer.net.augment_embedding.weight.grad.ne(0).any()  # type: ignore[union-attr]
