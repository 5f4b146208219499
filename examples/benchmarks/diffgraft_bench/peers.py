"""An environment of its own for every other package, on top of the project's: what one pins or patches cannot break another.

Each sees torch, diffusers and diffgraft of the environment that runs this, and may not change their versions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from diffgraft.methods.files import write_atomic

from .cases import PEERS

PINNED = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")
LIMIT_S = 600


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def install(root: Path, on_peer: Callable[[str], None], peers: Iterable[str] = PEERS, limit_s: float = LIMIT_S) -> dict[str, str]:
    """Make the environments that are missing; for each peer "" or how its installation failed."""
    told: dict[str, str] = {}
    root.mkdir(parents=True, exist_ok=True)
    constraints = root / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in PINNED))
    for name in peers:
        record = root / name / "installed.json"
        if not record.exists():
            on_peer(name)
            write_atomic(record, json.dumps(install_one(root / name, name, constraints, limit_s)).encode())
        told[name] = json.loads(record.read_text())
    return told


def install_one(folder: Path, name: str, constraints: Path, limit_s: float) -> str:
    """One environment; what pip said when it failed."""
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError:  # a Python that came without ensurepip: the pip that is below will do
        venv.create(folder, with_pip=False, clear=True)
    here = sysconfig.get_paths()["purelib"]
    there = next((folder / "lib").glob("python3*/site-packages"))
    (there / "base.pth").write_text(f"import site; site.addsitedir({here!r})\n")  # and what its own .pth files add
    command = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", str(constraints), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"pip install {name}: not done after {limit_s:.0f} s"
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error")) or "conflict" in line.lower()]
    return f"pip install {name}: " + " ".join(errors)[:800]


def interpreter(root: Path, env: str) -> Path:
    """Of a bout's environment."""
    return python_of(root / env) if env else Path(sys.executable)
