"""What the playground takes from a run: the same stack bare, and as the page runs it, with every step told and previews drawn.

    python examples/benchmarks/playground.py [--pipeline emoji-sd] [--plugin deepcache] [--steps 50] [--rounds 7] [--browser]

Both sides take turns in one process, one torch thread, wall time of the call; a ratio is of one round. With ``--browser`` (playwright and
Chromium) also: seconds from `diffgraft ui` to its page, and from Run to the first preview and to both pictures, nothing loaded before.
Wants an idle machine with two cores: what the page sends is made beside the run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.compare import quiet
from diffgraft.ui.access import Access
from diffgraft.ui.running import Outcome, Playground
from diffgraft.ui.stacks import Asked


def plain(name: str) -> Any:
    """A pipeline as the page loads it."""
    pipe = load_pipeline(name)
    pipe.plugins.clear()
    return pipe


def bare(pipe: Any, asked: Asked) -> float:
    """Seconds of the stack's call by itself."""
    with quiet(pipe):
        load_pipeline(pipe, dict(asked.specs))
        try:
            generator = torch.Generator().manual_seed(asked.seed)
            start = time.perf_counter()
            pipe(asked.prompt, num_inference_steps=asked.steps, generator=generator, output_type="np")
            return time.perf_counter() - start
        finally:
            pipe.plugins.clear()


def paged(ground: Playground, asked: Asked) -> float:
    """Seconds of the same call in a run of the page."""
    *_, last = ground.run(asked, macs=False)
    assert isinstance(last, Outcome)
    assert last.stack is not None
    return last.stack.latency.seconds.p50


def in_browser() -> dict[str, float]:
    """Seconds of a first visit."""
    from playwright.sync_api import sync_playwright

    start = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "diffgraft", "ui", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert server.stdout is not None
        address = next(found.group() for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        served = time.perf_counter()
        with sync_playwright() as p:
            page = p.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome")).new_page()
            page.goto(address)
            page.locator("#run:enabled").wait_for()
            shown = time.perf_counter()
            page.locator("#run").click()
            page.locator("#slider img").first.wait_for(timeout=120_000)
            first = time.perf_counter()
            page.locator("#figures").get_by_text("time").first.wait_for(timeout=120_000)
            done = time.perf_counter()
    finally:
        server.terminate()
    return {
        "served after": served - start,
        "page ready after": shown - start,
        "Run to first preview": first - shown,
        "Run to both pictures": done - shown,
    }


def main(
    pipeline: str = "emoji-sd",
    plugin: str = "deepcache",
    steps: int = 50,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    browser: Annotated[bool, typer.Option(help="a first visit too")] = False,
) -> None:
    torch.set_num_threads(1)
    print(f"{pipeline}, {plugin}, {steps} steps; torch {torch.__version__}, gradio {version('gradio')}, {platform.machine()}")
    ground = Playground(plain, Access())
    asked = Asked(pipeline, "a big pizza on a green background", steps, specs=[(plugin, {})])
    pipe = plain(pipeline)
    bare(pipe, asked), paged(ground, asked)
    ratios = []
    for number in range(rounds):
        sides = {"bare": lambda: bare(pipe, asked), "page": lambda: paged(ground, asked)}
        found = {name: sides[name]() for name in (sides if number % 2 else reversed(sides))}
        ratios.append(found["page"] / found["bare"])
    print(f"a call in a run of the page / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if browser:
        for what, seconds in in_browser().items():
            print(f"{what}: {seconds:.1f} s")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
