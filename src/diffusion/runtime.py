"""Where and how arithmetic runs: device, precision, and random numbers that depend on (seed, purpose, index) alone."""

import contextlib
import ctypes
import hashlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn

from diffusion.errors import UserError

# A compilation takes a minute or two: so many steps are needed before faster steps have paid for it.
COMPILE_STEPS = 2000


def resolve_device(name: str) -> torch.device:
    """Device for `auto | cpu | cuda | mps`; auto takes cuda, then mps, then cpu.

    Raises:
        UserError: the named device is not on this machine.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in present.items() if here)
    if not present[name]:
        here = ", ".join(device for device, is_here in present.items() if is_here)
        raise UserError(f"device: {name} is not available on this machine (it has {here}): use auto, or one of these")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Data type of the network's arithmetic for `auto | fp32 | bf16`.

    auto is bf16 only where that is the faster of the two.
    """
    if name == "auto":
        native = {"cuda": _cuda_has_bf16, "cpu": _cpu_has_bf16}.get(device.type, lambda: False)()
        return torch.bfloat16 if native else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch on a CUDA device, elsewhere by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def generator(seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of (seed, purpose, index): no draw depends on what was drawn before."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def use_fast_kernels(device: torch.device) -> None:
    """CUDA: TF32 for products and convolutions in float32, cuDNN's algorithms chosen by trial. Others: no effect."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def compiled(net: nn.Module, choice: str, device: torch.device, steps: int) -> nn.Module:
    """`net` behind torch.compile for `auto | on | off`, to be trained for `steps` steps; its parameters are shared.

    auto goes on uncompiled where compiling fails (no C compiler, no Triton).
    """
    if choice == "off" or (choice == "auto" and (device.type != "cuda" or steps < COMPILE_STEPS)):
        return net
    if choice == "auto":
        torch._dynamo.config.suppress_errors = True
    # The default mode, without CUDA graphs: they keep gradients in memory that the next replay overwrites, which does
    # not go with accumulation or DDP, and at batches that fill a GPU launching kernels is not what takes the time.
    return cast(nn.Module, torch.compile(net, dynamic=False))


def keep_freed_memory() -> None:
    """Stop glibc from handing large freed blocks back to the system, which costs page faults in every step.

    A training step on two cores takes about a tenth less time with it (benchmarks/malloc.py). Other systems: no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


@contextlib.contextmanager
def seeded(seed: int, purpose: str, index: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block (dropout takes no generator) and restore them after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, purpose, index).initial_seed())
        yield


def _cuda_has_bf16() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def _cpu_has_bf16() -> bool:
    """Intel's cores without AMX have bf16 products too, but no faster than fp32's (benchmarks/precision.py)."""
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _cpu_vendor() != "Intel")


def _cpu_vendor() -> str:
    """Intel, AMD ... as Linux tells; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip().removeprefix("Genuine").removeprefix("Authentic")
    return ""
