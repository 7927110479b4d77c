"""How fast is it? Rates of the machine, of a training step and of sampling, ours and peers' in turn.

A unit of work is timed between two synchronisations of the device; the contestants take turns, and medians count.
"""

import gc
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from gpu_session import Part
from machine import machine
from rates import conv_rate, forward_flops, matmul_rate, synchronize, timed

from diffusion.config import Params, trained
from diffusion.data.dataset import Dataset
from diffusion.model.denoiser import Denoiser
from diffusion.model.schedules import configured_schedule
from diffusion.model.unet import UNet
from diffusion.sampling import generation
from diffusion.training.loop import Trainer

TURNS = 5
TURN_SECONDS = 1.0  # of a contestant's turn, at least
WARM_UP = 3
EVALUATIONS = 20  # of a sampling run
SAMPLING_BATCH = 512  # if the recipe leaves it open

Build = Callable[[], peers.Step]


def measure_machine(part: Part, device: torch.device) -> None:
    """GPU, driver, versions; the rates that everything is measured against."""
    part.keep(**machine(), device=device.type, driver=_driver(), cudnn=torch.backends.cudnn.version())
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        part.keep(memory_gib=round(facts.total_memory / 2**30, 1), multiprocessors=facts.multi_processor_count)
    big = device.type == "cuda"
    part.keep(matmul_tflops=matmul_rate(8192 if big else 256, 50 if big else 4, device))
    part.say(f"{machine()['gpu'] or device.type}; bf16 matrix product {part.entry['matmul_tflops']:.4g} TFLOP/s")
    rates: dict[str, float] = {}
    for channels, size in ((128, 32), (256, 16), (256, 8)):
        rates[f"3x3x{channels}_at_{size}"] = conv_rate(channels, size, 512 if big else 1, device)
        part.keep(conv_tflops=rates)
    part.say(f"bf16 3x3 convolutions, forward and backward: {rates}")


def measure_training(part: Part, params: Params, data: Dataset, batch_sizes: list[int], device: torch.device) -> None:
    """Images a second of a whole training step at each batch size, as long as there is time."""
    flops = forward_flops(params.model)
    part.keep(forward_gflop_per_image=round(flops / 1e9, 4), batches={}, diffusers=find_spec("diffusers") is not None)
    part.keep(parameters=sum(p.numel() for p in UNet(params.model).parameters()))
    matmul = part.session.result["parts"].get("machine", {}).get("matmul_tflops")
    longest = 0.0
    for batch_size in batch_sizes:
        if longest and part.left() < 0.8 * longest:
            part.say(f"no time for batch {batch_size}")
            continue
        start = time.monotonic()
        entry: dict[str, Any] = {}
        part.entry["batches"][str(batch_size)] = entry
        with tempfile.TemporaryDirectory() as folder:
            contestants = _training_contestants(params, data, batch_size, Path(folder), device)
            compete(part, entry, contestants, batch_size, "images/s", device)
        release(device)
        part.keep(tf32={"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.get_float32_matmul_precision()})
        if matmul:
            for found in (f for f in entry.values() if "images/s" in f):
                found["share_of_matmul_rate"] = round(found["images/s"] * 3 * flops / matmul / 1e12, 4)
        part.keep()
        longest = max(longest, time.monotonic() - start)


def measure_sampling(part: Part, params: Params, device: torch.device) -> None:
    """Network evaluations of one image a second while sampling with DDIM."""
    batch_size = params.sample.batch_size or SAMPLING_BATCH
    params = params.model_copy(update={"sample": params.sample.model_copy(update={"batch_size": batch_size})})
    entry: dict[str, Any] = {}
    part.keep(batch_size=batch_size, evaluations_per_image=EVALUATIONS, contestants=entry)
    ours = partial(_our_sampling, params, device)
    contestants: dict[str, Build] = {
        "ours": partial(ours, torch.bfloat16, compiled=device.type == "cuda", channels_last=True)
    }
    if device.type == "cuda":
        contestants["ours_uncompiled"] = partial(ours, torch.bfloat16, compiled=False, channels_last=True)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        contestants[f"plain_{name}"] = partial(ours, dtype, compiled=False, channels_last=False)
        contestants[f"diffusers_{name}"] = partial(_diffusers_sampling, params, batch_size, device, dtype)
    compete(part, entry, _present(contestants), batch_size * EVALUATIONS, "evaluations/s", device)
    release(device)


def compete(
    part: Part, entry: dict[str, Any], contestants: Mapping[str, Build], amount: int, unit: str, device: torch.device
) -> None:
    """Fill `entry` with each contestant's median rate, `amount` units a step, and our ratio to it."""
    ready: dict[str, tuple[peers.Step, int]] = {}
    for name, build in contestants.items():
        if ready and part.left() < 0:
            entry[name] = {"skipped": "no time left"}
            continue
        entry[name] = _prepare(build, device, ready, name)
        part.keep()
        part.say(f"{amount} a step, {name}: {entry[name]}")
    turns: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(TURNS):
        for name, (step, count) in ready.items():
            seconds = timed(step, count, device)
            turns[name].append(amount * count / seconds)
            entry[name] |= {unit: round(median(turns[name]), 2), "turns": [round(r, 2) for r in turns[name]]}
            entry[name] |= {"peak_memory_gib": _peak_memory(device)} if device.type == "cuda" else {}
        part.keep()
        if part.left() < 0:
            break
    ours = entry.get("ours", {}).get(unit)
    for name in ready:
        entry[name] |= {"ours_is_times": round(ours / entry[name][unit], 3)} if ours else {}
        part.say(f"{amount} a step, {name}: {entry[name][unit]:.4g} {unit}")
    part.keep()


def with_compile(params: Params, section: str, wanted: bool) -> Params:
    """`params` with train.compile or sample.compile as `wanted`."""
    changed = getattr(params, section).model_copy(update={"compile": "on" if wanted else "off"})
    return params.model_copy(update={section: changed})


def release(device: torch.device) -> None:
    """Forget compiled code and freed memory of contestants that are done: dynamo stops after eight recompilations."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _training_contestants(
    params: Params, data: Dataset, batch_size: int, folder: Path, device: torch.device
) -> Mapping[str, Build]:
    timed = {"batch_size": batch_size, "steps": 10**6, "precision": "bf16"}
    params = params.model_copy(update={"train": params.train.model_copy(update=timed)})
    cuda = device.type == "cuda"
    found: dict[str, Build] = {"ours": partial(_our_training, params, data, folder / "ours", device, compiled=cuda)}
    if cuda:
        found["ours_uncompiled"] = partial(_our_training, params, data, folder / "eager", device, compiled=False)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        arguments = (params.model, params.train, data, device, dtype)
        found[f"diffusers_{name}"] = partial(peers.DiffusersTraining, *arguments)
        found[f"plain_{name}"] = partial(peers.plain_training, *arguments)
    return _present(found)


def _present(contestants: Mapping[str, Build]) -> Mapping[str, Build]:
    have = find_spec("diffusers") is not None
    return {name: build for name, build in contestants.items() if have or not name.startswith("diffusers")}


def _our_training(params: Params, data: Dataset, folder: Path, device: torch.device, *, compiled: bool) -> peers.Step:
    trainer = Trainer(trained(with_compile(params, "train", compiled)), data, folder, device)
    return lambda: _ignore(trainer.step())


def _our_sampling(
    params: Params, device: torch.device, dtype: torch.dtype, *, compiled: bool, channels_last: bool
) -> peers.Step:
    net = UNet(params.model).to(device).eval().requires_grad_(False)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    params = with_compile(params, "sample", compiled)
    schedule = configured_schedule(params.diffusion).to(device)
    denoiser = Denoiser(net, schedule, params.diffusion.prediction, dtype=dtype, clip_x0=True)
    config = params.sample.model_copy(update={"sampler": "ddim", "eta": 0.0, "steps": EVALUATIONS})
    images = range(config.batch_size or SAMPLING_BATCH)
    return lambda: _ignore(list(generation.generate(denoiser, config, 0, images, device)))


def _diffusers_sampling(params: Params, batch_size: int, device: torch.device, dtype: torch.dtype) -> peers.Step:
    net = peers.diffusers_unet(params.model).to(device).eval()
    draw = peers.diffusers_sampling(net, batch_size, EVALUATIONS, device, dtype, "DDIMScheduler")
    return lambda: _ignore(draw())


def _ignore(_: object) -> None:
    return None


def _prepare(build: Build, device: torch.device, ready: dict[str, tuple[peers.Step, int]], name: str) -> dict[str, Any]:
    """Build and warm up a contestant: into `ready` with the steps that make a turn, or the error it ended with."""
    start = time.perf_counter()
    try:
        step = build()
        for _ in range(WARM_UP):
            step()
        synchronize(device)
        ready[name] = step, max(1, round(TURN_SECONDS / timed(step, 1, device)))
    except Exception as error:  # out of memory, or a peer of another version: the others still count
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"warm_up_seconds": round(time.perf_counter() - start, 1)}


def _peak_memory(device: torch.device) -> float:
    """GiB; the weights of the other contestants included."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
