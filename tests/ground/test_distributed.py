"""Processes that work together: the same training whatever their number, and one decision when something ends it."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import run, run_all, wait_for_checkpoint, write_params
from helpers.preloaded import Command
from helpers.worlds import in_world
from safetensors.torch import load_file

from diffusion import paths
from diffusion.config import TrainedConfig, trained
from diffusion.data.dataset import Dataset
from diffusion.distributed import SINGLE_PROCESS, World
from diffusion.errors import StopRequest, UserError
from diffusion.params_file import load
from diffusion.pipeline.train import _loop
from diffusion.tracking.tracker import Tracker
from diffusion.training import checkpoint
from diffusion.training.loop import Trainer, train

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "size"), [(64, 3), (7, 2), (5, 5), (2, 3), (0, 2), (10, 1)])
def test_shares_are_a_fair_partition_in_order(count: int, size: int) -> None:
    shares = [World(rank, size, rank).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def talk(world: World, device: torch.device) -> dict[str, Any]:
    def failing(on: int) -> str:
        try:
            return world.together(lambda: refuse() if world.rank == on else "fine")
        except UserError as error:
            return f"told: {error}"
        except SystemExit as exit_:
            return f"status {exit_.code}"

    def refuse() -> str:
        raise UserError("rank 1 has no data")

    world.barrier()
    mine = torch.tensor([world.rank, 1.0])
    return {
        "sum": world.sum_(mine) is mine and mine.tolist(),
        "gather": world.gather({"images": np.arange(world.rank + 1).tolist()}),
        "broadcast": world.broadcast(f"from {world.rank}"),
        "any": [world.any(world.rank == 2), world.any(False)],
        "fine": failing(on=-1),
        "failing": failing(on=1),
    }


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    results = in_world(3, tmp_path, talk)
    assert [r["sum"] for r in results] == [[3.0, 3.0]] * 3
    assert [r["gather"] for r in results] == [[{"images": [0]}, {"images": [0, 1]}, {"images": [0, 1, 2]}], None, None]
    assert [r["broadcast"] for r in results] == ["from 0"] * 3
    assert [r["any"] for r in results] == [[True, False]] * 3
    assert [r["fine"] for r in results] == ["fine"] * 3
    assert [r["failing"] for r in results] == ["told: rank 1 has no data", "status 2", "status 2"]


def test_a_lone_process_needs_no_group() -> None:
    assert not torch.distributed.is_initialized()
    tensor = torch.ones(2)
    assert SINGLE_PROCESS.sum_(tensor) is tensor
    assert (
        SINGLE_PROCESS.gather("x"),
        SINGLE_PROCESS.broadcast("x"),
        SINGLE_PROCESS.any(True),
        SINGLE_PROCESS.any(False),
    ) == (["x"], "x", True, False)
    with pytest.raises(UserError, match="no data"):
        SINGLE_PROCESS.together(lambda: SINGLE_PROCESS.fail("no data"))


def curve(
    world: World, device: torch.device, config: TrainedConfig, data: Dataset, folder: Path, steps: int
) -> dict[str, Any]:
    """Losses and gradient norms of `steps` steps, and what they end in."""
    trainer = Trainer(config, data, folder, device, world)
    losses = [trainer.step().loss for _ in range(steps)]
    norms = [row["grad_norm"] for row in trainer.progress.loss_rows]
    return {"losses": losses, "norms": norms, "val": trainer.validate(), "ema": trainer.ema.net.state_dict()}


def test_1_2_and_3_processes_train_alike(tiny, tiny_data, tmp_path: Path) -> None:
    """A batch of 7: shares of 3 + 4, and of 2 + 2 + 3, the latter in micro-batches of 2 + 1."""
    changes = {"train.batch_size": 7, "train.log_every": 1, "train.steps": 20, "train.grad_clip": 0.5}
    config = trained(tiny(**changes))
    alone = curve(SINGLE_PROCESS, CPU, config, tiny_data, tmp_path / "1", 20)
    assert len(set(alone["losses"])) == 20
    for size, micro_batch in ((2, None), (3, 2)):
        config = trained(tiny(**changes, **{"train.micro_batch": micro_batch}))
        folder = tmp_path / str(size)
        ranks = in_world(size, folder, curve, config, tiny_data, folder, 20)
        for found in ranks:
            np.testing.assert_allclose(found["losses"], alone["losses"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(found["norms"], alone["norms"], rtol=1e-3)
            assert found["val"] == pytest.approx(alone["val"], abs=1e-5)
            for name, weight in found["ema"].items():
                # Muon orthogonalises in bf16: a last bit of a gradient can move a weight by lr / 256 a step.
                torch.testing.assert_close(weight, alone["ema"][name], rtol=0, atol=5e-4)
                assert weight.equal(ranks[0]["ema"][name]), "the ranks drift apart"
        assert len(list(folder.glob("step_*.pt"))) == 1, "rank 0 alone writes"


def stopped(world: World, device: torch.device, config: TrainedConfig, data: Dataset, folder: Path) -> dict[str, Any]:
    """What the train stage does when rank 1 alone gets a signal, after its third step."""
    trainer = Trainer(config, data, folder, device, world)
    take = trainer.step

    def step() -> Any:
        if trainer.progress.step == 3 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    trainer.step = step  # type: ignore[method-assign]
    with StopRequest() as stop:
        ending = ending_of(lambda: _loop(trainer, Tracker(), stop))
    return {"step": trainer.progress.step, "ending": ending}


def diverged(world: World, device: torch.device, config: TrainedConfig, data: Dataset, folder: Path) -> dict[str, Any]:
    """Rank 1's images are not finite from the sixth step on."""
    trainer = Trainer(config, data, folder, device, world)
    batches, steps = trainer.batches, []
    factor = float("nan") if world.rank == 1 else 1.0
    trainer.batches = lambda step: batches(step) * (factor if step >= 5 else 1.0)  # type: ignore[assignment]
    ending = ending_of(lambda: steps.extend(record.step for record in train(trainer)))
    return {"skipped": trainer.progress.skipped, "rollbacks": trainer.progress.rollbacks, "ending": ending}


def ending_of(work: Callable[[], None]) -> str:
    try:
        work()
    except (UserError, KeyboardInterrupt) as error:
        return str(error)
    except SystemExit as exit_:
        return f"status {exit_.code}"
    return "the end"


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny, tiny_data, tmp_path: Path) -> None:
    changes = {"train.steps": 50, "train.checkpoint_every": 50, "train.validate_every": 50, "train.preview_every": 50}
    found = in_world(3, tmp_path, stopped, trained(tiny(**changes)), tiny_data, tmp_path)
    assert [r["step"] for r in found] == [4] * 3
    assert [r["ending"] for r in found] == ["stopped at step 4; `dvc repro` goes on from there"] + ["status 130"] * 2
    assert checkpoint.latest(tmp_path)["progress"]["step"] == 4


def test_what_is_not_finite_on_one_process_is_skipped_by_all(tiny, tiny_data, tmp_path: Path) -> None:
    found = in_world(2, tmp_path, diverged, trained(tiny(**{"train.steps": 50})), tiny_data, tmp_path)
    assert [(r["skipped"], r["rollbacks"]) for r in found] == [(40, 3)] * 2
    assert "after 3 rollbacks: lower train.lr" in found[0]["ending"]
    assert found[1]["ending"] == "status 2"


LONG = {"train.steps": 60, "train.preview_every": 60, "train.validate_every": 20, "train.checkpoint_every": 15}


def best_of(world: World, device: torch.device, config: TrainedConfig, folder: Path) -> dict[str, Any]:
    trainer = Trainer(config, Dataset.load(), folder, device, world)
    for _ in train(trainer):
        pass
    return trainer.best


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, oldest first."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes is SIGKILLed: the stage says so, and goes on when it is run again, here by torchrun.

    It ends in the weights of two that were let alone, bit for bit.
    """
    write_params(**LONG, **{"train.processes": 2})
    run_all("prepare")
    process = Command("stages.train")
    wait_for_checkpoint(30, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said = process.wait()
    assert process.returncode == 2
    assert re.findall("^error: .*", said, re.MULTILINE) == [
        "error: process 1 of 2 was killed (signal 9): `dvc repro` goes on from what was saved"
    ]
    write_params(**LONG)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the README says
    process = Command("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "stages.train")
    said = process.wait()
    assert process.returncode == 0, said
    assert said.count("resuming at step") == 1
    metrics = json.loads(paths.TRAIN_METRICS.read_text())
    assert (metrics["processes"], metrics["images_seen"]) == (2, 60 * 4)
    expected = in_world(2, workspace / "alone", best_of, trained(load("params.yaml")), workspace / "alone")[0]
    for name, weight in load_file(paths.MODEL).items():
        assert weight.equal(expected[name]), name


@pytest.mark.slow
def test_a_stage_of_several_processes_ends_as_one_does(workspace: Path) -> None:
    """One line and status 2 for a mistake; SIGTERM to the stage saves once; then one process finishes the training."""
    write_params(**LONG, **{"train.processes": 2})
    process = Command("stages.train")
    said = process.wait()
    assert (process.returncode, said.count("error: "), len(said.splitlines())) == (2, 1, 1), said

    run_all("prepare")
    process = Command("stages.train")
    wait_for_checkpoint(15, process)
    process.send_signal(signal.SIGTERM)
    said = process.wait()
    assert process.returncode == 130
    assert len(re.findall(r"stopped at step \d+; `dvc repro` goes on from there", said)) == 1, said
    assert "Traceback" not in said

    write_params(**LONG, **{"train.processes": 1, "train.micro_batch": 3})
    assert "resuming at step" in run("train").output
    assert json.loads(paths.TRAIN_METRICS.read_text())["processes"] == 2  # as it began
