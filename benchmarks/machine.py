"""What a measurement was made on, and where its result goes."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, device, versions and date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = _lines(cpuinfo)
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def report(name: str, result: dict[str, Any], peers: Sequence[str] = ()) -> None:
    """Print `result` as one JSON line and keep it as results/<name>.json; `peers` are packages whose versions count."""
    result = {**result, "machine": machine() | {package: _version(package) for package in peers}}
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
