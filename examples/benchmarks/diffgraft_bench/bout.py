"""One process: a pipeline, the methods of one bout on copies of it, and the plain pipeline, measured in turn."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.registry import find_family
from diffgraft.kernel.backends import use_attention_backend
from diffgraft.lab.instruments import LiveBytes, MacMode, synchronize
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.pictures import strip, to_images
from diffgraft.methods.files import write_atomic, write_json
from diffgraft.methods.inputs import Pictures, make_samples

from .cases import Bout, Method
from .methods import own_copy, put_on
from .models import BundledModel, LayoutModel, Model
from .quality import Quality
from .rows import CIRCUMSTANCES, Row, Store, key_of
from .syncs import Syncs

PLAIN = "plain"
SHOWN = 6
"""Pictures of every row that the report shows."""


@dataclass(frozen=True)
class How:
    """How everything of one benchmark is measured.

    rounds, warmup   timed rounds (each runs every method of a bout once), and calls of each before them
    samples, batch   pictures for the figures of quality; pictures in one call where those are made, and where time is measured
    reference_steps  of the plain pipeline, whose pictures tell a solver's error
    timed_batch      pictures in a timed call
    attention        diffusers' attention backend, of the plain pipeline and of all copies
    brief            a GPU's few minutes: one call of each counts work, memory and waits, compiled means the repeated blocks
    backend          of the compiler
    until            seconds since 1970 after which nothing is begun; 0: no end
    """

    out: str
    rounds: int
    warmup: int
    samples: int
    batch: int
    reference_steps: int
    device: str = "cpu"
    dtype: str = "float32"
    full: bool = False
    compile: bool = False
    timed_batch: int = 1
    attention: str = "native"
    threads: int = 1
    command: str = ""
    brief: bool = False
    backend: str = "inductor"
    until: float = 0.0

    def ensure_time(self, seconds: float = 0.0) -> None:
        """Raises TimeoutError when something that takes so long would end too late."""
        if self.until and time.time() + seconds > self.until:
            raise TimeoutError("left out: the time is up")

    @property
    def circumstances(self) -> dict[str, Any]:
        """What makes rows comparable."""
        return {name: getattr(self, name) for name in CIRCUMSTANCES}


@dataclass
class Fighter:
    """One method that could be put on: what is called, its own pipeline, and its times."""

    method: Method
    pipe: Any
    call: Callable[..., Any]
    seconds: list[float]
    row: Row
    events: list[float] = field(default_factory=list)
    """The same by the device's own clock, where it has one."""


def fight(bout: Bout, how: How) -> None:
    """Measure what is missing of a bout; every row is kept when it is complete. A method that fails is a row with its message."""
    store = Store(Path(how.out))
    keys = {id(method): key_of(bout, method, how.circumstances) for method in bout.methods}
    missing = [method for method in bout.methods if not store.has(keys[id(method)])]
    if not missing:
        return
    torch.set_num_threads(how.threads)
    model = open_model(bout, how)
    with attention(model, how), many_graphs(how):
        measure(bout, missing, keys, model, store, how)


def measure(bout: Bout, missing: Sequence[Method], keys: Mapping[int, str], model: Model, store: Store, how: How) -> None:
    """The methods that are missing, on copies of one pipeline."""
    plain = Fighter(Method(PLAIN, "plain"), model.pipe, model.pipe, [], {})
    common = {
        **{"arm": bout.arm, "pipeline": bout.pipeline, "steps_of_plain": bout.steps, "env": bout.env, "scale": getattr(model, "scale", "")},
        **how.circumstances,
        **{"session": f"{time.time():.0f}-{os.getpid()}", "command": how.command, "machine": machine(model.pipe.device)},
        "versions": {**versions(), **package(bout.env)},
    }
    fighters: list[Fighter] = []
    for method in missing:
        row = {**common, "label": method.label, "kind": method.kind, "name": method.name, "setting": method.setting,
               "steps": method.steps or bout.steps, "ours": method.ours, "error": None}  # fmt: skip
        try:
            how.ensure_time()
            pipe = own_copy(model.pipe, share_weights=isinstance(model, LayoutModel))
            with all_threads(how):  # some calibrate
                call = put_on(method, pipe, model)
            fighter = Fighter(method, getattr(call, "pipe", pipe), call, [], row)
            prepare(fighter, model, how)
            fighters.append(fighter)
        except Exception as error:  # whatever it is, it is a result
            store.put(keys[id(method)], {**row, "error": told(error)})
    if not fighters:
        return
    prepare(plain, model, how)
    run_rounds([plain, *fighters], model, how)
    for fighter in () if how.brief else (plain, *fighters):
        fighter.row["denoiser_share"] = denoiser_share(fighter, model, how)
    with all_threads(how):
        quality = Quality.of(model, how, bout.distilled) if isinstance(model, BundledModel) else None
        for fighter in fighters:
            row = {**fighter.row, **timing(fighter, plain)}
            try:
                if isinstance(model, BundledModel) and quality is not None:
                    made = model.pictures(fighter.call, fighter.method.steps, how.batch)
                    row.update(quality.figures(made))
                    save_strip(made, Path(how.out) / "pictures" / f"{keys[id(fighter.method)]}.png")
                store.put(keys[id(fighter.method)], row)
            except Exception as error:
                store.put(keys[id(fighter.method)], {**row, "error": told(error)})


@contextmanager
def attention(model: Model, how: How) -> Iterator[None]:
    """The attention backend of this bout. diffusers sets it for the whole process, so it is put back."""
    if how.attention == "native":
        yield
        return
    undo = use_attention_backend(model.pipe, find_family(type(model.pipe)), how.attention)
    try:
        yield
    finally:
        undo()


@contextmanager
def many_graphs(how: How) -> Iterator[None]:
    """Room for the graphs of all fighters: dynamo counts them by a block's code, which copies share, and gives up at eight."""
    if not how.compile:
        yield
        return
    import torch._dynamo

    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({name: 128}):
        yield


@contextmanager
def all_threads(how: How) -> Iterator[None]:
    """All of the processor, for what is not timed (on a GPU nothing of that is long)."""
    if how.brief:
        yield
        return
    torch.set_num_threads(max(how.threads, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(how.threads)


def open_model(bout: Bout, how: How) -> Model:
    """The pipeline of a bout."""
    if bout.arm == "speed":
        return LayoutModel(bout.pipeline, bout.steps, how.device, getattr(torch, how.dtype), how.full, how.timed_batch, bout.shape)
    model = BundledModel(bout.pipeline, bout.steps, [], how.device, Path(how.out) / "kept" / how.device.replace(":", "-"))
    model.samples = make_samples(model.pipe, range(how.samples), model.bundled.prompts)
    return model


def package(env: str) -> dict[str, str]:
    """The version of the peer that a bout is about."""
    try:
        return {env: version(env)} if env else {}
    except PackageNotFoundError:
        return {env: "not installed"}


def told(error: BaseException) -> str:
    """The error as the report shows it: its type, its message, and where it came from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:600]} ({Path(where.filename).name}, line {where.lineno})"


# one method ----------------------------------------------------------------------------------------------------------------------------


def prepare(fighter: Fighter, model: Model, how: How) -> None:
    """First calls: multiply-adds and memory, compilation, warm-up."""
    numbers = list(range(how.timed_batch))

    def run(**more: Any) -> Any:
        return model.run(partial(fighter.call, **more), fighter.method.steps, numbers)

    if how.brief:
        fighter.row |= first_look(fighter, model, how, run)
        return
    with all_threads(how):
        run()  # what is built in the first call counts for nobody
        fighter.row |= kept_work(model, run) if fighter.method.label == PLAIN else work_of(model, fighter.pipe, run)
    if how.compile:
        for denoiser in denoisers(fighter.pipe).values():
            denoiser.compile()
    for _ in range(how.warmup):
        run()


def first_look(fighter: Fighter, model: Model, how: How, run: Callable[..., Any]) -> Row:
    """One call, and one before it that compiles: multiply-adds (eager), bytes (CUDA: all, and those beside what was there before), and how
    often the host waited for the device in each step but the first."""
    device = torch.device(model.pipe.device)
    cuda = device.type == "cuda"
    if how.compile:
        for denoiser in denoisers(fighter.pipe).values():
            denoiser.compile_repeated_blocks(backend=how.backend)
        run()
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    macs, syncs = None if how.compile else MacMode(), Syncs(device)
    if how.compile and not cuda:  # under a mode nothing would be compiled
        run()
    else:
        with macs or nullcontext(), syncs:
            run(callback_on_step_end=syncs.mark)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    steps = syncs.by_step
    return {
        "macs": macs and macs.macs,
        "peak_bytes": peak,
        "working_bytes": None if peak is None else peak - before,
        "syncs_by_step": steps,
        "syncs_per_step": statistics.mean(steps) if steps else None,
    }


def kept_work(model: Model, run: Callable[[], Any]) -> Row:
    """Of the plain pipeline, which every process of a bundled model has: counted once."""
    if not isinstance(model, BundledModel):
        return work_of(model, model.pipe, run)
    path = model.kept / f"{model.name}-{model.steps}-steps-work.json"
    if not path.exists():
        write_json(path, work_of(model, model.pipe, run))
    found: Row = json.loads(path.read_text())
    return found


def denoisers(pipe: Any) -> dict[str, Any]:
    return dict(denoisers_of(pipe, find_family(type(pipe))))


def work_of(model: Model, pipe: Any, run: Callable[[], Any]) -> Row:
    """Of a whole call: ``macs`` inside matrix products, convolutions and attention, and ``peak_bytes`` at the worst moment.

    Bytes are the device allocator's on CUDA. Elsewhere they are those of tensors made in the run and alive, on real layouts only: of the
    small pipelines' many small operators a count would take longer than all the rest.
    """
    counter = MacMode()
    if str(model.pipe.device).startswith("cuda"):
        with counter:
            run()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = int(torch.cuda.max_memory_allocated())
    else:
        gc.collect()
        live = LiveBytes(model.known(pipe)) if isinstance(model, LayoutModel) else None
        with live or nullcontext(), counter:
            run()
        peak = live.peak if live else None
    return {"macs": counter.macs, "peak_bytes": peak}


def run_rounds(fighters: Sequence[Fighter], model: Model, how: How) -> None:
    """Every fighter once a round, every other round in reverse; at least one round."""
    device = torch.device(model.pipe.device)
    began = time.perf_counter()
    for number in range(how.rounds):
        if number:
            try:
                how.ensure_time((time.perf_counter() - began) / number)
            except TimeoutError:
                return
        gc.collect()
        for fighter in fighters if number % 2 == 0 else fighters[::-1]:
            numbers = [(number * how.timed_batch + i) % max(how.samples, 1) for i in range(how.timed_batch)]
            synchronize(device)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
            started = time.perf_counter()
            for mark in marks[:1]:
                mark.record()
            model.run(fighter.call, fighter.method.steps, numbers)
            for mark in marks[1:]:
                mark.record()
            synchronize(device)
            fighter.seconds.append(time.perf_counter() - started)
            if marks:
                fighter.events.append(marks[0].elapsed_time(marks[1]) / 1e3)


def timing(fighter: Fighter, plain: Fighter) -> Row:
    """The times of a row, and their ratios to the plain pipeline's of the same rounds."""
    ratios = [p / s for p, s in zip(plain.seconds, fighter.seconds, strict=True)]
    mine, base = fighter.row.get("macs"), plain.row.get("macs")
    named = ("peak_bytes", "working_bytes", "denoiser_share", "syncs_per_step")
    beside = {f"plain_{name}": plain.row[name] for name in named if name in plain.row}
    events = {"events": fighter.events, "plain_events": plain.events} if plain.events else {}
    return {
        "seconds": fighter.seconds,
        "plain_seconds": plain.seconds,
        "median_seconds": statistics.median(fighter.seconds),
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "mac_limit": base / mine if base and mine else None,
        **beside,
        **events,
    }


def denoiser_share(fighter: Fighter, model: Model, how: How) -> float | None:
    """Which part of a call's time is inside its denoisers, plugins at work there included; None where it calls none of this pipeline's."""
    spent, began, total = 0.0, 0.0, 0.0
    device = torch.device(model.pipe.device)

    def enter(*_: Any) -> None:
        nonlocal began
        synchronize(device)
        began = time.perf_counter()

    def leave(*_: Any) -> None:
        nonlocal spent
        synchronize(device)
        spent += time.perf_counter() - began

    handles = [handle for each in denoisers(fighter.pipe).values()
               for handle in (each.register_forward_pre_hook(enter), each.register_forward_hook(leave))]  # fmt: skip
    try:
        started = time.perf_counter()
        model.run(fighter.call, fighter.method.steps, range(how.timed_batch))
        synchronize(device)
        total = time.perf_counter() - started
    finally:
        for handle in handles:
            handle.remove()
    return spent / total if spent else None


# pictures ------------------------------------------------------------------------------------------------------------------------------


def save_strip(made: Pictures, path: Path) -> None:
    """The first pictures side by side (of videos the frames)."""
    import io

    from PIL import Image

    tiles = [strip(to_images(frames)) for frames in made[: SHOWN if made.shape[1] == 1 else 1]]
    sheet = Image.new("RGB", (sum(tile.width + 4 for tile in tiles), max(tile.height for tile in tiles)), "white")
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width + 4
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
