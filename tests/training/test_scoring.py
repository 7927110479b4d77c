"""fd_lite0 during training: what it is the distance of, that it can pick the weights, that resuming changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import SmallLite0
from helpers.states import same
from helpers.worlds import in_world

from diffusion.config import TrainedConfig, trained
from diffusion.data.dataset import Dataset
from diffusion.distributed import World
from diffusion.errors import UserError
from diffusion.metrics import frechet_distance
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.reference import Reference
from diffusion.model.denoiser import Denoiser
from diffusion.sampling.generation import generate
from diffusion.training import identity, scoring
from diffusion.training.identity import fingerprint
from diffusion.training.loop import Trainer, train
from diffusion.training.scoring import Scorer, preview_config

CPU = torch.device("cpu")
ON = {"train.evaluate_every": 3, "train.evaluate_images": 7, "train.best_by": "fd_lite0"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "EfficientNetLite0", SmallLite0)


def trainer_in(folder: Path, config: TrainedConfig, data: Dataset, world: World | None = None) -> Trainer:
    return Trainer(config, data, folder, CPU, *([world] if world else []), score=Scorer(config, data, folder, CPU))


def test_it_is_the_distance_of_ema_samples_to_training_images(tiny, tiny_data: Dataset, tmp_path: Path) -> None:
    config = trained(tiny(**ON))
    trainer = trainer_in(tmp_path, config, tiny_data)
    trainer.step()
    found = trainer.evaluate()
    denoiser = Denoiser(trainer.ema.net, trainer.schedule, config.diffusion.prediction, clip_x0=True)
    batches = generate(denoiser, preview_config(config.train), config.seed, range(7), CPU)
    made = moments_of(torch.cat([*batches]).numpy(), SmallLite0(), 5, CPU, "made")
    real = moments_of(tiny_data.images[:40].numpy(), SmallLite0(), 5, CPU, "real")  # not the 12 for validation
    assert found == pytest.approx(frechet_distance(made.mean, made.cov, real.mean, real.cov), rel=1e-5)


def test_a_resumed_training_has_the_same_scores_and_weights(tiny, tiny_data: Dataset, tmp_path: Path) -> None:
    """Stopped after a value that no checkpoint holds yet: it is computed again, to the bit."""
    config = trained(tiny(**ON, **{"train.steps": 11, "train.checkpoint_every": 5}))
    whole = trainer_in(tmp_path / "whole", config, tiny_data)
    records = [record.fd_lite0 for record in train(whole)]
    assert [i + 1 for i, value in enumerate(records) if value is not None] == [3, 6, 9, 11]
    for record in train(trainer_in(tmp_path / "parts", config, tiny_data)):
        torch.randn(7)  # whatever the process did before must not matter
        if record.step == 9:
            break
    parts = trainer_in(tmp_path / "parts", config, tiny_data)
    assert [row["step"] for row in parts.progress.fd_rows] == [3]
    for _ in train(parts):
        pass
    assert parts.progress.fd_rows == whole.progress.fd_rows
    assert (parts.progress.best_step, parts.progress.best_fd_lite0) == (
        whole.progress.best_step,
        whole.progress.best_fd_lite0,
    )
    assert same(parts.best, whole.best)
    assert same(parts.net.state_dict(), whole.net.state_dict())


@pytest.mark.parametrize("damage", ["torn", "another version"])
def test_a_reference_that_does_not_serve_is_made_anew(
    tiny,
    tiny_data: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    config, file = trained(tiny(**ON)), tmp_path / "fd_lite0.npz"
    expected = Scorer(config, tiny_data, tmp_path, CPU).reference()
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        monkeypatch.setattr(SmallLite0, "describe", lambda self: {"extractor": "colours", "implementation": "2"})
    again = Scorer(config, tiny_data, tmp_path, CPU).reference()
    np.testing.assert_array_equal(again.cov, expected.cov)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "made anew" in line)
    assert "dvc repro" not in line
    assert Reference.load(file, Scorer(config, tiny_data, tmp_path, CPU).extractor.describe()).key == again.key


def unwritable(world: World, device: torch.device, config: TrainedConfig, data: Dataset, folder: Path) -> str:
    def full(self: object, path: Path) -> None:
        raise UserError("no place")

    scoring.EfficientNetLite0, scoring.Reference.save = SmallLite0, full  # type: ignore[assignment,misc,method-assign]
    try:
        trainer_in(folder, config, data, world).evaluate()
    except (UserError, SystemExit) as error:
        return type(error).__name__
    return "went on"


def test_processes_agree_that_a_reference_failed(tiny, tiny_data: Dataset, tmp_path: Path) -> None:
    found = in_world(2, tmp_path, unwritable, trained(tiny(**ON)), tiny_data, tmp_path / "run")
    assert found == ["UserError", "SystemExit"]


def test_looking_changes_nothing(tiny, tiny_data: Dataset, tmp_path: Path) -> None:
    """The weights of a training that is scored are those of one that is not."""
    scored = trainer_in(tmp_path / "a", trained(tiny(**ON | {"train.best_by": "val_loss"})), tiny_data)
    plain = Trainer(trained(tiny()), tiny_data, tmp_path / "b", CPU)
    for one in (scored, plain):
        for _ in train(one):
            pass
    assert len(scored.progress.fd_rows) == 3
    assert same(scored.ema.net.state_dict(), plain.ema.net.state_dict())
    assert same(scored.best, plain.best)


@pytest.mark.parametrize(("best_by", "expected"), [("val_loss", 2), ("fd_lite0", 3)])
def test_the_kept_weights_are_the_best_by_what_is_asked(
    tiny, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_by: str, expected: int
) -> None:
    losses, distances = iter([0.5, 0.1, 0.3, 0.2]), iter([40.0, 30.0, 20.0, 30.0])
    config = trained(tiny(**ON | {"train.best_by": best_by}))
    trainer = Trainer(config, tiny_data, tmp_path, CPU, score=lambda _: next(distances))
    monkeypatch.setattr(trainer.loss, "validation", lambda *_, **__: next(losses))
    kept = []
    for _ in range(4):
        trainer.step()
        trainer.validate()
        trainer.evaluate()
        kept.append({k: v.clone() for k, v in trainer.ema.net.state_dict().items()})
    assert trainer.progress.best_step == expected
    assert (trainer.progress.best_val_loss, trainer.progress.best_fd_lite0) == (0.1, 20.0)
    assert same(trainer.best, kept[expected - 1])


def scores(world: World, device: torch.device, config: TrainedConfig, data: Dataset, folder: Path) -> list[float]:
    scoring.EfficientNetLite0 = SmallLite0  # type: ignore[assignment,misc]
    trainer = trainer_in(folder, config, data, world)
    for _ in train(trainer):
        pass
    return [row["fd_lite0"] for row in trainer.progress.fd_rows]


def test_processes_share_the_samples_and_agree(tiny, tiny_data: Dataset, tmp_path: Path) -> None:
    config = trained(tiny(**ON, **{"train.steps": 3}))
    alone = trainer_in(tmp_path / "1", config, tiny_data)
    for _ in train(alone):
        pass
    ranks = in_world(2, tmp_path / "2", scores, config, tiny_data, tmp_path / "2")
    assert ranks[0] == ranks[1]
    np.testing.assert_allclose(ranks[0], [row["fd_lite0"] for row in alone.progress.fd_rows], rtol=0.02)


def test_what_is_scored_is_part_of_a_trainings_name_only_if_it_is(
    tiny, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, on = trained(tiny()), trained(tiny(**ON))
    before = fingerprint(off, "data"), fingerprint(on, "data")
    whole, edited = identity.code_digests, {"training/scoring.py": "edited"}
    monkeypatch.setattr(
        identity,
        "code_digests",
        lambda *s, **k: (found := whole(*s, **k)) | {p: v for p, v in edited.items() if p in found},
    )
    assert (fingerprint(off, "data") == before[0], fingerprint(on, "data") == before[1]) == (True, False)
    with pytest.raises(ValueError, match="nothing computes it"):
        Trainer(on, tiny_data, tmp_path, CPU)
