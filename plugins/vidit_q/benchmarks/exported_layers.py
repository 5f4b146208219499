"""What the real kernels of an exported layer give: time and bytes of linear layers beside float32, of several widths and numbers of tokens.

    python -m pip install torchao
    python plugins/vidit_q/benchmarks/exported_layers.py [--width 1024] [--tokens 64] [--rounds 15] [--compile] [--out layers.json]

A layer of vidit_q in w8a8 with symmetric grids and one in w8a32, as `exported` makes them. Sides take turns, one thread; a ratio is
float32's time over the layer's of one round; told are the median and the range. With --compile both sides are compiled.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.export import bytes_in, exported
from diffgraft.methods.quant.layers import quantised
from rich.console import Console
from rich.table import Table
from torch import nn

PLANS = {"w8a8": UniformAffine(8, "token", symmetric=True), "w8a32": None}
LEAST_S = 0.2
"""A timing repeats its call for so long."""


def seconds(layer: Any, x: torch.Tensor, calls: int) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    for _ in range(calls):
        layer(x)
    return (time.process_time() - started) / calls


def main(
    width: Annotated[list[int] | None, typer.Option(help="Repeat for several (default: 1024, 2048).")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Repeat for several (default: 64, 512, 4096).")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    compile: Annotated[bool, typer.Option("--compile")] = False,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Float32's time over an exported layer's."""
    torch.set_num_threads(1)
    rows = []
    for size, plan in itertools.product(width or (1024, 2048), PLANS):
        plain = nn.Linear(size, size)
        model = nn.Sequential(quantised(plain, UniformAffine(8, "channel", symmetric=True), PLANS[plan]))
        ours = exported(model)[0]
        share = bytes_in(ours) / bytes_in(plain)
        sides = (torch.compile(plain), torch.compile(ours)) if compile else (plain, ours)
        for count in tokens or (64, 512, 4096):
            x = torch.randn(count, size)
            calls = max(1, round(LEAST_S / max(seconds(side, x, 3) for side in sides)))
            ratios = [1 / (seconds(sides[1], x, calls) / seconds(sides[0], x, calls)) for _ in range(rounds)]
            rows.append({"width": size, "plan": plan, "tokens": count, "faster": ratios, "bytes": share})
    versions = {name: version(name) for name in ("torch", "torchao")}
    table = Table(title=f"float32's time over the exported layer's{', compiled' if compile else ''}; {versions}")
    for column in ("width", "plan", "tokens", "times faster", "bytes"):
        table.add_column(column)
    for row in rows:
        found = row["faster"]
        told = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        table.add_row(str(row["width"]), row["plan"], str(row["tokens"]), told, f"{row['bytes']:.3f}")
    Console().print(table)
    if out is not None:
        facts = {"machine": platform.machine(), "compiled": compile, "versions": versions}
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
