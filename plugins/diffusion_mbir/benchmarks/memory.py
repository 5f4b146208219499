"""Peak memory of a run by the depth of the volume, with the slices at once and in parts, each in a process of its own.

python plugins/diffusion_mbir/benchmarks/memory.py                  # emoji-pixel, 32 to 128 slices: about a minute and a half of a core
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
import typer
from rich.console import Console
from rich.table import Table


def peak(depth: int, chunk: int) -> tuple[float, float]:
    """(MB beyond what was there before the run, MB of the volume) of two steps on so many slices."""
    from diffgraft import load_pipeline
    from diffgraft.methods.measurements import Radon
    from diffgraft.methods.problems import simulated

    torch.set_num_threads(1)
    problem = simulated(Radon(8), torch.zeros(depth, 3, 32, 32))
    pipe = load_pipeline("emoji-pixel")
    pipe.set_progress_bar_config(disable=True)
    pipe(batch_size=1, num_inference_steps=1)
    load_pipeline(pipe, plugins={"diffusion_mbir": {"problem": problem, "chunk": chunk}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe(batch_size=depth, num_inference_steps=2, output_type="np")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, depth * 3 * 32 * 32 * 4 / 2**20


def main(depth: int = 0, chunk: int = 0) -> None:
    if depth:
        print(*peak(depth, chunk))
        return
    table = Table("slices", "at once, MB", "8 at once, MB", "one tensor of the volume, MB")
    for slices in (32, 64, 128):
        found = []
        for part in (0, 8):
            command = [sys.executable, __file__, "--depth", str(slices), "--chunk", str(part)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found.append(out)
        table.add_row(str(slices), *(f"{float(each[0]):.0f}" for each in found), f"{float(found[0][1]):.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
