"""``python -m diffgraft_bench run | cuda | worker | report | readme | find | truth``."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft.installed.registry import find_bundled
from diffgraft.lab.doctor import attention_backends
from diffgraft.lab.judging import load_judge
from diffgraft.lab.machine import cores
from diffgraft.methods.files import write_atomic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save

from . import stacks
from .bout import How, fight
from .cases import SEARCHED, Bout, all_bouts
from .cuda import GRACE, against_cpu, all_arms, row_of, run_arms
from .find import find as find_steps
from .peers import install, interpreter
from .quality import TRUE_FEATURES, render_true_features
from .readme import write_readme
from .report import write_report
from .rows import Store, key_of

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()
Out = Annotated[Path, typer.Option(help="Everything goes there; a second run makes what is missing.")]
OUT, OUT_STACKS = Path("out/benchmarks"), Path("out/stacks")


@app.command()
def run(
    out: Out = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer settings, pictures and rounds.")] = False,
    only: Annotated[str, typer.Option(help="Bouts whose arm, pipeline or environment has this in its name.")] = "",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the speed arm: float32, float16 or bfloat16.")] = "float32",
    full: Annotated[bool, typer.Option("--full", help="The speed arm at the models' real sizes.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="The speed arm compiled (all sides).")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one call of the speed arm.")] = 1,
    attention: Annotated[str, typer.Option(help="Attention backend of the speed arm, as diffusers calls it (all sides).")] = "native",
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Pictures for the figures of quality.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Measure again what failed before.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Install and measure other packages.")] = True,
) -> None:
    """Measure what is missing, then write the report."""
    command = shlex.join(["python", "-m", "diffgraft_bench", *sys.argv[1:]])
    shared: dict[str, Any] = {"out": str(out), "device": device, "threads": threads, "command": command}
    shared["warmup"] = 0 if quick else 1  # beside the two calls that are made before anything is timed
    quality = How(
        **shared, rounds=rounds or (3 if quick else 5), samples=samples or (16 if quick else 48), batch=8,
        reference_steps=100 if quick else 500,
    )  # fmt: skip
    speed = How(
        **shared, rounds=rounds or 3, samples=0, batch=1, reference_steps=0, dtype=dtype, full=full, compile=compile,
        timed_batch=batch, attention=attention,
    )  # fmt: skip
    asked = quick or compile or batch > 1 or attention != "native"
    speeds = [speed] if asked or device == "cpu" else on_gpu(speed, attention_backends())
    bouts = [bout for bout in all_bouts(quick) if only in f"{bout.arm} {bout.pipeline} {bout.env}" and (peers or not bout.env)]
    envs = out / "envs"
    told = install(envs, lambda name: console.print(f"installing {name}")) if peers else {}
    store = Store(out)
    if retry:
        store.forget_failures()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(bout.methods) for bout in bouts))
        for bout in bouts:
            for how in [quality] if bout.arm == "quality" else speeds:
                progress.update(task, description=f"{bout.arm}, {bout.pipeline}, {bout.env or bout.methods[0].label}")
                one_bout(bout, how, store, envs, told)
            progress.advance(task, len(bout.methods))
    report(out)


def on_gpu(speed: How, present: Sequence[str]) -> list[How]:
    """The speed arm's ways on a GPU: eager and compiled, one picture and four in a call, and the attention backends that are present."""
    others = [replace(speed, attention=name) for name in ("xformers", "flash") if name in present]
    return [speed, replace(speed, timed_batch=4), replace(speed, compile=True), *others]


def one_bout(bout: Bout, how: How, store: Store, envs: Path, told: dict[str, str]) -> None:
    """In a process of its own; a process that dies leaves its message as the row of every method that it owes."""
    keys = {key_of(bout, method, how.circumstances): method for method in bout.methods}
    if all(store.has(key) for key in keys):
        return
    failure = told.get(bout.env, "") or in_process(bout, how, envs)
    for key, method in keys.items():
        if not store.has(key):
            store.put(key, row_of(bout, method, how, failure or "the process ended without a result"))


def in_process(bout: Bout, how: How, envs: Path) -> str:
    """Play a bout in a process of its own; "" or why it died."""
    task = Path(how.out) / "bout.json"
    write_atomic(task, json.dumps({"bout": bout.to_json(), "how": asdict(how)}).encode())
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(how.threads), "PRUNA_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    command = [str(interpreter(envs, bout.env)), "-m", "diffgraft_bench", "worker", str(task)]
    name = f"{bout.pipeline}-{bout.env or 'own'}-{time.time():.0f}.log"
    left = how.until + GRACE - time.time() if how.until else None
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=left and max(1.0, left))
    except subprocess.TimeoutExpired:
        return "left out: stopped when the time was up"
    write_atomic(Path(how.out) / "logs" / name, (done.stdout + done.stderr).encode())
    return "" if done.returncode == 0 else last_words(done.stderr)


def play(bout: Bout, how: How) -> str:
    """Play a bout in this process."""
    (against_cpu if bout.arm == "device" else fight)(bout, how)
    return ""


def last_words(text: str) -> str:
    """What a process said when it died: its last error, and the first one, which is often the reason."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*:", line)]
    if not errors:
        return next((line[:600] for line in reversed(lines) if line), "no message")
    return errors[-1][:400] + (f" (before that: {errors[0][:400]})" if errors[0] != errors[-1] else "")


@app.command()
def worker(task: Path) -> None:
    """One bout (called by `run` in the environment that the bout needs)."""
    data = json.loads(task.read_text())
    play(Bout.from_json(data["bout"]), How(**data["how"]))


@app.command()
def cuda(
    out: Annotated[Path, typer.Option(help="cuda.json, cuda.png and the rows; a second call measures what is missing.")] = Path("out/cuda"),
    seconds: Annotated[float, typer.Option(min=0, help="For everything.")] = 530,
    dry: Annotated[bool, typer.Option("--dry", help="On the CPU: shrunken layouts, three steps, no other packages.")] = False,
    one_process: Annotated[bool, typer.Option("--one-process", help="Nothing of its own for an arm.")] = False,
) -> None:
    """Layouts of real models in bfloat16 with our caches and others, on one GPU; what is left out when the time is up is said."""
    began = time.time()
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} finds no CUDA device; --dry goes through the same on the CPU")
    command = shlex.join(["python", "-m", "diffgraft_bench", *sys.argv[1:]])
    arms = all_arms(out, dry, threads=1 if dry else cores(), command=command)
    Store(out).forget_failures()
    peers = sorted({arm.bout.env for arm in arms} - {""})
    missing = dict.fromkeys(peers, "not installed for a dry run")
    if not dry:
        missing = install(out / "envs", lambda name: console.print(f"installing {name}"), peers, limit_s=min(60.0, max(1.0, seconds / 8)))
    run_bout = play if one_process else partial(in_process, envs=out / "envs")
    record = run_arms(arms, seconds - (time.time() - began), run_bout, console.print, missing, command)
    for arm in record.arms:
        console.print(f"{arm['name']}: {arm['state']}, {arm['seconds']:.0f} s. {arm['why']}", markup=False)
    console.print(f"{out / 'cuda.json'}, {out / 'cuda.png'}")


@app.command()
def find(device: Annotated[str, typer.Option()] = "cpu") -> None:
    """Search the time steps that the cases name and that are not there: some minutes each."""
    for pipeline in SEARCHED:
        find_steps(pipeline, device, console.print)


@app.command()
def tune_stacks(out: Out = OUT_STACKS) -> None:
    """Search for the stacks that the table measures, where they are missing: ten minutes a pipeline."""
    for pipeline in stacks.SEARCHES:
        stacks.search(pipeline, out, console.print)


@app.command("stacks")
def measure_stacks(
    out: Out = OUT_STACKS,
    only: Annotated[str, typer.Option(help="Bouts whose pipeline or environment has this in its name.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    samples: Annotated[int, typer.Option(min=2, help="Pictures for the figures of quality.")] = 48,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Install and measure other packages.")] = True,
) -> None:
    """Measure the tuned stacks beside everything else, with eight pictures in a call (and their quality), then with one."""
    command = shlex.join(["python", "-m", "diffgraft_bench", *sys.argv[1:]])
    eight = How(str(out), rounds, 1, samples, 8, 500, timed_batch=8, command=command)
    envs, store = out / "envs", Store(out)
    bouts = [bout for bout in stacks.stack_bouts() if only in f"{bout.pipeline} {bout.env}" and (peers or not bout.env)]
    needed = sorted({bout.env for bout in bouts} - {""})
    told = install(envs, lambda name: console.print(f"installing {name}"), needed)
    for bout in bouts:
        for how in (eight, replace(eight, samples=8, timed_batch=1)):
            console.print(f"{bout.pipeline} {bout.env}, {how.timed_batch} in a call: {len(bout.methods)} methods")
            one_bout(bout, how, store, envs, told)


@app.command()
def stacks_readme(out: Out = OUT_STACKS) -> None:
    """Write the table into examples/stacks/README.md from what is there."""
    console.print(str(stacks.write_stacks(Store(out))))


@app.command()
def report(out: Out = OUT) -> None:
    """Write report.html, the plots and rows.csv from what is there."""
    page = write_report(Store(out), out)
    console.print(f"{page} ({sum(1 for _ in Store(out))} rows), {out / 'rows.csv'}")


@app.command()
def readme(out: Out = OUT) -> None:
    """Write the results into examples/benchmarks/README.md from what is there."""
    console.print(str(write_readme(Store(out), out)))


@app.command()
def truth() -> None:
    """Write the judge's features of true pictures, after another training of the judge; needs the emoji font."""
    features = render_true_features(load_judge(find_bundled("emoji-sd")))
    write_atomic(TRUE_FEATURES, save({"features": features.half()}))


if __name__ == "__main__":
    app()
