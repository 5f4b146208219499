"""Where a measurement was made: packages, processor, threads, load, accelerators."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "diffgraft",
    "diffgraft-core",
    "diffgraft-families",
    "diffgraft-checkpoints",
    "diffgraft-checkpoints-more",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "pydantic",
    "torchmetrics",
    "xformers",
)


BUSY = 0.5
"""Load average a processor from which on a machine counts as busy."""


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
        "cores": cores(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "busy": busy(),
        "accelerators": accelerators(),
    }
    if device is not None:
        found["device"] = str(device)
        if torch.device(device).type == "cuda":
            found["device_name"] = torch.cuda.get_device_name(device)
    return found


def cores() -> int:
    """Physical cores that this process may use: its affinity, two hardware threads a core counted once, and the quota of its cgroup."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for number in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(number))
    return max(1, min(len(siblings), math.ceil(quota() or len(siblings))))


def free_cores() -> int:
    """The cores that others leave to this process, at least one."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(cores(), (os.cpu_count() or 1) - round(load)))


def quota() -> float | None:
    """Processors that the cgroup of this process (a container) may use, or None without a limit."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        pass
    try:
        most, period = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(most) / int(period) if int(most) > 0 else None
    except (OSError, ValueError):
        return None


@contextmanager
def threads(number: int | None = None) -> Iterator[int]:
    """Torch has this many threads inside (default: `free_cores`, fewer where OMP_NUM_THREADS says so); afterwards as many as before.

    Threads that have no core of their own wait for each other: beside another busy process the same run takes a hundred times as long.
    """
    import torch

    before = torch.get_num_threads()
    said = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(number or min(free_cores(), int(said) if said.isdigit() and int(said) else before))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def busy() -> str | None:
    """A warning when others already keep this machine busy, or None: what is timed then is their work too."""
    if not hasattr(os, "getloadavg"):
        return None
    load, count = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY * count:
        return None
    return f"the machine is busy: load {load:.1f} on {count} processors before the start; times will be longer and scatter more"


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
