import os
import stat
from pathlib import Path

import pytest
import torch

from diffusion import config
from diffusion.errors import outside
from diffusion.model.model_file import save_model
from diffusion.training import checkpoint


def state(value: float) -> dict[str, object]:
    return {"net": {"w": torch.full((3,), value)}, "progress": {"step": int(value), "rows": [{"loss": value}]}}


def test_the_newest_comes_back_equal(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        checkpoint.save(state(step), tmp_path, step)
    loaded = checkpoint.latest(tmp_path)
    assert loaded["progress"] == {"step": 30, "rows": [{"loss": 30}]}
    assert loaded["net"]["w"].equal(torch.full((3,), 30.0))


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.save(state(step), tmp_path, step)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoint.save(state(1), tmp_path, 1)
    newest = checkpoint.save(state(2), tmp_path, 2)
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes({"cut": raw[: len(raw) // 2], "flip": raw, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        loaded = checkpoint.latest(tmp_path)
    assert loaded["progress"]["step"] == 1


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_file_is_no_spare(tmp_path: Path) -> None:
    """A training that lost its newest file goes on from the one before, which has to outlive the damaged one."""
    checkpoint.save(state(100), tmp_path, 100)
    tear(checkpoint.save(state(200), tmp_path, 200))
    tear(checkpoint.save(state(150), tmp_path, 150))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.latest(tmp_path)["progress"]["step"] == 100


def test_a_file_that_was_damaged_later_is_no_spare(tmp_path: Path) -> None:
    checkpoint.save(state(100), tmp_path, 100)
    tear(checkpoint.save(state(150), tmp_path, 150))
    tear(checkpoint.save(state(200), tmp_path, 200))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.latest(tmp_path)["progress"]["step"] == 100


def test_a_file_is_on_the_disk_before_it_has_its_name_and_before_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves an empty file under a good name, or no file at all."""
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path, step)
    seen: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def name(descriptor: int) -> str:
        return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"

    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(f"fsync {name(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    monkeypatch.setattr(os, "unlink", lambda p: (seen.append("unlink") if Path(p).suffix == ".pt" else None, unlink(p)))
    checkpoint.save(state(3), tmp_path, 3)
    assert seen == ["fsync file", "rename", "fsync folder", "unlink"]


def test_a_checkpoint_of_other_params_is_passed_over(tmp_path: Path, tiny) -> None:
    def of(**changes: object) -> config.TrainedConfig:
        return config.trained(tiny(**changes))

    checkpoint.save(state(1) | {"config": of().model_dump(mode="json")}, tmp_path, 1)
    checkpoint.save(state(2) | {"config": of(**{"train.lr": 0.5}).model_dump(mode="json")}, tmp_path, 2)
    with pytest.warns(UserWarning, match="step_00000002-.* is of other params"):
        assert checkpoint.latest(tmp_path, config=of())["progress"]["step"] == 1
    assert checkpoint.latest(tmp_path, config=of(**{"train.lr": 0.5}))["progress"]["step"] == 2
    with pytest.warns(UserWarning, match="other params"):
        assert checkpoint.latest(tmp_path, config=of(seed=5)) is None
    one_more = of(**{"train.micro_batch": 2, "train.checkpoint_every": 1})  # how it is computed may change
    with pytest.warns(UserWarning, match="other params"):
        assert checkpoint.latest(tmp_path, config=one_more)["progress"]["step"] == 1
    checkpoint.save(state(3), tmp_path, 3)  # as older versions wrote it
    assert checkpoint.latest(tmp_path, config=of())["progress"]["step"] == 3


def test_a_write_that_dies_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(state(1), tmp_path, 1)

    def die(value: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(state(2), tmp_path, 2)
    assert checkpoint.latest(tmp_path)["progress"]["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "never") is None


def test_no_code_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    checkpoint.save({"net": Evil()}, tmp_path, 1)
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoint.latest(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a full disk to try")
@pytest.mark.parametrize("kind", ["checkpoint", "model"])
def test_a_full_disk_is_said_as_such(tmp_path: Path, tiny, kind: str) -> None:
    """PyTorch and safetensors raise errors of their own; tensors of a size that no buffer holds."""
    weights = {"w": torch.zeros(1_000_000)}
    name = {"checkpoint": f"step_{1:08d}", "model": "model.safetensors"}[kind]
    (tmp_path / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    save = {
        "checkpoint": lambda: checkpoint.save({"net": weights}, tmp_path, 1),
        "model": lambda: save_model(tmp_path / "model.safetensors", weights, config.trained(tiny()), {}),
    }[kind]
    with pytest.raises((OSError, RuntimeError)) as caught:
        save()
    line = outside(caught.value)
    assert line
    assert line.startswith("No space left on device")
