"""Which attribute does a direction of h-space move, and does a random one of the same norm not do the same? emoji-sd, or a pixel model.

    python plugins/hspace_directions/benchmarks/directions.py --out directions
    python plugins/hspace_directions/benchmarks/directions.py --pipeline emoji-pixel --out directions-pixel

Directions are principal components of h over `--samples` pictures (of training captions where the model reads captions; nobody labels
anything). Each is added with plus and minus `--strengths` standard deviations to the same held-out pictures. The controls are random
directions that have, at each step, the norm of the component with the same number (`random`), and random mixtures of the components at
that norm (`mixture`, which lie where the data vary). For each of object, background, size and place, by the judge:

    changed   share of pictures, of both signs, where the judge sees another one than in the unedited picture
    moved     total variation between what the judge sees under plus and under minus, over the pictures: 0 where both signs do the same, as
              noise would; chance alone makes it larger than 0 with few pictures, for the controls as well

and `apart`, the RMS difference from the unedited picture (0 to 255). Intervals are 95 % of a bootstrap over the pictures, which all
directions of a row share. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.methods.calibration import calibrate_call
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import FIELDS, load_bundled
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_hspace_directions import HSpaceDirections
from diffgraft_hspace_directions.calibration import directions_of
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image, ImageDraw
from rich.console import Console

BATCH = 16
KINDS = ("pca", "random", "mixture")
Rows = np.ndarray


def seeds(first: int, number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(number)]


class Model:
    """A pipeline, with captions or without."""

    def __init__(self, name: str, steps: int) -> None:
        self.steps = steps
        pipe: Any = unload(load_pipeline(name, plugins=[]))
        self.captions = hasattr(pipe, "text_encoder")
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        if self.captions:
            pipe.scheduler = scheduler
        self.pipe = pipe if self.captions else DDIMPipeline(pipe.unet, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        training, _ = scenes.split()
        chosen = np.random.default_rng(3).integers(0, len(training), 4096)
        self.training = [scenes.caption(training[int(i)]) for i in chosen]
        self.held = [scenes.caption(each) for each in held_out_labels()]

    def draw(self, captions: Sequence[str], first: int, number: int) -> list[Image.Image]:
        made: list[Image.Image] = []
        for at in range(0, number, BATCH):
            n = min(BATCH, number - at)
            given: dict[str, Any] = {"prompt": list(captions[at : at + n])} if self.captions else {"batch_size": n}
            made += self.pipe(**given, num_inference_steps=self.steps, generator=seeds(first + at, n)).images
        return made

    def calibrate(self, samples: int, components: int) -> Any:
        given: dict[str, Any] = {"prompt": self.training[:samples]} if self.captions else {"batch_size": samples}

        def call() -> None:
            self.pipe(**given, num_inference_steps=self.steps, generator=seeds(10**6, samples))

        return calibrate_call(self.pipe, HSpaceDirections(components=components), call)


def seen(judge: Any, images: Sequence[Image.Image]) -> Rows:
    """Class numbers [fields, n]."""
    found = judge.predict(images)
    return np.array([[judge.config.classes[name].index(each[name]) for each in found] for name in FIELDS])


def variation(plus: Rows, minus: Rows, classes: int) -> Rows:
    """Total variation between two lots of classes [..., n]."""
    a, b = (np.stack([(x == k).mean(-1) for k in range(classes)], -1) for x in (plus, minus))
    return np.abs(a - b).sum(-1) / 2


def interval(values: Rows) -> tuple[float, float, float]:
    """The first of the draws, which is the sample itself, and 95 % of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)


def statistics(judge: Any, plain: Rows, plus: Rows, minus: Rows, draws: Rows) -> dict[str, Rows]:
    """name -> [draws], of one kind: ``plain`` [fields, n], ``plus`` and ``minus`` [directions, fields, n]."""
    found = {}
    for f, name in enumerate(FIELDS):
        a, b, x = plus[:, f][:, draws], minus[:, f][:, draws], plain[f][draws]
        found[f"changed {name}"] = ((a != x).mean((0, 2)) + (b != x).mean((0, 2))) / 2
        found[f"moved {name}"] = variation(a, b, len(judge.config.classes[name])).mean(0)
    return found


def sheet(shown: dict[str, list[Image.Image]], path: Path) -> None:
    side, left, columns = 64, 150, 12
    page = Image.new("RGB", (left + columns * side, len(shown) * side), "white")
    pen = ImageDraw.Draw(page)
    for y, (key, images) in enumerate(shown.items()):
        pen.multiline_text((4, y * side + 16), key, fill="black", font_size=12)
        for x, image in enumerate(images[:columns]):
            page.paste(image.resize((side - 2, side - 2), Image.Resampling.LANCZOS), (left + x * side, y * side))
    page.quantize(128).save(path, optimize=True)


def main(
    pipeline: Annotated[str, typer.Option(help="emoji-sd, emoji-pixel, or the folder of another such model")] = "emoji-sd",
    pictures: Annotated[int, typer.Option(min=2)] = 12,
    directions: Annotated[int, typer.Option(min=1)] = 5,
    samples: Annotated[int, typer.Option(min=3, help="pictures for the components")] = 64,
    steps: Annotated[int, typer.Option(min=2)] = 20,
    strengths: Annotated[str, typer.Option(help="standard deviations")] = "50,200",
    mode: Annotated[str, typer.Option()] = "asyrp",
    out: Annotated[Path, typer.Option()] = Path("directions"),
) -> None:
    console = Console(markup=False, highlight=False, width=160)
    torch.set_num_threads(1)
    model, judge = Model(pipeline, steps), load_bundled()
    artefact = model.calibrate(samples, directions)
    share = artefact.tensors["share"].mean(1)
    console.print(f"{pipeline}, {samples} samples: share of the variance {', '.join(f'{float(x):.3f}' for x in share)}")
    plain_pictures = model.draw(model.held, 0, pictures)
    plain = seen(judge, plain_pictures)
    base = np.stack([np.asarray(each.convert("RGB"), dtype=float) for each in plain_pictures])
    rng = np.random.default_rng(0)
    draws = np.concatenate([np.arange(pictures)[None], rng.integers(0, pictures, (2000, pictures))])
    shown = {"plain": plain_pictures}
    facts: dict[str, Any] = {"pipeline": pipeline, "pictures": pictures, "directions": directions, "samples": samples, "steps": steps,
                             "mode": mode, "share": share.tolist(), "python": platform.python_version(), "torch": torch.__version__,
                             "diffusers": diffusers.__version__, "rows": []}  # fmt: skip
    units = torch.stack([directions_of(artefact.tensors, k)[0] for k in range(directions)])
    sizes = torch.stack([directions_of(artefact.tensors, k)[1] for k in range(directions)])
    for strength in [float(x) for x in strengths.split(",")]:
        kinds: dict[str, dict[str, Rows]] = {}
        for kind in KINDS:
            classes: dict[int, list[Rows]] = {1: [], -1: []}
            distances = []
            for k in range(directions):
                knobs: dict[str, Any] = {"source": kind, "component": k, "artefact": artefact, "seed": k}
                if kind == "mixture":
                    weights = torch.randn(directions, generator=torch.Generator().manual_seed(k))
                    mixed = torch.einsum("k,k...->...", weights, units)
                    n = mixed / mixed.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) * sizes[k].view(-1, 1, 1, 1, 1)
                    knobs = {"source": "given", "direction": n}
                for sign in (1, -1):
                    load_pipeline(model.pipe, plugins=[HSpaceDirections(strength=sign * strength, mode=mode, **knobs)])
                    made = model.draw(model.held, 0, pictures)
                    unload(model.pipe)
                    classes[sign].append(seen(judge, made))
                    apart = np.stack([np.asarray(each.convert("RGB"), dtype=float) for each in made]) - base
                    distances.append(np.sqrt((apart**2).mean((1, 2, 3))))
                    if k < 2:
                        shown[f"{kind} {k}\n{sign * strength:+g}"] = made
            kinds[kind] = statistics(judge, plain, np.stack(classes[1]), np.stack(classes[-1]), draws)
            kinds[kind]["apart"] = np.stack(distances)[:, draws].mean((0, 2))
            each = [[variation(p[f], m[f], len(judge.config.classes[name])).item() for f, name in enumerate(FIELDS)]
                    for p, m in zip(classes[1], classes[-1], strict=True)]  # fmt: skip
            row = {"strength": strength, "kind": kind, **{key: interval(x) for key, x in kinds[kind].items()}, "moved by each": each}
            row |= {f"pca less {kind}: {key}": interval(kinds["pca"][key] - x) for key, x in kinds[kind].items() if kind != "pca"}
            facts["rows"].append(row)
            console.print(f"strength {strength:g}, {kind}")
            for key, value in row.items():
                if isinstance(value, tuple):
                    console.print("    {}: {:.3f} ({:.3f} to {:.3f})".format(key, *value))
            out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    sheet(shown, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
