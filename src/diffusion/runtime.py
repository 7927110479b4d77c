"""Where and how arithmetic runs: device, precision, and random numbers that depend on (seed, purpose, index) alone."""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator

import torch

from diffusion.errors import UserError


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

    auto is bf16 only where the hardware multiplies it natively; elsewhere it is emulated and slower than fp32.
    """
    if name == "auto":
        native = {"cuda": _cuda_has_bf16, "cpu": _cpu_has_bf16}.get(device.type, lambda: False)()
        return torch.bfloat16 if native else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def generator(seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of (seed, purpose, index): no draw depends on what was drawn before."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


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
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
