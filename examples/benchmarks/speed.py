"""Time, multiply-adds and memory of any plugins on denoisers of real configurations with random weights, against the plain pipeline.

    python examples/benchmarks/speed.py --config sd15 --plugins NAME -o NAME.KNOB=VALUE        # CPU: scaled down as the table says
    python examples/benchmarks/speed.py --config flux --plugins NAME --full --device cuda --dtype bfloat16 [--compile]

Only denoising is run (embeddings go in, latents come out) on a real pipeline that went through ``load_pipeline``. Time: both sides take
turns in one process; medians, and the speed-up within a round. MACs: torch's flop counter over a whole run of each side; the MAC limit is
the speed-up if time followed them. Memory: bytes of tensors alive beside weights and inputs at the worst moment, in a run of its own.
What a plugin needs is made here: an artefact by calibrating on the run itself, a second pipeline with half the width.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffgraft
import diffusers
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.cli.values import plugin_specs
from diffgraft.installed.specs import build_plugin
from diffgraft.lab.instruments import LiveBytes, MacCounter, synchronize
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.files import write_atomic
from diffgraft_bench.layouts import CONFIGS, Case, make_case
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor


def run(case: Case) -> Tensor:
    """One call; always the same noise."""
    with torch.no_grad():
        return case.pipe(**case.arguments, generator=torch.Generator().manual_seed(0))[0]  # type: ignore[no-any-return]


def with_needs(spec: tuple[str, dict[str, Any]], case: Case, second: Callable[[], Case]) -> tuple[str, dict[str, Any]]:
    """The plugin's spec with what it needs and was not given."""
    name, knobs = spec
    plugin = build_plugin(spec)
    for need in plugin.needs:
        if knobs.get(need.knob) is None:
            knobs[need.knob] = calibrate_call(case.pipe, plugin, lambda: run(case)) if need.kind == "artefact" else second().pipe
    return name, knobs


def timed(case: Case) -> float:
    """Seconds of one call."""
    synchronize(case.pipe.device)
    started = time.perf_counter()
    run(case)
    synchronize(case.pipe.device)
    return time.perf_counter() - started


def peak_bytes(case: Case) -> int:
    """Bytes of tensors made in a run and alive at its worst moment."""
    weights = [p for part in case.pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
    inputs = [value for value in case.arguments.values() if isinstance(value, Tensor)]
    gc.collect()
    with LiveBytes({tensor.untyped_storage()._cdata for tensor in (*weights, *inputs)}) as counter:
        run(case)
    return counter.peak


def main(
    config: Annotated[str, typer.Option(help=f"One of {', '.join(CONFIGS)}.")],
    plugins: Annotated[list[str], typer.Option(help="Plugin names, first = outermost.")],
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="PLUGIN.KNOB=VALUE")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; in each, both sides run once.")] = 5,
    steps: Annotated[int, typer.Option(min=2)] = 12,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    full: Annotated[bool, typer.Option("--full", help="The model's real size.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the denoiser (both sides).")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Speed of plugins on one configuration."""
    if config not in CONFIGS:
        raise typer.BadParameter(f"{config!r}: one of {', '.join(CONFIGS)}")
    console = Console()
    made = {"device": device, "dtype": getattr(torch, dtype), "full": full, "steps": steps}
    case = make_case(config, **made)
    specs = [with_needs(spec, case, lambda: make_case(config, **made, width=0.5)) for spec in plugin_specs(plugins, option)]
    stack = load_pipeline(case.pipe, plugins=specs).plugins
    macs, memory, times = {}, {}, {"plain": [], "plugins": []}

    def turn(side: str) -> None:
        stack.enable() if side == "plugins" else stack.disable()

    for side in times:
        turn(side)
        with console.status(f"counting MACs and memory, {side}"):
            with MacCounter(stack) as counter:
                run(case)
            macs[side], memory[side] = counter.macs, peak_bytes(case)
    counts = {name: part.counts for name, part in stack.report().plugins.items()}
    if compile:
        for name in stack.family.denoisers:
            getattr(case.pipe, name).compile()
    for number in track(range(rounds + 1), "rounds", console=console, transient=True):  # the first warms up
        for side in (("plain", "plugins"), ("plugins", "plain"))[number % 2]:
            turn(side)
            seconds = timed(case)
            if number:
                times[side].append(seconds)
    limit = macs["plain"] / macs["plugins"]
    ratios = [plain / fast for plain, fast in zip(times["plain"], times["plugins"], strict=True)]
    speed_up = statistics.median(ratios)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    result = {
        "config": config, "scale": case.scale, "plugins": [[name, {k: str(v)[:80] for k, v in knobs.items()}] for name, knobs in specs],
        "steps": steps, "rounds": rounds, "device": where, "dtype": dtype, "compile": compile,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__},
        "machine": platform.machine(), "seconds": times, "macs": macs, "mac_limit": limit, "speed_up": speed_up,
        "share_of_mac_limit": speed_up / limit, "peak_tensor_bytes": memory, "counts": counts,
    }  # fmt: skip
    table = Table(title=f"{config} ({case.scale}), {where}, {dtype}{', compiled' if compile else ''}, {steps} steps")
    for column in ("side", "median s", "min..max s", "GMACs", "peak MiB"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, label in (("plain", "plain"), ("plugins", ", ".join(stack))):
        spread = f"{min(times[side]):.2f}..{max(times[side]):.2f}"
        table.add_row(label, f"{statistics.median(times[side]):.3f}", spread, f"{macs[side] / 1e9:.1f}", f"{memory[side] / 2**20:.1f}")
    console.print(table)
    kept = macs["plugins"] / macs["plain"]
    console.print(
        f"MACs kept {kept:.1%}: limit {limit:.2f}x; measured {speed_up:.2f}x ({min(ratios):.2f}..{max(ratios):.2f}), "
        f"{speed_up / limit:.1%} of the limit", highlight=False,
    )  # fmt: skip
    if out is not None:
        write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
