"""A learned router against a hand-made schedule, random routers, fewer steps and other packages at equal cost.

    python plugins/harmonica/benchmarks/against_schedules.py --pipeline emoji-dit --router harmonica.safetensors --out harmonica.json

For class-conditional pipelines (DiT). Every label is drawn with each seed by every side, 16 pictures a call. Sides, none of which costs
more than the router does (multiply-adds of the denoiser, counted at every operator), but for the second number of fewer steps:

    uniform interval    each layer computes at evenly spaced steps, as often as the others
    random router       the router's own table with the steps after the first shuffled, within attention and within feed-forward
    fewer steps         the plain pipeline
    dit-smoothcache     its helper around attention and feed-forward, with a schedule by its paper's rule (its wheel has no calibration):
                        a kind of layer is reused, for at most three steps in a row, where its output's relative l1 change is below alpha
    cache-dit           DBCache with one block in front, residual threshold by bisection

The last two where they are installed. Error to the uncached picture of the same seed: relative L2 of the last latents, PSNR of the
picture. Intervals: bootstrap over pictures.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import blocks_of, denoisers_of, load_pipeline, unload
from diffgraft.cli.values import load_bare
from diffgraft.installed import registry
from diffgraft.lab.instruments import MacMode
from diffgraft.lab.metrics import Mean, psnr, share
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.inputs import to_float
from diffgraft_harmonica.knobs import routed
from diffgraft_harmonica.method import ALWAYS, computed
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

Schedule = Mapping[str, Sequence[bool]]
"""Layer -> whether it computes, step by step."""
BATCH = 16
ROW = 3
"""Steps in a row that SmoothCache reuses an output at most (its schedules' N)."""


@dataclass
class Side:
    """A way of drawing, and what came of it: by picture the latents, the picture, and whether the judge knew it."""

    label: str
    put: Callable[[], Any] = contextlib.nullcontext
    steps: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    own: Bench | None = None
    """A pipeline of its own, where it leaves traces on one."""
    macs: int = 0
    seconds: float = 0.0
    latents: list[Tensor] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """A pipeline, and how it is called."""

    pipe: Any
    steps: int
    guidance: float

    def draw(self, side: Side, labels: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Any, float]:
        """(last latents, pictures, processor seconds of the denoiser) of one call."""
        found: dict[str, Any] = {"seconds": 0.0}
        model = self.pipe.transformer

        def latents(module: nn.Module, args: tuple[Any, ...]) -> None:
            found["latents"] = args[0].clone()

        handles = [
            self.pipe.vae.post_quant_conv.register_forward_pre_hook(latents),
            model.register_forward_pre_hook(lambda *_: found.update(start=time.process_time())),
            model.register_forward_hook(lambda *_: found.update(seconds=found["seconds"] + time.process_time() - found["start"])),
        ]
        try:
            with side.put():
                made = self.pipe(
                    class_labels=list(labels),
                    guidance_scale=self.guidance,
                    num_inference_steps=side.steps or self.steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="np",
                ).images
        finally:
            for handle in handles:
                handle.remove()
        return found["latents"], to_float(made), found["seconds"]

    def macs(self, side: Side) -> int:
        """Multiply-adds of the denoiser in one picture's run."""
        total, inside = 0, MacMode()
        begun: list[int] = []

        def after(*_: Any) -> None:
            nonlocal total
            total += inside.flops - begun.pop()

        model = self.pipe.transformer
        handles = [model.register_forward_pre_hook(lambda *_: begun.append(inside.flops)), model.register_forward_hook(after)]
        try:
            with inside:
                self.draw(side, [0], [0])
        finally:
            for handle in handles:
                handle.remove()
        return total // 2

    @contextmanager
    def scheduled(self, router: Artefact, schedule: Schedule) -> Iterator[None]:
        """The plugin with a table of this schedule."""
        table = torch.tensor([schedule[path] for path in router.facts["layers"]]).T
        logits = torch.where(table, ALWAYS, -ALWAYS).float()
        given = replace(router, tensors={**router.tensors, "logits": logits})
        load_pipeline(self.pipe, plugins=[("harmonica", {"router": given, "threshold": 0.5})])
        try:
            yield
        finally:
            unload(self.pipe)

    def layers(self) -> dict[str, nn.Module]:
        family = registry.find_family(type(self.pipe))
        return {block.path: block.module for block in routed(blocks_of(family, denoisers_of(self.pipe, family)))}

    def weights(self) -> dict[str, int]:
        """Multiply-adds of each layer, in one call."""
        found: dict[str, int] = {}
        inside = MacMode()
        handles = []
        for path, module in self.layers().items():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: found.__setitem__(path, -inside.flops)))
            handles.append(module.register_forward_hook(lambda *_, path=path: found.__setitem__(path, found[path] + inside.flops)))
        with inside:
            self.draw(Side("one step", steps=1), [0], [0])
        for handle in handles:
            handle.remove()
        return found


def spent(schedule: Schedule, weights: Mapping[str, int]) -> int:
    """Multiply-adds of the layers under a schedule."""
    return sum(sum(steps) * weights[path] for path, steps in schedule.items())


def uniform(weights: Mapping[str, int], steps: int, budget: int) -> Schedule:
    """Every layer at evenly spaced steps, equally often; what is left of the budget gives one step more to layers spread over the depth."""
    often = min(budget // sum(weights.values()), steps)
    left, more = budget - often * sum(weights.values()), set()
    order = sorted(weights, key=lambda path: (hash_of(list(weights).index(path)), path))
    for path in order:
        if often < steps and weights[path] <= left:
            more.add(path)
            left -= weights[path]
    counts = {path: often + (path in more) for path in weights}
    return {path: [i in {round(j * steps / n) for j in range(n)} for i in range(steps)] for path, n in counts.items()}


def hash_of(number: int) -> int:
    """The bits of a number from the other end: 0, 8, 4, 12, ...: neighbours come far apart."""
    return int(f"{number:08b}"[::-1], 2)


def shuffled(schedule: Schedule, seed: int) -> Schedule:
    """The same number of computed calls, put anywhere after the first step, within each kind of layer."""
    rng = np.random.default_rng(seed)
    found: dict[str, Sequence[bool]] = {}
    for kind in sorted({path.rsplit(".", 1)[1] for path in schedule}):
        paths = [path for path in schedule if path.endswith("." + kind)]
        table = np.array([schedule[path] for path in paths])
        found.update(
            {
                path: [True, *row]
                for path, row in zip(paths, rng.permuted(table[:, 1:].ravel()).reshape(len(paths), -1).tolist(), strict=True)
            }
        )
    return found


def smooth_errors(bench: Bench, labels: Sequence[int]) -> dict[str, list[list[float]]]:
    """SmoothCache's calibration: [step][age - 1] of each kind, the mean over its layers of ||A_i - A_{i-age}||_1 / ||A_i||_1."""
    layers = bench.layers()
    kinds = sorted({path.rsplit(".", 1)[1] for path in layers})
    last: dict[str, list[Tensor]] = {path: [] for path in layers}
    found: dict[str, list[list[list[float]]]] = {kind: [[[] for _ in range(ROW)] for _ in range(bench.steps)] for kind in kinds}

    def see(module: nn.Module, args: Any, out: Tensor, path: str) -> None:
        before, step = last[path], found[path.rsplit(".", 1)[1]]
        i = seen[path] = seen.get(path, -1) + 1
        for age, old in enumerate(reversed(before), 1):
            step[i][age - 1].append(float((out - old).abs().sum() / out.abs().sum()))
        last[path] = [*before, out][-ROW:]

    seen: dict[str, int] = {}
    handles = [module.register_forward_hook(partial(see, path=path)) for path, module in layers.items()]
    bench.draw(Side("calibration"), labels, [10_000 + i for i in range(len(labels))])
    for handle in handles:
        handle.remove()
    return {kind: [[statistics.mean(a) if a else math.inf for a in step] for step in rows] for kind, rows in found.items()}


def smooth_schedule(errors: Mapping[str, list[list[float]]], alpha: float) -> dict[str, list[bool]]:
    """Kind -> whether it computes, step by step: reused where the change since it last computed is below alpha."""
    found: dict[str, list[bool]] = {}
    for kind, rows in errors.items():
        steps, last = [], 0
        for i, row in enumerate(rows):
            compute = i == 0 or i - last > ROW or row[i - last - 1] >= alpha
            last = i if compute else last
            steps.append(compute)
        found[kind] = steps
    return found


@contextmanager
def smoothcache(bench: Bench, schedule: Mapping[str, Sequence[bool]]) -> Iterator[None]:
    """dit-smoothcache's helper; it prints a line for every layer and step."""
    with contextlib.redirect_stdout(io.StringIO()):
        package = importlib.import_module("SmoothCache")
        blocks = importlib.import_module("diffusers.models.attention").BasicTransformerBlock
        helper = package.SmoothCacheHelper(
            bench.pipe.transformer, [blocks], list(schedule), {kind: [int(step) for step in steps] for kind, steps in schedule.items()}
        )
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


@contextmanager
def cache_dit(bench: Bench, threshold: float) -> Iterator[None]:
    """cache-dit's DBCache."""
    with contextlib.redirect_stdout(io.StringIO()):
        package = importlib.import_module("cache_dit")
        config = package.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=threshold, num_inference_steps=bench.steps
        )
        package.enable_cache(bench.pipe, cache_config=config)
        try:
            yield
        finally:
            package.disable_cache(bench.pipe)


def smallest(cost: Callable[[float], int], most: int, high: float) -> float | None:
    """The smallest value, to a hundredth, at which a falling ``cost`` is at most ``most``; None: it is not at ``high`` either."""
    if cost(high) > most:
        return None
    low = 0.0
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= most else (middle, high)
    return high


def line(side: Side, reference: Side, against: Side) -> dict[str, Any]:
    """What came of a side: errors to the uncached pictures, ratio of its errors to those of ``against``, picture by picture."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(side.latents, reference.latents, strict=True)]
    theirs = [float((a - b).norm() / b.norm()) for a, b in zip(against.latents, reference.latents, strict=True)]
    pictures, wanted = (np.stack(x.pictures)[:, None] for x in (side, reference))
    right = share(side.right) if side.right else None
    same = all(error == 0 for error in errors)
    return {
        "side": side.label,
        **side.about,
        "macs": side.macs,
        "macs_share": side.macs / reference.macs,
        "seconds_share": side.seconds / reference.seconds,
        "relative_l2": vars(Mean.of(errors)),
        "psnr_db": None if same else vars(Mean.of([min(value, 100.0) for value in psnr(pictures, wanted)])),
        "ratio_to_router": None if same else vars(Mean.of([math.log(a / b) for a, b in zip(errors, theirs, strict=True)])),
        "right": None if right is None else vars(right),
    }


def read(pipeline: str) -> Any:
    """The pipeline, plain and silent."""
    pipe, _ = load_bare(pipeline, [], None, None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(
    router: Annotated[Path, typer.Option(help="What `diffgraft fit harmonica` wrote.")],
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder, or a Hub id.")] = "emoji-dit",
    threshold: Annotated[float, typer.Option(help="tau")] = 0.1,
    labels: Annotated[int, typer.Option(help="Labels 0 to this one less.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Seeds for each label.")] = 2,
    randoms: Annotated[int, typer.Option(min=0, help="Random routers.")] = 3,
    judge: Annotated[str, typer.Option(help="module:function of a judge, or nothing.")] = "diffgraft_checkpoints.emoji.judge:load_bundled",
    peers: Annotated[bool, typer.Option(help="The packages too, where they are installed.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Errors at equal cost."""
    console = Console(width=140)
    pipe = read(pipeline)
    artefact = Artefact.load(router, "harmonica", "fit")
    bench = Bench(pipe, artefact.made_for.steps, artefact.facts["guidance_scale"])
    ours = dict(zip(artefact.facts["layers"], computed(artefact.tensors["logits"], threshold), strict=True))
    weights = bench.weights()
    budget, whole = spent(ours, weights), bench.steps * sum(weights.values())
    even = uniform(weights, bench.steps, budget)
    reference, mine = Side("uncached"), Side("harmonica", partial(bench.scheduled, artefact, ours), about={"threshold": threshold})
    sides = [reference, mine, Side("uniform interval", partial(bench.scheduled, artefact, even))]
    sides += [Side(f"random router {i}", partial(bench.scheduled, artefact, shuffled(ours, i))) for i in range(randoms)]
    reference.macs, mine.macs = bench.macs(reference), bench.macs(mine)
    count = mine.macs * bench.steps // reference.macs
    sides.append(Side(f"{count} steps", steps=count))
    sides.append(Side(f"{count + 1} steps", steps=count + 1))
    left_out: dict[str, str] = {}
    if peers:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module("SmoothCache")
            errors = smooth_errors(bench, range(8))

            def smooth_cost(alpha: float) -> int:
                schedule = smooth_schedule(errors, alpha)
                return spent({path: schedule[path.rsplit(".", 1)[1]] for path in weights}, weights)

            alpha = smallest(smooth_cost, budget, 16.0)
            if alpha is None:
                left_out["dit-smoothcache"] = f"computes more at every alpha: at most {ROW} steps in a row are reused"
            else:
                put = partial(smoothcache, bench, smooth_schedule(errors, alpha))
                sides.append(Side("dit-smoothcache", put, about={"alpha": alpha, "schedule": smooth_schedule(errors, alpha)}))
        except Exception as error:  # of somebody else's package, whatever it is
            left_out["dit-smoothcache"] = f"does not run: {type(error).__name__}: {error}"
        try:
            own = replace(bench, pipe=read(pipeline))  # its modules stay on the transformer after disable_cache
            found = smallest(lambda level: own.macs(Side("", partial(cache_dit, own, level))), mine.macs, 4.0)
            if found is None:
                left_out["cache-dit"] = "computes more at every threshold"
            else:
                sides.append(Side("cache-dit", partial(cache_dit, own, found), about={"threshold": found}, own=own))
        except Exception as error:
            left_out["cache-dit"] = f"does not run: {type(error).__name__}: {error}"
    asked = [(label, 1000 * turn + label) for turn in range(rounds) for label in range(labels)]
    for side in sides:
        on = side.own or bench
        side.macs = side.macs or on.macs(side)
        for begin in range(0, len(asked), BATCH):
            part = asked[begin : begin + BATCH]
            latents, pictures, seconds = on.draw(side, [label for label, _ in part], [seed for _, seed in part])
            side.latents += list(latents)
            side.pictures += list(pictures)
            side.seconds += seconds
        console.print(f"{side.label}: {side.macs / reference.macs:.1%} of the multiply-adds", highlight=False)
    if judge:
        module, function = judge.split(":")
        knows = getattr(importlib.import_module(module), function)()
        names = {number: name for name, number in pipe.labels.items()}
        prompts = [f"{'an' if names[label][0] in 'aeiou' else 'a'} {names[label]}" for label, _ in asked]
        for side in sides:
            images = [Image.fromarray((255 * picture).round().astype(np.uint8)) for picture in side.pictures]
            side.right = [bool(verdict) for verdict in knows.score(images, prompts)["object"]]
    lines = [line(side, reference, mine) for side in sides]
    table = Table(title=f"{pipeline}, {bench.steps} steps, guidance {bench.guidance:g}, {len(asked)} pictures, tau {threshold:g}")
    for column in ("side", "MACs", "time", "latents, rel. L2", "error / router's", "PSNR dB", "right"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for row in lines:
        l2, db, ratio, right = row["relative_l2"], row["psnr_db"], row["ratio_to_router"], row["right"]
        between = "" if ratio is None else f"{math.exp(ratio['mean']):.2f} ({math.exp(ratio['low']):.2f} to {math.exp(ratio['high']):.2f})"
        table.add_row(
            row["side"],
            f"{row['macs_share']:.1%}",
            f"{row['seconds_share']:.0%}",
            f"{l2['mean']:.4f} ({l2['low']:.4f} to {l2['high']:.4f})",
            between,
            "" if db is None else f"{db['mean']:.2f} ({db['low']:.2f} to {db['high']:.2f})",
            "" if right is None else f"{right['share']:.1%} ({right['low']:.1%} to {right['high']:.1%})",
        )
    console.print(table)
    for name, why in left_out.items():
        console.print(f"{name}: {why}", highlight=False)
    by_step = [sum(steps[i] for steps in ours.values()) for i in range(bench.steps)]
    console.print(f"layers computed by step: {by_step}; routed {budget / whole:.1%} of the layers' multiply-adds", highlight=False)
    if out is not None:
        facts = {"pipeline": pipeline, "steps": bench.steps, "guidance": bench.guidance, "pictures": len(asked), "by_step": by_step}
        facts |= {"fit": artefact.facts["fit"], "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
        out.write_text(json.dumps({**facts, "lines": lines, "left_out": left_out}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
