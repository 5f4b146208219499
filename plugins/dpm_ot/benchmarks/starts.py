"""Starts of a short run at equal numbers of denoiser calls: DPM-OT's, what is left of it without optimal transport, and noise.

    python plugins/dpm_ot/benchmarks/starts.py --pipeline emoji-dit --out starts
    python plugins/dpm_ot/benchmarks/starts.py --pipeline PATH/emoji-pixel --out pixel

Of the emoji pipelines: class by class where there are classes. J renders of training combinations are what the map is fitted on ("the
map's pictures"). A setting STEPS:START is a run of STEPS that begins at the first step at or below START; its arms make as many pictures,
of the same classes, by the same number of denoiser calls:

    noise    the plain pipeline with so few steps
    dpm_ot   the target that optimal transport gives to the noise
    drawn    any of the map's targets of the class by lot, with the target's own noise: no transport
    fresh    a picture of the map's by lot, noised with the run's own noise (image-to-image from a training picture)

and beside them `pictures`: as many of the map's pictures themselves, and `renders`: as many true renders that the map does not hold.

Frechet distance of the judge's features to true renders (others than all these); RMS distance in pixel values (0 to 255) to the nearest of
the map's pictures (of the class); different pictures among those made (no nearer than 2 to an earlier one); share in which the judge sees
an object of the class (of any kind). Intervals: 95 % of a bootstrap over pictures, Frechet's about its value. Of each map: how far its
cells are from equal measures, and the mean of <x, T(x)> over fresh noise against POT's exact plan (where it is installed) and a draw by
lot: all that optimal transport gains. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffusers
import numpy as np
import torch
import typer
from diffgraft import Effects, Paper, Plugin, PluginConfig, find_family, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.decoding import to_latents
from diffgraft.methods.examples import Example, pixels_of
from diffgraft.methods.fitness import frechet
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.starts import cut, is_first, start_from, unit_noise
from diffgraft.methods.variants import own_size
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import OTHER, load_bundled
from diffgraft_checkpoints.train.pixel import KINDS
from diffgraft_dpm_ot import DpmOt
from diffgraft_dpm_ot.fitter import classes_of
from diffgraft_dpm_ot.method import cell_of, values
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor

SAME = 2.0
SENT = 4000
"""Samples of noise that POT is given."""


# data ---------------------------------------------------------------------------------------------------------------------------------


def renders(kinds: Sequence[str], each: int, seed: int, side: int) -> list[tuple[str, Image.Image]]:
    """(kind, upright render of a training combination), ``each`` of every kind."""
    shown = scenes.split()[0]
    made = []
    for kind in kinds:
        choice = [labels for labels in shown if labels.object == kind]
        for i in range(each):
            rng = np.random.default_rng([seed, KINDS.index(kind), i])
            picture = scenes.render(scenes.upright(scenes.sample_scene(choice[int(rng.integers(len(choice)))], rng)))
            made.append((kind, picture if side == scenes.SIZE else picture.reduce(scenes.SIZE // side)))
    return made


def rows(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(each.convert("RGB"))).float().flatten() for each in pictures])


# arms ---------------------------------------------------------------------------------------------------------------------------------


class LotConfig(PluginConfig):
    start: float = Field(500.0, description="as DPM-OT's")
    targets: Any = Field(None, description="[n, ...] for each sample: noised latents, or clean ones")
    clean: bool = Field(False, description="whether they are to be noised")


class Lot(Plugin):
    """A late start from given latents: the control without a map."""

    name = "lot"
    paper = Paper("none", "", "a control")
    families = ("pixel", "dit")
    neutral: ClassVar[dict[str, Any]] = {"targets": None}
    Config = LotConfig
    effects = Effects(edits=frozenset({"latents", "schedule"}))
    config: LotConfig

    def schedule(self, call: Any, next: Any) -> Any:
        return cut(call, next(call), self.config.start)

    def denoise(self, call: Any, next: Any) -> Tensor:
        if call.step.call == 0:
            first = is_first(call)
            x = self.config.targets if not self.config.clean else start_from(call, self.config.targets) if first else call.latents
            if first and not self.config.clean:
                unit_noise(call)  # refuses where it must
            call = call.with_latents(x.to(call.latents))
        return next(call)  # type: ignore[no-any-return]


# figures ------------------------------------------------------------------------------------------------------------------------------


def interval(measure: Callable[[Any], float], number: int, draws: int = 400, about: bool = False) -> list[float]:
    """[value, low, high] of a measure of the pictures with these numbers; ``about``: the resamples' spread about the value itself."""
    rng, value = np.random.default_rng(0), measure(np.arange(number))
    found = np.asarray([measure(rng.integers(0, number, number)) for _ in range(draws)])
    found = found - found.mean() + value if about else found
    low, high = np.quantile(found, (0.025, 0.975))
    return [round(float(each), 3) for each in (value, low, high)]


class Scale:
    """What pictures are measured by."""

    def __init__(self, kept: Sequence[tuple[str, Image.Image]], true: Sequence[tuple[str, Image.Image]], classes: bool) -> None:
        self.judge, self.classes = load_bundled(), classes
        self.kept, self.kinds = rows([picture for _, picture in kept]), [kind for kind, _ in kept]
        self.true = self.judge.features([picture for _, picture in true])

    def figures(self, made: Sequence[Image.Image], kinds: Sequence[str]) -> dict[str, Any]:
        features, flat = self.judge.features(list(made)), rows(made)
        apart = torch.cdist(flat, self.kept) / math.sqrt(flat.shape[1])
        if self.classes:
            other = torch.tensor([[mine != its for its in self.kinds] for mine in kinds])
            apart = apart.masked_fill(other, torch.inf)
        near = apart.min(1).values.numpy()
        between = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
        new = [bool((between[i, :i] > SAME).all()) for i in range(len(made))]
        seen = [each["object"] for each in self.judge.predict(list(made))]
        right = np.asarray([one == kind if self.classes else one != OTHER for one, kind in zip(seen, kinds, strict=True)], dtype=float)
        n = len(made)
        return {
            "frechet": interval(lambda i: frechet(features[i], self.true), n, about=True),
            "nearest": interval(lambda i: float(near[i].mean()), n),
            "different": f"{sum(new)} of {n}",
            "recognised": interval(lambda i: float(right[i].mean()), n),
        }


@torch.no_grad()
def transport(found: Artefact) -> dict[str, Any]:
    """Mean <x, T(x)> in units of the targets' spread, of the first class: by the map, by POT's exact plan, by lot; cells that agree."""
    tensors = found.tensors
    flat, classes = tensors["targets"].flatten(1), classes_of(tensors["labels"])
    unit, members = tensors["unit"], (classes == 0).nonzero()[:, 0]
    y, h = flat[members] - flat[members].mean(0), (tensors["heights"] * unit)[members]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SENT - SENT % len(y), y.shape[1], generator=generator)
    j = cell_of(values(x, flat[members], h))
    inner = x @ y.T / unit
    lot = torch.randint(len(y), (len(x),), generator=generator)
    told = {"targets": len(y), "map": float(inner[torch.arange(len(x)), j].mean()), "lot": float(inner[torch.arange(len(x)), lot].mean())}
    if importlib.util.find_spec("ot") is not None:
        import ot

        plan = ot.emd(np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)), -inner.double().numpy(), numItermax=10**7)
        told |= {"plan": float((plan * inner.double().numpy()).sum()), "agree": float((plan.argmax(1) == j.numpy()).mean())}
    return {key: round(value, 4) for key, value in told.items()}


def sheet(arms: dict[str, list[Image.Image]], path: Path, shown: int = 12, side: int = 64) -> None:
    """A row of pictures for each arm."""
    page = Image.new("RGB", (110 + shown * (side + 2), len(arms) * (side + 2)), "white")
    for row, (name, pictures) in enumerate(arms.items()):
        ImageDraw.Draw(page).text((4, row * (side + 2) + side // 2 - 6), name, fill="black")
        step = max(1, len(pictures) // shown)
        for column, picture in enumerate(pictures[::step][:shown]):
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (110 + column * (side + 2), row * (side + 2)))
    page.save(path, optimize=True)


def main(
    pipeline: str = "emoji-dit",
    out: Path = Path("starts"),
    settings: Annotated[str, typer.Option(help="STEPS:START, with commas")] = "10:500,20:500,20:250",
    classes: Annotated[int, typer.Option(help="Kinds that are drawn.")] = 8,
    each: Annotated[int, typer.Option(help="Pictures an arm, of every kind.")] = 8,
    kept: Annotated[int, typer.Option(help="The map's pictures, of every kind.")] = 16,
    fit_steps: int = 300,
    batch: int = 16,
) -> None:
    """Fit a map for each setting, make all arms, and measure them."""
    torch.manual_seed(0)
    pipe: Any = unload(load_pipeline(pipeline, plugins=[]))
    if find_family(type(pipe)).name == "pixel":
        pipe = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    family, has_classes = find_family(type(pipe)), isinstance(getattr(pipe, "labels", None), dict)
    side = (own_size(pipe) or (64, 64))[0]
    kinds = KINDS[:classes]
    label = {kind: pipe.get_label_ids([kind])[0] for kind in kinds} if has_classes else {}
    ours = renders(kinds, kept, 1, side)
    scale = Scale(ours, renders(kinds, 32, 3, side), has_classes)
    asked = [kind for kind in kinds for _ in range(each)]
    examples = [Example(None, picture, label.get(kind)) for kind, picture in ours]

    @torch.no_grad()
    def clean(picked: Sequence[Image.Image]) -> Tensor:
        pixels = pixels_of([Example(None, each) for each in picked], side, side)
        assert pixels is not None
        return to_latents(pipe, family, pixels)

    def make(plugin: Callable[[Sequence[int]], list[Any]], steps: int) -> tuple[list[Image.Image], int]:
        made: list[Image.Image] = []
        counted: list[int] = []
        for begin in range(0, len(asked), batch):
            numbers = range(begin, min(begin + batch, len(asked)))
            if has_classes:
                what: dict[str, Any] = {"class_labels": [label[asked[i]] for i in numbers]}
            else:
                what = {"batch_size": len(numbers)}
            load_pipeline(pipe, plugins=plugin(numbers))
            calls: list[None] = []
            model = getattr(pipe, family.denoisers[0])
            handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(None))
            try:
                generators = [torch.Generator().manual_seed(i) for i in numbers]
                made += pipe(**what, num_inference_steps=steps, generator=generators).images
            finally:
                handle.remove()
                unload(pipe)
            counted.append(len(calls))
        assert len(set(counted)) == 1
        return made, counted[0]

    rng = np.random.default_rng(7)
    of_kind = {kind: [i for i, (its, _) in enumerate(ours) if its == kind or not has_classes] for kind in kinds}
    picked = [of_kind[kind][int(rng.integers(len(of_kind[kind])))] for kind in asked]
    shown = {"pictures": [ours[i][1] for i in picked], "renders": [picture for _, picture in renders(kinds, each, 4, side)]}
    result: dict[str, Any] = {
        "pipeline": Path(pipeline).name,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()},
        "pictures": len(asked),
        "targets": len(ours),
        "beside": {name: scale.figures(made, asked) for name, made in shown.items()},
        "settings": {},
    }
    page = dict(shown)
    for setting in settings.split(","):
        steps, start = int(setting.split(":")[0]), float(setting.split(":")[1])
        began, path = time.process_time(), out.with_name(f"{out.name}-{steps}-{start:g}.safetensors")
        ours_at = CallSettings(steps=steps)
        found = fit(pipe, DpmOt(start=start), examples, ours_at, path, FitPlan(steps=fit_steps, batch=batch), knobs={"targets": len(ours)})
        about = {key: found.facts[key] for key in ("timestep", "off", "chance", "empty")}
        row: dict[str, Any] = {
            "map": {**about, "seconds": round(time.process_time() - began, 1)},
            "transport": transport(found),
            "arms": {},
        }
        y, labels = found.tensors["targets"], found.tensors["labels"]
        lots = [int(rng.choice((labels == label[kind]).nonzero()[:, 0].numpy() if has_classes else len(y))) for kind in asked]
        arms: dict[str, Callable[[Sequence[int]], list[Any]]] = {
            "dpm_ot": lambda numbers, found=found, start=start: [DpmOt(artefact=found, start=start)],
            "drawn": lambda numbers, y=y, lots=lots, start=start: [Lot(targets=y[[lots[i] for i in numbers]], start=start)],
            "fresh": lambda numbers, start=start: [Lot(targets=clean([ours[picked[i]][1] for i in numbers]), start=start, clean=True)],
        }
        calls = 0
        for name, plugin in arms.items():
            made, calls = make(plugin, steps)
            row["arms"][name] = {"forwards": calls, **scale.figures(made, asked)}
            page[f"{name} {setting}"] = made
        made, forwards = make(lambda numbers: [], calls)
        row["arms"]["noise"] = {"forwards": forwards, **scale.figures(made, asked)}
        page[f"noise {calls} steps"] = made
        result["settings"][setting] = row
        print(setting, json.dumps(row, indent=1), flush=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    sheet(page, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
