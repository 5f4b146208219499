"""ERTACache against the plain residual cache, diffusers' FirstBlockCache and fewer steps: error to the uncached picture, and time.

    python plugins/ertacache/benchmarks/against_caches.py --pipeline emoji-wan --computed 25 --computed 15 --out ertacache.json
    python plugins/ertacache/benchmarks/against_caches.py --pipeline tiny:flux --computed 3 --steps 6 --samples 2 --rounds 1

Calibrates on prompts and seeds of its own (or takes --artefact), then runs the same samples with each method. For every number of computed
steps asked for: ERTACache with each kind of phi, with and without rectification; the plain residual cache, which is the same policy with
neither; FirstBlockCache at the smallest threshold that computes no more than that, and at the smallest one that takes no more time than
ERTACache at its defaults; and a run with fewer steps. Error: relative L2 of the last latents, and PSNR of the pictures. Time: from
set_timesteps to the last scheduler step, median over samples and rounds; methods take turns.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffgraft
import diffusers
import torch
import typer
from diffgraft import Paper, Plugin, blocks_of, denoisers_of, load_pipeline, unload
from diffgraft.cli.values import call_settings, load_bare, parse_assignments, read_prompts
from diffgraft.installed import registry
from diffgraft.lab.instruments import synchronize
from diffgraft.lab.metrics import psnr
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, default_steps, make_pictures, make_samples, parameters
from diffgraft_ertacache import ERTACache
from diffgraft_ertacache.method import policy, threshold_for
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from rich.console import Console
from rich.table import Table

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ertacache": {},
    "ertacache, phi by velocity": {"phi": "velocity"},
    "ertacache, phi off": {"phi": "off"},
    "ertacache, phi by velocity, no rectification": {"phi": "velocity", "rectify": False},
    "plain residual cache": {"phi": "off", "rectify": False},
}


@dataclass
class Clock:
    """When the schedule was made."""

    started: float = 0.0


class Watch(Plugin):
    """Records the last latents and the seconds from set_timesteps to the last step."""

    name = "watch"
    paper = Paper("none", "0000.00000", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    State = Clock

    def schedule(self, call: Any, next: Any) -> Any:
        synchronize(call.pipe.device)
        call.shared.started = time.perf_counter()
        return next(call)

    def step(self, call: Any, next: Any) -> Any:
        out = next(call)
        if call.step.is_last:
            synchronize(call.pipe.device)
            seconds = time.perf_counter() - call.shared.started
            call.record({"latents": out.sample.float().cpu(), "seconds": torch.tensor(seconds)})
        return out


@dataclass(frozen=True)
class Shot:
    """One run: latents, picture, seconds, and how many steps' worth of denoiser calls ran the blocks."""

    latents: torch.Tensor
    pictures: Pictures
    seconds: float
    computed: float


@dataclass
class Way:
    """A way of making the samples: plugins, steps, FirstBlockCache's threshold; and what came out, one shot a sample and round."""

    label: str
    knobs: Mapping[str, Any] | None = None
    steps: int | None = None
    first_block: float | None = None
    shots: list[list[Shot]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(shot.seconds for shots in self.shots for shot in shots)

    @property
    def computed(self) -> float:
        return statistics.mean(shot.computed for shot in self.shots[0])


@dataclass(frozen=True)
class Bench:
    """A pipeline and what is asked of it."""

    pipe: Any
    settings: CallSettings
    samples: Sequence[Sample]

    def shoot(self, way: Way, sample: Sample) -> Shot:
        """One run; afterwards the pipeline is plain again."""
        settings = replace(self.settings, steps=way.steps or self.settings.steps)
        plugins: list[Any] = [Watch()] + ([("ertacache", way.knobs)] if way.knobs is not None else [])
        with first_block_cache(self.pipe, way.first_block), counted(self.pipe) as counts:
            load_pipeline(self.pipe, plugins=plugins)
            try:
                pictures = make_pictures(self.pipe, [sample], settings)
                records = self.pipe.plugins.report().plugins["watch"].records
                steps = self.pipe.plugins.report().steps
            finally:
                unload(self.pipe)
        return Shot(records["latents"], pictures, float(records["seconds"]), steps * counts["blocks"] / counts["calls"])

    def round(self, way: Way) -> None:
        """All samples once."""
        way.shots.append([self.shoot(way, sample) for sample in self.samples])

    def computed_steps(self, threshold: float) -> float:
        """Steps that FirstBlockCache computes, mean over the samples."""
        way = Way("", first_block=threshold)
        self.round(way)
        return way.computed

    def first_block_threshold(self, most: float) -> float | None:
        """The smallest threshold at which FirstBlockCache computes at most ``most`` steps, to a hundredth; None: none up to 64 does."""
        low, high = 0.0, 0.01
        while self.computed_steps(high) > most:
            low, high = high, 2 * high
            if high > 64:
                return None
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.computed_steps(middle) <= most else (middle, high)
        return high


@contextmanager
def first_block_cache(pipe: Any, threshold: float | None) -> Iterator[None]:
    """diffusers' FirstBlockCache on every denoiser."""
    models = [] if threshold is None else list(denoisers_of(pipe, registry.find_family(type(pipe))).values())
    try:
        for model in models:
            model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        yield
    finally:
        for model in models:
            if model.is_cache_enabled:
                model.disable_cache()


@contextmanager
def counted(pipe: Any) -> Iterator[dict[str, int]]:
    """Counts denoiser calls, and calls in which the last block computed."""
    counts = {"calls": 0, "blocks": 0}
    handles = []
    family = registry.find_family(type(pipe))
    for name, model in denoisers_of(pipe, family).items():
        block = [info for info in blocks_of(family, {name: model}) if not info.is_layer][-1].module
        leaf = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
        for module, key in ((model, "calls"), (leaf, "blocks")):
            handles.append(module.register_forward_pre_hook(lambda *_, key=key: counts.__setitem__(key, counts[key] + 1)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def compare(way: Way, reference: Way) -> dict[str, Any]:
    """A line of the table."""
    pairs = list(zip(way.shots[0], reference.shots[0], strict=True))
    errors = [float((a.latents - b.latents).norm() / b.latents.norm()) for a, b in pairs]
    decibels = [psnr(a.pictures, b.pictures)[0] for a, b in pairs]
    return {
        "method": way.label,
        "knobs": {name: value for name, value in (way.knobs or {}).items() if name != "artefact"},
        "first_block_threshold": way.first_block,
        "computed": way.computed,
        "seconds": way.seconds,
        "speed_up": reference.seconds / way.seconds,
        "relative_l2": errors,
        "psnr_db": decibels,
        "mean_relative_l2": statistics.mean(errors),
        "mean_psnr_db": statistics.mean(decibels),
    }


def make_tiny(family: str) -> tuple[Any, CallSettings]:
    """The family's random tiny pipeline and its own call."""
    known = registry.families()[family]
    assert known.tiny is not None
    module, function = known.tiny.split(":")
    made = getattr(importlib.import_module(module), function)(known.pipelines[0], 0)
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "class_labels", "num_inference_steps", "output_type")}
    return made.pipe, CallSettings(steps=made.kwargs["num_inference_steps"], extra=extra)


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder, a Hub id, or tiny:FAMILY.")],
    computed: Annotated[list[int], typer.Option(help="Computed steps to compare at; repeat for several.")],
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 4,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Prompts to calibrate on; their seeds are others than the samples'.")] = 8,
    artefact: Annotated[Path | None, typer.Option(help="A calibration made before.")] = None,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    euler: Annotated[bool, typer.Option("--euler", help="Put FlowMatchEulerDiscreteScheduler in: only there phi can act.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often all samples are timed.")] = 3,
    first_block: Annotated[bool, typer.Option(help="Compare with FirstBlockCache too, which takes most of the time.")] = True,
    arg: Annotated[list[str] | None, typer.Option("-a", metavar="NAME=VALUE", help="Another argument of the call.")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Error and time of caches on one pipeline."""
    console = Console()
    extra = parse_assignments(arg, "-a")
    if pipeline.startswith("tiny:"):
        pipe, settings = make_tiny(pipeline.removeprefix("tiny:"))
        settings = replace(settings, steps=steps or settings.steps, guidance_scale=guidance_scale, extra={**settings.extra, **extra})
        known: Sequence[str] = ("a red apple on the left", "two green dogs")
    else:
        bundled = registry.bundled_of(pipeline)
        settings = call_settings(steps, guidance_scale, None, None, None, None, extra)
        pipe, _ = load_bare(pipeline, [], device, dtype)
        settings = replace(settings, steps=settings.steps or default_steps(pipe))
        known = bundled.prompts if bundled else ()
    pipe.set_progress_bar_config(disable=True)
    if euler:
        old = pipe.scheduler.config
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=old.get("flow_shift", old.get("shift", 1.0)))
    texts = read_prompts(None, prompts) or list(known)
    texts = texts if "prompt" in parameters(pipe) else []
    total = settings.steps or 0
    if artefact is None:
        teaching = make_samples(pipe, [1000 + i for i in range(calibrate_on)], texts)
        with console.status("calibrating"), tempfile.TemporaryDirectory() as folder:
            found = calibrate(pipe, ERTACache(), teaching, settings, Path(folder) / "artefact.safetensors")
    else:
        found = Artefact.load(artefact, "ertacache")
    errors = found.tensors["error"].tolist()
    bench = Bench(pipe, settings, make_samples(pipe, list(range(samples)), texts))
    reference, results = Way("uncached"), []
    for number in computed:
        usual = ERTACache().config
        threshold = threshold_for(errors, number, usual.max_reuse, usual.first, usual.last)
        ages = policy(errors, threshold, usual.max_reuse, usual.first, usual.last)
        count = ages.count(0)
        base = {"artefact": found, "threshold": threshold}
        ways = [Way(label, {**base, **more}) for label, more in SETTINGS.items()] + [Way("fewer steps", steps=count)]
        reasons = {} if first_block else {"FirstBlockCache": "not asked for"}
        if first_block:
            with console.status(f"{count} of {total} steps: looking for FirstBlockCache's threshold"):
                try:
                    value = bench.first_block_threshold(count)
                    if value is None:
                        reasons["FirstBlockCache"] = f"computes more than {count} steps at every threshold"
                    else:
                        ways.append(Way("FirstBlockCache, equal steps", first_block=value))
                except (AttributeError, ValueError, RuntimeError, KeyError) as error:  # it needs a registered block and a named context
                    reasons["FirstBlockCache"] = f"does not run here: {error}"
        with console.status(f"{count} of {total} steps: measuring"):
            for turn in range(rounds):
                for way in [reference, *ways][:: 1 if turn % 2 == 0 else -1]:
                    bench.round(way)
            if not reasons:  # fewer and fewer computed steps, until it is as fast
                for fewer in range(count - 1, 0, -1):
                    way = ways[-1]
                    if way.seconds <= ways[0].seconds:
                        ways.append(replace(way, label="FirstBlockCache, equal time"))
                        break
                    value = bench.first_block_threshold(fewer)
                    if value is None:
                        break
                    way = Way("FirstBlockCache, faster", first_block=value)
                    for _ in range(rounds):
                        bench.round(way)
                    ways.append(way)
                else:
                    reasons["FirstBlockCache, equal time"] = "slower than ERTACache at every threshold"
        lines = [compare(way, reference) for way in [reference, *ways]]
        results.append({"computed": count, "threshold": threshold, "ages": ages, "lines": lines, "not_measured": reasons})
        table = Table(title=f"{pipeline}, {count} of {total} steps computed, lambda = {threshold:.3g}, {samples} samples")
        for column in ("method", "computed", "threshold", "rel. L2", "PSNR dB", "seconds", "speed-up"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for line in lines:
            knob = "" if line["first_block_threshold"] is None else f"{line['first_block_threshold']:.3g}"
            decibel = "inf" if math.isinf(line["mean_psnr_db"]) else f"{line['mean_psnr_db']:.2f}"
            table.add_row(line["method"], f"{line['computed']:.1f}", knob, f"{line['mean_relative_l2']:.4f}", decibel,
                          f"{line['seconds']:.3f}", f"{line['speed_up']:.2f}x")  # fmt: skip
        console.print(table)
        for name, reason in reasons.items():
            console.print(f"{name}: {reason}", highlight=False)
    if out is not None:
        facts = {
            "pipeline": pipeline, "steps": total, "scheduler": type(pipe.scheduler).__name__, "device": str(pipe.device),
            "threads": torch.get_num_threads(), "machine": platform.machine(), "rounds": rounds, "made_for": asdict(found.made_for),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__},
        }  # fmt: skip
        facts["made_for"].pop("denoisers")
        out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
