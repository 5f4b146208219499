"""What the core itself costs: a do-nothing plugin at every hook point, against the same pipeline without diffgraft.

    python examples/benchmarks/overhead.py [--pipeline emoji-sd] [--steps 50] [--rounds 9]

The sides run in turn in one process. Prints the share of a run, milliseconds a step and microseconds a hooked call: of the wall clock
(median) and of the main thread's CPU time (best of all rounds; with --threads 1 it is all the work). Then what the checks cost alone: those
at the beginning of a run, and those of a result that a plugin has changed, by hook point. --out writes JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffgraft
import torch
import typer
from diffgraft import Paper, Plugin, load_pipeline
from diffgraft.kernel.boundary import FORMS
from rich.console import Console
from rich.progress import track
from rich.table import Table


class Everything(Plugin):
    """Hands every call on, at every hook point, on every block and layer."""

    name = "everything"
    paper = Paper("none", "0000.00000", "nothing")
    families = ("*",)
    neutral: dict[str, Any] = {}  # noqa: RUF012

    def _pass(self, call: Any, next: Any) -> Any:
        return next(call)

    run = schedule = denoise = block = attention = guide = step = _pass

    def select_blocks(self, blocks: Any) -> Any:
        return blocks


class DenoiseOnly(Everything):
    """One hook point only: what a simple plugin pays."""

    name = "denoise_only"
    run = schedule = block = attention = guide = step = None  # type: ignore[assignment]


def best_cpu(work: Callable[[], Any], times: int = 50, rounds: int = 40) -> float:
    """CPU seconds of one call of `work`, best of the rounds."""

    def once() -> float:
        started = time.thread_time()
        for _ in range(times):
            work()
        return (time.thread_time() - started) / times

    return min(once() for _ in range(rounds))


def cost_of_checks(pipe: Any, prompt: str) -> tuple[float, dict[str, float]]:
    """CPU seconds of the checks at the beginning of a run, and of holding one changed result against the form of each hook point."""
    forms: dict[str, float] = {}

    def timed(point: str) -> Any:
        def hook(self: Plugin, call: Any, next: Any) -> Any:
            result = next(call)
            if point not in forms:
                forms[point] = best_cpu(lambda: FORMS[point](call, result))
            return result

        return hook

    hooks = {point: timed(point) for point in FORMS if getattr(Everything, point, None) is not None}
    load_pipeline(pipe, plugins=[type("Timed", (Everything,), {"name": "timed", **hooks})])
    pipe(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent")
    stack = pipe.plugins
    begin = best_cpu(lambda: stack._verify(stack._enabled()))
    stack.remove(*stack.list())
    return begin, forms


def import_seconds(code: str) -> float:
    """Best of five fresh interpreters, less what an empty one takes."""

    def once(text: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
        return time.perf_counter() - started

    return min(once(code) for _ in range(5)) - min(once("pass") for _ in range(5))


def main(
    pipeline: str = "emoji-sd",
    steps: int = 50,
    rounds: int = 9,
    device: str = "cpu",
    threads: int | None = None,
    out: Annotated[Path | None, typer.Option(help="write the raw numbers here as JSON")] = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    pipe = load_pipeline(pipeline).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a small dog face on the left on a blue background"
    sides = {"no plugin": [], "every hook point": [Everything], "denoise only": [DenoiseOnly]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    calls = 0
    for number in track(range(-1, rounds), "rounds"):  # one to warm up
        for name, plugins in sides.items():
            load_pipeline(pipe, plugins=plugins)
            if device == "cuda":
                torch.cuda.synchronize()
            started, cpu_started = time.perf_counter(), time.thread_time()
            pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent")
            if device == "cuda":
                torch.cuda.synchronize()
            taken, cpu_taken = time.perf_counter() - started, time.thread_time() - cpu_started
            if plugins == [Everything]:
                calls = sum(pipe.plugins.report().plugins["everything"].fired.values())
            pipe.plugins.remove(*pipe.plugins.list())
            if number >= 0:
                seconds[name].append(taken)
                cpu[name].append(cpu_taken)
    wall = ("p50 s", "min-max s", "over no plugin", "ms a step", "us a hooked call")
    table = Table("side", *wall, "CPU: over no plugin", "us a hooked call")
    rows = {}
    for name, taken in seconds.items():
        extra = statistics.median(a - b for a, b in zip(taken, seconds["no plugin"], strict=True))
        rows[name] = {"p50": statistics.median(taken), "extra_s": extra, "share": extra / statistics.median(seconds["no plugin"])}
        extra_cpu = min(cpu[name]) - min(cpu["no plugin"])
        rows[name] |= {"cpu_extra_s": extra_cpu, "cpu_share": extra_cpu / min(cpu["no plugin"])}
        per_call, cpu_per_call = (f"{x / calls * 1e6:.1f}" if name == "every hook point" else "" for x in (extra, extra_cpu))
        table.add_row(
            name,
            f"{rows[name]['p50']:.3f}",
            f"{min(taken):.3f}-{max(taken):.3f}",
            f"{rows[name]['share']:+.2%}",
            f"{extra / steps * 1e3:.3f}",
            per_call,
            f"{rows[name]['cpu_share']:+.2%}",
            cpu_per_call,
        )
    console = Console()
    console.print(table)
    begin, forms = cost_of_checks(pipe, prompt)
    console.print(f"checks at the beginning of a run: {begin * 1e3:.3f} ms; of one changed result, in us:", end=" ")
    console.print(", ".join(f"{point} {seconds * 1e6:.1f}" for point, seconds in forms.items()), highlight=False)
    imports = {code: import_seconds(code) for code in ("import diffgraft", "import diffgraft.cli")}
    for code, taken in imports.items():
        console.print(f"{code}: {taken:.3f} s")
    if out:
        facts = {
            "versions": {"diffgraft": diffgraft.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "command": {"pipeline": pipeline, "steps": steps, "rounds": rounds, "device": device, "threads": torch.get_num_threads()},
        }
        measured = {"hooked_calls": calls, "seconds": seconds, "cpu_seconds": cpu, "rows": rows, "imports": imports}
        measured |= {"checks": {"begin_s": begin, "changed_result_s": forms}}
        out.write_text(json.dumps({**facts, **measured}, indent=1))


if __name__ == "__main__":
    typer.run(main)
