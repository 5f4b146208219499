"""What a GPU alone can tell, within minutes: `bash examples/benchmarks/cuda.sh`.

Arms in the order of their weight, each in a process of its own and begun only while it still fits; after each one the JSON and the picture
are written with all that is there.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.metrics import psnr
from diffgraft.methods.files import write_atomic

from .bout import How, open_model, told
from .cases import FAR, Bout, Method, cache, peer, plugin
from .findings import OURS, duels, measured
from .methods import own_copy, put_on
from .plots import by_layout
from .rows import Row, Store, key_of

IDLE, SCHEMA = "idle", 1
GRACE = 10.0
"""Seconds that an arm has for its last round before its process is stopped."""


@dataclass(frozen=True)
class Arm:
    """One process: a bout, how it is measured, and the seconds that it was expected to take on an H200, its start included."""

    name: str
    bout: Bout
    how: How
    estimate: float


@dataclass
class Clock:
    """Whether an arm still fits, by how the estimates before it held."""

    until: float
    expected: float = 0.0
    spent: float = 0.0

    @property
    def pace(self) -> float:
        return min(3.0, max(0.3, self.spent / self.expected)) if self.expected else 1.0

    def fits(self, seconds: float) -> bool:
        return time.time() + seconds * self.pace <= self.until

    def count(self, estimate: float, seconds: float) -> None:
        self.expected, self.spent = self.expected + estimate, self.spent + seconds


# the arms ------------------------------------------------------------------------------------------------------------------------------


def caches_of(layout: str, compiled: bool) -> tuple[tuple[Method, ...], str]:
    """What is measured on a layout, and the package among it. Compiled: what needs no second look at its settings."""
    if layout in ("sd15", "sdxl"):
        pair = plugin("deepcache", deepcache={"interval": 3}), peer("DeepCache", "deepcache", interval=3)
        idle = plugin(IDLE, deepcache={"interval": 1}), plugin(f"faster_diffusion {IDLE}", faster_diffusion={"keys": 1, "noise": 0})
        both = (*idle, *pair, plugin("faster_diffusion", faster_diffusion={}))
        return (idle[0], *pair) if compiled else both, "DeepCache"
    far, first, taylor = {"threshold": FAR[layout]}, "diffusers_cache first_block", "diffusers_cache taylorseer"
    few: tuple[Method, ...] = (
        plugin(IDLE, ertacache={"threshold": 0}, diffusers_cache={"method": "off"}),
        plugin("ertacache", ertacache={"artefact": "calibrate", **far}),
        plugin(first, diffusers_cache={"method": "first_block", **far}),
        cache("FirstBlockCache", "FirstBlockCacheConfig", first, **far),
        peer("cache-dit", first, warmup=0, **far),
    )
    series = {"cache_interval": 3, "disable_cache_before_step": 2}
    theirs = cache("TaylorSeer", "TaylorSeerCacheConfig", taylor, **series)
    taylors = plugin(taylor, diffusers_cache={"method": "taylorseer", **series}), theirs
    # diffusers' default expressions for its layers match none of Wan's
    return few if compiled or layout == "wan" else (*few, *taylors), "cache-dit"


STEPS = {"sd15": 50, "sdxl": 20, "flux": 28, "wan": 10}
SHAPES: Mapping[str, Mapping[str, Any]] = {"wan": {"num_frames": 33}}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"channels": 0.1, "height": 64, "width": 64},
    "sdxl": {"channels": 0.1, "height": 64, "width": 64},
    "flux": {"channels": 0.25, "height": 64, "width": 64},
    "wan": {"channels": 0.34, "height": 64, "width": 64, "num_frames": 5},
}
EMOJI = {
    "emoji-sd": (50, plugin("deepcache", deepcache={"interval": 3})),
    "emoji-flux": (28, plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": 0.1})),
    "emoji-wan": (20, plugin("ertacache", ertacache={"artefact": "calibrate", "threshold": 0.1})),
}
ORDER = (  # seconds on an H200: reckoned from the layouts' multiply-adds, not measured
    ("sd15", False, 40), ("flux", False, 130), ("emoji-sd", False, 25), ("wan", False, 80), ("sdxl", False, 45), ("flux", True, 100),
    ("sd15", True, 50), ("emoji-flux", False, 25), ("emoji-wan", False, 30), ("wan", True, 80), ("sdxl", True, 60),
)  # fmt: skip


def all_arms(out: Path, dry: bool, threads: int, command: str = "") -> list[Arm]:
    """By weight. Dry: three steps of shrunken layouts on the CPU; what is compiled only goes through the front of the compiler."""
    arms = []
    base = How(
        str(out), rounds=1, warmup=0, samples=0, batch=1, reference_steps=0, device="cpu" if dry else "cuda", threads=threads,
        command=command, brief=True, backend="eager" if dry else "inductor",
    )  # fmt: skip
    for pipeline, compiled, estimate in ORDER:
        name = f"{pipeline} compiled" if compiled else pipeline
        if pipeline in EMOJI:
            steps, method = EMOJI[pipeline]
            bout = Bout("device", pipeline, 3 if dry else steps, (Method("plain", "plain"), method))
            arms.append(Arm(name, bout, replace(base, samples=2, batch=2), 5 if dry else estimate))
            continue
        if dry and compiled and pipeline != "flux":
            continue
        methods, env = caches_of(pipeline, compiled)
        methods = methods[:2] if dry and compiled else methods
        shape = SMALL[pipeline] if dry else SHAPES.get(pipeline, {})
        bout = Bout("speed", pipeline, 3 if dry else STEPS[pipeline], methods, env, shape=shape)
        rounds = 1 if dry else 5 if pipeline == "sd15" else 2  # where the host is what is waited for, an idle plugin shows
        how = replace(base, rounds=rounds, dtype="float32" if dry else "bfloat16", full=not dry, compile=compiled)
        arms.append(Arm(name, bout, how, 5 if dry else estimate))
    return arms


# one arm -------------------------------------------------------------------------------------------------------------------------------


def against_cpu(bout: Bout, how: How) -> None:
    """The same seeds on the CPU and on the device: seconds of both, and the PSNR between their pictures."""
    store = Store(Path(how.out))
    torch.set_num_threads(how.threads)
    model: Any = open_model(replace(bout, arm="quality"), replace(how, device="cpu"))
    for method in bout.methods:
        key = key_of(bout, method, how.circumstances)
        if store.has(key):
            continue
        row = row_of(bout, method, how) | {"machine": machine(how.device), "versions": versions()}
        try:
            model.pipe.to("cpu")
            call: Any = put_on(method, own_copy(model.pipe), model)
            made, seconds = [], []
            for place in ("cpu", how.device):
                how.ensure_time()
                call.to(place)
                if place != "cpu":
                    model.run(call, None, [0])  # the first call loads kernels
                began = time.perf_counter()
                made.append(model.pictures(call, None, how.batch))
                seconds.append(time.perf_counter() - began)
            ratios = psnr(made[1], made[0])
            row |= {"cpu_seconds": seconds[0], "device_seconds": seconds[1], "times_as_fast": seconds[0] / seconds[1]}
            row |= {"psnr": [r if math.isfinite(r) else None for r in ratios], "identical": sum(math.isinf(r) for r in ratios)}
        except Exception as error:  # whatever it is, it is a result
            row["error"] = told(error)
        store.put(key, row)


def row_of(bout: Bout, method: Method, how: How, error: str | None = None) -> Row:
    """What every row says, also that of a method that never ran."""
    about = {"arm": bout.arm, "pipeline": bout.pipeline, "env": bout.env, "steps_of_plain": bout.steps, **how.circumstances}
    who = {"label": method.label, "kind": method.kind, "name": method.name, "setting": method.setting, "ours": method.ours}
    return {**about, **who, "steps": method.steps or bout.steps, "command": how.command, "error": error}


def without_missing(arm: Arm, store: Store, missing: Mapping[str, str]) -> Arm:
    """An arm whose package could not be installed runs without it, in the project's own environment; the package's row says why."""
    why = missing.get(arm.bout.env)
    if not why:
        return arm
    rest = replace(arm.bout, env="", methods=tuple(method for method in arm.bout.methods if method.kind != "peer"))
    for method in arm.bout.methods:
        if method.kind == "peer":
            store.put(key_of(arm.bout, method, arm.how.circumstances), row_of(arm.bout, method, arm.how, why))
    return replace(arm, bout=rest)


# all of them ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What becomes cuda.json."""

    out: Path
    limit: float
    command: str
    began: float = field(default_factory=time.time)
    arms: list[dict[str, Any]] = field(default_factory=list)

    def write(self, device: str) -> None:
        rows = list(Store(self.out))
        found = {
            "schema": SCHEMA, "command": self.command, "limit_s": self.limit, "spent_s": time.time() - self.began,
            "machine": machine(device), "versions": versions(), "arms": self.arms,
            "left_out": [arm["name"] for arm in self.arms if arm["state"] == "left out"], **summary(rows), "rows": rows,
        }  # fmt: skip
        write_atomic(self.out / "cuda.json", (json.dumps(found, indent=1) + "\n").encode())
        if any(row["arm"] == "speed" for row in measured(rows)):
            write_atomic(self.out / "cuda.png", by_layout(rows, str(found["machine"].get("device_name", device))))


def run_arms(
    arms: Sequence[Arm], limit: float, play: Callable[[Bout, How], str], say: Callable[[str], None] = print,
    missing: Mapping[str, str] | None = None, command: str = "",
) -> Record:  # fmt: skip
    """Run what fits into ``limit`` seconds. ``play`` runs a bout and gives "" or why it ended without rows; ``missing``: by package that
    could not be installed, why."""
    first = arms[0].how
    store, record, clock = Store(Path(first.out)), Record(Path(first.out), limit, command), Clock(time.time() + limit)
    for number, arm in enumerate(arms):
        arm = without_missing(arm, store, missing or {})
        keys = {key_of(arm.bout, method, arm.how.circumstances): method for method in arm.bout.methods}
        left = max(0.0, clock.until - time.time())
        entry: dict[str, Any] = {"name": arm.name, "weight": number, "estimate_s": arm.estimate * clock.pace, "seconds": 0.0, "why": ""}
        if all(store.has(key) for key in keys):
            entry["state"] = "kept"
        elif not clock.fits(arm.estimate):
            entry |= {"state": "left out", "why": f"about {entry['estimate_s']:.0f} s; {left:.0f} s were left"}
        else:
            say(f"{arm.name}: about {entry['estimate_s']:.0f} s; {left:.0f} s are left")
            began = time.time()
            why = play(arm.bout, replace(arm.how, until=clock.until - GRACE))
            entry |= {"state": "failed" if why else "done", "seconds": time.time() - began, "why": why}
            clock.count(arm.estimate, entry["seconds"])
            for key, method in keys.items():
                if not store.has(key):
                    store.put(key, row_of(arm.bout, method, arm.how, why or "the process ended without a result"))
        record.arms.append(entry)
        record.write(first.device)
    return record


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The answers: what idle plugins cost a step, whether ours wait for the device, ours beside theirs, and the device beside the CPU."""
    good = measured(rows)
    speed = [row for row in good if row["arm"] == "speed"]
    idle = [{**which(row), **extra(row)} for row in speed if IDLE in row["label"].split()]
    waits = [{**which(row), "kind": row["kind"], "per_step": row["syncs_per_step"], "beyond_plain": row["syncs_per_step"] - base}
             for row in speed if row["syncs_per_step"] is not None and (base := row["plain_syncs_per_step"]) is not None]  # fmt: skip
    pairs = [
        {**which(duel.ours), "theirs": duel.theirs["label"], "time_ratio": duel.ratio, "low": duel.low, "high": duel.high,
         "memory_ratio": None if math.isnan(duel.memory) else duel.memory} for duel in duels(speed)
    ]  # fmt: skip
    device = [{**which(row), **{key: row[key] for key in ("cpu_seconds", "device_seconds", "psnr", "identical")}}
              for row in good if row["arm"] == "device"]  # fmt: skip
    ours: dict[str, float] = {}
    for each in (each for each in waits if each["kind"] == OURS):
        ours[each["label"]] = max(ours.get(each["label"], 0.0), each["beyond_plain"])
    return {"host_syncs_of_ours": ours, "host_syncs": waits, "idle": idle, "pairs": pairs, "against_cpu": device}


def which(row: Row) -> dict[str, Any]:
    return {"pipeline": row["pipeline"], "label": row["label"], "setting": row["setting"], "compile": row["compile"]}


def extra(row: Row) -> dict[str, Any]:
    """Milliseconds a step more than with nothing on the pipeline, by the device's clock where it has one; the rounds' least and most."""
    mine, base = row.get("events") or row["seconds"], row.get("plain_events") or row["plain_seconds"]
    more = [1e3 * (a - b) / row["steps"] for a, b in zip(mine, base, strict=True)]
    share = statistics.median(a / b - 1 for a, b in zip(mine, base, strict=True))
    return {"ms_per_step": statistics.median(more), "low": min(more), "high": max(more), "share": share}
