"""Processes that work together: joining the ones that torchrun started, and starting them on one machine.

A lone process is a world of one: the same code runs in it, and no process group is made.
"""

import contextlib
import datetime
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.errors import UserError
from diffusion.runtime import resolve_device

# Rank 0 alone draws previews and writes outputs while the others wait in a collective.
TIMEOUT = datetime.timedelta(minutes=30)
STOP_SECONDS = 120  # for a worker to end its step and save, once it was asked to stop

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes that work together, seen from one of them: 0 <= rank < size; local_rank counts within a machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files, tracks and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of range(count): contiguous, in the order of ranks, sizes differing by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, obj: Any) -> list[Any] | None:
        """The objects of all ranks in their order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(obj, found)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.any(False)  # dist.barrier would pick the GPU, and so wait for all that is queued there

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.size == 1:
            return obj
        held = [obj]
        dist.broadcast_object_list(held)
        return held[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank; through the CPU: no GPU is waited for."""
        return bool(self.sum_(torch.tensor(int(flag))) > 0)

    def together(self, work: Callable[[], Result]) -> Result:
        """`work()` of every rank. If it raises UserError on one, no rank goes on, so that none waits for it for ever.

        Raises:
            UserError: on rank 0 it failed, or rank 0 speaks for the rank where it did.
            SystemExit: status 2 on the other ranks, so that the message is printed once.
        """
        result, problem = None, ""
        try:
            result = work()
        except UserError as error:
            if self.size == 1:
                raise
            problem = str(error)
        problems: list[str] = self.broadcast(self.gather(problem)) or []
        if any(problems):
            self.fail(next(filter(None, problems)))
        return result  # type: ignore[return-value]  # it did not raise

    def fail(self, message: str, kind: type[UserError] = UserError) -> NoReturn:
        """End all ranks, which must all call it, with one printed line.

        Raises:
            UserError: on rank 0, of that `kind`.
            SystemExit: status 2 on the others.
        """
        if self.is_main:
            raise kind(message)
        self.leave(2)

    def leave(self, status: int) -> NoReturn:
        """End a rank other than 0 in silence, once rank 0 has left the world: torchrun stops all when one has failed.

        Raises:
            SystemExit: with `status`.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, as soon as rank 0 has ended
        with contextlib.suppress(RuntimeError):
            self.barrier()  # rank 0 does not come: this ends when it closes its connections
        sys.exit(status)


SINGLE_PROCESS = World(rank=0, size=1, local_rank=0)


def is_worker() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@contextlib.contextmanager
def joined(device_name: str) -> Iterator[tuple[World, torch.device]]:
    """The world that torchrun's environment describes, and this process's device for `auto | cpu | cuda | mps`.

    CUDA: each process of a machine has the GPU of its local rank. One that torchrun did not start is SINGLE_PROCESS.

    Raises:
        UserError: the device is not on this machine, or the machine has fewer GPUs than processes.
    """
    device = resolve_device(device_name)
    size = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    if size == 1:
        yield SINGLE_PROCESS, device
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    backend = "gloo"
    if device.type == "cuda":
        if torch.cuda.device_count() <= world.local_rank:
            raise UserError(f"there are more processes than the {torch.cuda.device_count()} GPUs here: start fewer")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what the processes tell each other besides tensors needs no GPU
    elif device.type != "cpu":
        raise UserError(f"several processes cannot share one {device.type} device: set processes: 1, or device: cpu")
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield world, device
    finally:
        dist.destroy_process_group()


def launch(processes: int, module: str, args: Sequence[str]) -> None:
    """Run `python -m module args` in `processes` processes of this machine: torchrun, but only they say what is wrong.

    SIGINT and SIGTERM are handed on to them.

    Raises:
        UserError: one was killed, which could not say so.
        SystemExit: with the exit status of the one that failed first, 130 after SIGINT or SIGTERM.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # torchrun's own words about each of them
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    torchrun = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}", "-m"]
    try:
        run.main([*torchrun, module, *args])
    except SignalException:
        sys.exit(130)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            why = f"was killed (signal {-failure.exitcode})"
            raise UserError(f"process {rank} of {processes} {why}: `dvc repro` goes on from what was saved") from None
        sys.exit(failure.exitcode)


def data_parallel(net: nn.Module) -> DistributedDataParallel:
    """`net` with gradients that are means over the ranks; its only buffer is a constant table, never synchronised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers, 2.11 has no other name
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
