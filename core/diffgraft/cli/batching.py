"""``diffgraft batch``: a file of prompts, drawn here or by workers; the same command goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.options import (
    AsJson,
    Backend,
    Device,
    Dtype,
    Extra,
    GuidanceScale,
    Height,
    KnobValues,
    NegativePrompt,
    PluginNames,
    StackFile,
    Steps,
    Width,
    pipeline_names,
)
from diffgraft.installed.errors import ConfigError, choices
from diffgraft.installed.foreign import said
from diffgraft.lab.terminal import console, progress, say

if TYPE_CHECKING:
    from diffgraft.batch.tasks import Task
    from diffgraft.batch.work import Draw, Outcome, Pool
    from diffgraft.cli.running import Origins
    from diffgraft.lab.recipes import Recipe

_log = logging.getLogger(__name__)

SHOWN = 20
"""Lines without a result that are told one by one; failed.jsonl has all."""
MINUTE = 60
"""Seconds between two words on how far it is, in a log."""


def batch(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help='A file with one JSON object a line: {"prompt": "a big panda", "seed": 7}.')
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures; one that has some is gone on with.")],
    pipeline: Annotated[
        str,
        typer.Option("--pipeline", metavar="PIPELINE", help="A bundled name, a folder, or a Hub id.", autocompletion=pipeline_names),
    ],
    plugin: PluginNames = None,
    option: KnobValues = None,
    stack: StackFile = None,
    negative_prompt: NegativePrompt = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the first line's noise; line i has seed + i - 1 unless it says one itself.")] = 0,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = None,
    suffix: Annotated[str, typer.Option("--format", help="png, jpg, webp or gif; a video becomes an animation in the last two.")] = "png",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that draw, by Ray on this machine, or of those of --ray (default there: all).")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A running Ray cluster: auto, HOST:PORT or ray://HOST:PORT.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each worker; last bits of a picture may follow from it.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Draw every line of a file of prompts. The same command goes on where it was stopped, and writes no picture twice.

    A line may say prompt, negative_prompt, seed, class_label, steps, guidance_scale, height, width, args, and id (the name of its file);
    what it does not say is said here. Which worker draws it changes nothing. Exit code 1: lines are without a picture, and are named.
    """
    from diffgraft.cli.values import parse_assignments, specs_for

    kind = kind_of(suffix)
    plugins, extra = specs_for(pipeline, plugin, option, stack), parse_assignments(arg, "-a")
    from diffgraft.batch.lines import check_prompts
    from diffgraft.batch.results import Results
    from diffgraft.batch.tasks import Tasks
    from diffgraft.batch.work import carried_out, surveyed
    from diffgraft.cli.running import call_of, files_of
    from diffgraft.cli.values import checked_plugins
    from diffgraft.lab.machine import threads as torch_threads
    from diffgraft.lab.recipes import Recipe

    base = Recipe(
        pipeline=pipeline,
        negative_prompt=negative_prompt,
        plugins=plugins,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        args=extra,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    check_prompts(prompts)
    call_of(base)
    checked_plugins(plugins)
    pool = pool_of(ray, workers, threads, device)
    tasks = Tasks(prompts, base, kind, {"threads": threads, "files": files_of(base)})
    results = Results(out)
    with results.claimed(), torch_threads(threads):
        state = surveyed(tasks, results)
        broken = dict(state.failed)
        tell_failed(broken)
        say(f"{state.todo} to draw, {len(state.there)} there already" + f", {len(broken)} broken" * bool(broken), err=True)
        try:
            with terminable(), logged() as log:
                for now in carried_out(state, tasks, results, Opening(base, kind, threads), pool):
                    log(now.done, now.todo)
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped: {state.drawn} drawn, {len(state.there)} were there; the same command goes on", err=True)
            raise
    tell_failed({number: why for number, why in state.failed.items() if number not in broken})
    if as_json:
        say(json.dumps({"there": len(state.there), "drawn": state.drawn, "failed": dict(sorted(state.failed.items()))}))
    else:
        say(f"wrote {state.drawn} to {out}, {len(state.there)} were there" + f", {len(state.failed)} lines have none" * bool(state.failed))
    raise typer.Exit(1 if state.failed else 0)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what is within as Ctrl-C does, with the exit code that a shell gives it. Python's own way is to fall over at once, and
    libraries below write where they were."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there are signals heard
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def logged() -> Iterator[Callable[[int, int], None]]:
    """A progress bar; without a terminal a line each tenth of the work, and each minute."""
    if console(err=True).is_terminal:
        with progress() as advance:
            yield partial(advance, "pictures")
        return
    start = last = time.monotonic()
    tenth = 0

    def log(done: int, todo: int) -> None:
        nonlocal last, tenth
        now = time.monotonic()
        if now - last < MINUTE and 10 * done // todo == tenth:
            return
        last, tenth = now, 10 * done // todo
        say(f"{done} of {todo} pictures, {timedelta(seconds=round(now - start))}", err=True)

    yield log


def kind_of(suffix: str) -> str:
    """The suffix of a format.

    Raises:
        ConfigError: it is none of pictures.
    """
    from diffgraft.lab.pictures import STILL

    kind = f".{suffix.removeprefix('.').lower()}"
    if kind not in STILL:
        known = [name.removeprefix(".") for name in STILL]
        raise ConfigError(f"--format {suffix}: no format of pictures{choices(suffix, known, 'There are')}")
    return kind


def pool_of(address: str | None, workers: int | None, threads: int, device: str | None) -> Pool:
    """Who draws: this process, or workers by Ray.

    Raises:
        Unsupported: Ray is asked for and is not installed.
        ConfigError: a device that workers cannot all have.
    """
    from diffgraft.batch.work import here
    from diffgraft.methods.extras import imported

    if address is None and workers is None:
        return here
    imported("ray", "`diffgraft batch` with --ray or --workers")
    from diffgraft.batch.rays import Cluster

    if device is not None and device.startswith("cuda:"):
        raise ConfigError(f"--device {device}: with workers, Ray gives each a GPU of its own; write --device cuda")
    return Cluster(address, workers, threads, None if device is None else device == "cuda")


@dataclass(frozen=True)
class Opening:
    """Loads the pipeline of a batch in the process that draws with it."""

    base: Recipe
    suffix: str
    threads: int

    def __call__(self) -> Draw:
        import torch

        from diffgraft.cli.running import origins_of, prepared

        torch.set_num_threads(self.threads)
        pipe, _ = prepared(self.base)
        pipe.set_progress_bar_config(disable=True)  # one bar for all of them is enough
        return partial(draw, pipe, self.suffix, origins_of(pipe, self.base))


def draw(pipe: Any, suffix: str, origins: Origins, task: Task) -> Outcome:
    """The picture of a task, as the bytes of its file, which has the record of its making."""
    from diffgraft.batch.work import Drawn, Failed
    from diffgraft.cli.running import call_of, drawn
    from diffgraft.lab.pictures import encode, to_images
    from diffgraft.lab.recipes import save_options

    recipe = task.recipe
    try:
        made = drawn(pipe, recipe, call_of(recipe), [] if recipe.prompt is None else [recipe.prompt], origins)
        if made.fault is not None or made.record is None:
            return Failed(said(made.fault) if made.fault else "there is no record of its making")
        record = made.record.model_copy(update={"asked": task.asked})
        if not save_options(record, suffix):
            return Failed(f"its prompt and settings are too long for a {suffix} file; --format png has no limit")
        return Drawn(encode(to_images(made.pictures[0]), suffix, record))
    except Exception as error:  # whatever it is, the other lines have nothing to do with it
        _log.debug("line %d", task.number, exc_info=True)
        return Failed(said(error))


def tell_failed(failed: dict[int, str]) -> None:
    """Name lines by number, with the reason."""
    for number in sorted(failed)[:SHOWN]:
        say((f"line {number}: {failed[number]}", "red"), err=True)
    if len(failed) > SHOWN:
        say((f"and {len(failed) - SHOWN} more", "red"), err=True)
