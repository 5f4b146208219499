"""Where a measurement was made: packages, processor, threads, load, accelerators."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "diffgraft",
    "diffgraft-core",
    "diffgraft-families",
    "diffgraft-checkpoints",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "pydantic",
    "torchmetrics",
    "xformers",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine(device: Any = None) -> dict[str, Any]:
    """Where this runs: operating system, processor, threads, load, and the accelerators (or the one in use)."""
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "accelerators": accelerators(),
    }
    if device is not None:
        found["device"] = str(device)
        if torch.device(device).type == "cuda":
            found["device_name"] = torch.cuda.get_device_name(device)
    return found


def processor() -> str:
    """The processor's name as its system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def accelerators() -> list[str]:
    """Devices beside the CPU that torch can use."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    return found + (["mps"] if torch.backends.mps.is_available() else [])
