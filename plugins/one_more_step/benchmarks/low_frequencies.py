"""What One More Step mends in short runs: background colours, brightness, and the moments of where runs begin.

    python plugins/one_more_step/benchmarks/pictures.py --out pictures
    diffgraft fit one_more_step --pipeline emoji-sd --data pictures --steps 1200 --batch 32 --out oms.safetensors
    python plugins/one_more_step/benchmarks/low_frequencies.py --artefact oms.safetensors --out low

Held-out captions of emoji-sd, DDIM with `leading` timesteps, prompt i from seed i in all arms:

    plain      the pipeline as it is: begins with noise, where the training had abar_T x_0 in it
    oms        One More Step
    zero snr   diffusers' remedy: rescale_betas_zero_snr, timestep_spacing="trailing"
    trailing   the second half of it alone
    true       begins with a true picture of the same caption, noised to that level: all that a start can bring

Colour is the error of the background (the median of the outermost pixels) against the mean of true renders of its word, RGB of 0..255;
brightness the error of the mean luminance against four true renders of the caption. Intervals are 95 % of a bootstrap over the prompts,
those of a difference to `plain` over pairs. The moments are of the means of 2 x 2 fields of the latents (16 numbers): Gaussian fits of
where runs begin, against one of true pictures noised to that level. At last the pipeline is told a caption without its background, and the
network the whole caption (`prompt`): how often the background is the one asked for. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.judging import all_right, load_judge
from diffgraft.lab.metrics import share
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.decoding import to_latents
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_one_more_step import OneMoreStep
from diffgraft_one_more_step.method import clean
from diffgraft_one_more_step.network import network_of, predict
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

BATCH = 16
RENDERS = 4
"""True renders of a caption against which brightness is measured."""
LONG = 20
"""Steps from which on `trailing` and `true` are left out: what they show is in the shorter runs."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
Rows = np.ndarray


def rendered(labels: scenes.Labels, number: int) -> Image.Image:
    """A true picture."""
    return scenes.render(scenes.upright(scenes.sample_scene(labels, np.random.default_rng([7, number]))))


def background(image: Image.Image) -> Rows:
    """The median of the outermost two rings of pixels, by channel."""
    x = np.asarray(image, dtype=np.float64)
    ring = np.ones(x.shape[:2], dtype=bool)
    ring[2:-2, 2:-2] = False
    return np.median(x[ring], axis=0)


def brightness(image: Image.Image) -> float:
    return float((np.asarray(image, dtype=np.float64) @ LUMINANCE).mean())


def interval(values: Rows, draws: int = 10000) -> tuple[float, float, float]:
    """A mean over the prompts with its 95 % bootstrap interval."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


@torch.no_grad()
def encoded(pipe: Any, images: list[Image.Image]) -> Tensor:
    """Clean latents of pictures."""
    family = registry.find_family(type(pipe))
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
    return torch.cat([to_latents(pipe, family, part) for part in pixels.split(64)])


def generate(pipe: Any, texts: list[str], steps: int, scale: float, what: str, start: Tensor | None = None) -> list[Image.Image]:
    images: list[Image.Image] = []
    for first in track(range(0, len(texts), BATCH), what, transient=True):
        batch = texts[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
        begun = {} if start is None else {"latents": start[first : first + BATCH]}
        images += pipe(batch, num_inference_steps=steps, guidance_scale=scale, generator=seeds, **begun).images
    return images


def abar_of(scheduler: Any, steps: int) -> Tensor:
    """Signal at the run's first timestep."""
    scheduler.set_timesteps(steps)
    return scheduler.alphas_cumprod[int(scheduler.timesteps[0])]  # type: ignore[no-any-return]


def noised(x0: Tensor, abar: Tensor, seed: int) -> Tensor:
    noise = torch.stack([torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(seed + i)) for i in range(len(x0))])
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


# where runs begin ---------------------------------------------------------------------------------------------------------------------


def fields(x: Tensor) -> Rows:
    """The means of 2 x 2 fields of latents [n, channels * 4]."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).double().numpy()  # type: ignore[no-any-return]


def kl(p: Rows, q: Rows) -> float:
    """KL(N_p || N_q) of Gaussian fits, in nats."""
    m, S, n, R = p.mean(0), np.cov(p.T), q.mean(0), np.cov(q.T)
    inverse = np.linalg.inv(R)
    ratio = np.linalg.slogdet(R)[1] - np.linalg.slogdet(S)[1]
    return float((np.trace(inverse @ S) + (n - m) @ inverse @ (n - m) - len(m) + ratio) / 2)


def resampled(pairs: list[tuple[Rows, Rows]], draws: int = 300) -> list[tuple[float, float, float]]:
    """KL of each pair with its 95 % bootstrap interval over the captions, about the value itself."""
    rng, found = np.random.default_rng(0), []
    for p, q in pairs:
        rows = [rng.integers(0, len(p), len(p)) for _ in range(draws)]
        values = np.array([kl(p[row], q[row]) for row in rows])
        value = kl(p, q)
        values += value - values.mean()  # a fit to a resample is worse by itself
        found.append((value, *(float(x) for x in np.quantile(values, (0.025, 0.975)))))
    return found


@torch.no_grad()
def moments(pipe: Any, artefact: Artefact, steps: list[int], captions: int, console: Console) -> list[dict[str, Any]]:
    """KL between where runs begin and where the training was, over all held-out captions in turn."""
    labels = (held_out_labels() * (captions // len(held_out_labels()) + 1))[:captions]
    x0 = torch.cat([encoded(pipe, [rendered(each, i) for i, each in enumerate(labels)])])
    other = torch.cat([encoded(pipe, [rendered(each, captions + i) for i, each in enumerate(labels)])])
    psi = network_of(artefact.tensors, torch.device("cpu"), torch.float32)
    told = []
    for first in range(0, captions, 128):
        texts = [scenes.caption(each) for each in labels[first : first + 128]]
        n = torch.randn(len(texts), *x0.shape[1:], generator=torch.Generator().manual_seed(first))
        told.append(clean(predict(psi, n, pipe.encode_prompt(texts, "cpu", 1, False)[0])))
    hat = torch.cat(told)
    real, said = fields(x0), fields(hat)
    explained = 1 - ((real - said) ** 2).sum() / ((real - real.mean(0)) ** 2).sum()
    best = 1 - ((real - fields(other)) ** 2).sum() / 2 / ((real - real.mean(0)) ** 2).sum()  # of E[x_0 | c]: two renders differ twice
    console.print(f"variance of the fields of held-out captions that x_0^ explains: {explained:.3f}; E[x_0 | c] would {best:.3f}")
    rows = []
    for n in steps:
        abar = abar_of(pipe.scheduler, n)
        true, again = fields(noised(x0, abar, 10**6)), fields(noised(other, abar, 2 * 10**6))
        plain, oms = fields(noised(x0, torch.tensor(0.0), 3 * 10**6)), fields(noised(hat, abar, 4 * 10**6))
        starts = {"plain": plain, "oms": oms, "true": again}
        for name, found in zip(starts, resampled([(start, true) for start in starts.values()]), strict=True):
            rows.append({"steps": n, "abar": float(abar), "start": name, "kl": found, "explained": explained, "best": best})
            console.print(f"{n} steps, abar {float(abar):.5f}, {name}: KL {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f}) nats")
    return rows


# a prompt of its own ------------------------------------------------------------------------------------------------------------------


def told(
    pipe: Any,
    labels: list[scenes.Labels],
    colours: dict[Any, Rows],
    steps: list[int],
    scale: float,
    knobs: dict[str, Any],
    say: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """How often the background is the one that only the network was told of: captions without one for the pipeline, the whole for it."""
    texts = [scenes.fill("a {size} {object} {phrase}", each) for each in labels]
    whole = tuple(scenes.caption(each) for each in labels)
    rows = []
    for n in (n for n in steps if n <= LONG):
        for name, w in (("plain", None), ("oms, w = 1", 1.0), ("oms, w = 2", 2.0)):
            images: list[Image.Image] = []
            for first in range(0, len(texts), BATCH):
                if w is not None:
                    load_pipeline(pipe, plugins=[OneMoreStep(**knobs, prompt=whole[first : first + BATCH], guidance_scale=w)])
                seeds = [torch.Generator().manual_seed(first + i) for i in range(len(texts[first : first + BATCH]))]
                images += pipe(texts[first : first + BATCH], num_inference_steps=n, guidance_scale=scale, generator=seeds).images
                unload(pipe)
            nearest = [min(colours, key=lambda word, im=image: ((background(im) - colours[word]) ** 2).sum()) for image in images]
            found = share([near == each.background for near, each in zip(nearest, labels, strict=True)])
            rows.append({"start": name, "steps": n, "right": vars(found)})
            say(f"told the background alone, {n} steps, {name}: {vars(found)}")
    return rows


# pictures -----------------------------------------------------------------------------------------------------------------------------


def main(
    artefact: Annotated[Path, typer.Option()],
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    prompts: Annotated[int, typer.Option(min=2)] = 64,
    steps: Annotated[str, typer.Option()] = "4,6,10,50",
    captions: Annotated[int, typer.Option(min=64)] = 1024,
    sibling: Annotated[bool, typer.Option(help="the artefact is of another model with the same autoencoder and text encoder")] = False,
    out: Annotated[Path, typer.Option()] = Path("low"),
) -> None:
    console = Console(markup=False, highlight=False)
    torch.set_num_threads(1)
    bundled = registry.bundled()[pipeline]
    scale = bundled.guidance_scale or 1.0
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    judge, own = load_judge(registry.bundled()["emoji-sd"]), pipe.scheduler
    counts = [int(n) for n in steps.split(",")]
    labels = held_out_labels()[:prompts]
    texts = [scenes.caption(each) for each in labels]
    truth = [[rendered(each, 10000 + RENDERS * i + k) for k in range(RENDERS)] for i, each in enumerate(labels)]
    shown = [(each.background, background(im)) for each, ims in zip(labels, truth, strict=True) for im in ims]
    wanted_colour = {word: np.mean([colour for of, colour in shown if of == word], 0) for word, _ in shown}
    wanted_light = np.array([np.mean([brightness(im) for im in ims]) for ims in truth])
    x0 = encoded(pipe, [rendered(each, 20000 + i) for i, each in enumerate(labels)])
    knobs: dict[str, Any] = {"weights": artefact} if sibling else {"artefact": artefact}
    remedies = {"zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "trailing": {"timestep_spacing": "trailing"}}
    start_moments = moments(pipe, Artefact.load(artefact, "one_more_step", "fit"), counts, captions, console)

    def colour_error(images: list[Image.Image]) -> Rows:
        errors = [background(im) - wanted_colour[each.background] for im, each in zip(images, labels, strict=True)]
        return np.sqrt((np.array(errors) ** 2).mean(1))

    def light_error(images: list[Image.Image]) -> Rows:
        return np.array([brightness(im) for im in images]) - wanted_light

    pictures: dict[tuple[str, int], list[Image.Image]] = {}
    for n in counts:
        for name in ("plain", "oms", "zero snr", *(("trailing", "true") if n <= LONG else ())):
            start = noised(x0, abar_of(own, n), 0) if name == "true" else None
            try:
                if name in remedies:
                    pipe.scheduler = DDIMScheduler.from_config(own.config, **remedies[name])
                if name == "oms":
                    load_pipeline(pipe, plugins=[OneMoreStep(**knobs)])
                pictures[name, n] = generate(pipe, texts, n, scale, f"{name}, {n} steps", start)
            finally:
                unload(pipe)
                pipe.scheduler = own
    pictures["renders", 0] = [ims[0] for ims in truth]
    said = told(pipe, labels, wanted_colour, counts, scale, knobs, console.print)
    table = Table("start", "steps", "colour", "less plain", "brightness, abs", "less plain", "brightness, signed", "judge: all right")
    rows = []
    for (name, n), images in pictures.items():
        plain = pictures.get(("plain", n), images)
        colour, light = colour_error(images), light_error(images)
        measures: dict[str, Callable[[list[Image.Image]], Rows]] = {"colour": colour_error, "light": lambda ims: np.abs(light_error(ims))}
        right = np.array(all_right(judge.score(images, texts)), dtype=float)  # type: ignore[union-attr]
        row: dict[str, Any] = {"start": name, "steps": n, "colour": interval(colour), "light": interval(np.abs(light)),
                               "signed": interval(light), "judge": interval(right)}  # fmt: skip
        row |= {f"{key}_less_plain": interval(of(images) - of(plain)) for key, of in measures.items()}
        rows.append(row)
        cells = [row[key] for key in ("colour", "colour_less_plain", "light", "light_less_plain", "signed", "judge")]
        table.add_row(name, str(n), *(f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in cells))
    console.print(table)
    facts = {"pipeline": pipeline, "prompts": prompts, "captions": captions, "guidance": scale, "python": platform.python_version(),
             "torch": torch.__version__, "diffusers": diffusers.__version__, "moments": start_moments, "told": said,
             "rows": rows}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    grid(pictures, counts[0], out.with_suffix(".png"))


def grid(pictures: dict[tuple[str, int], list[Image.Image]], steps: int, path: Path) -> None:
    """The first pictures of the shortest run of each arm, and true renders."""
    keys = [key for key in pictures if key[1] in (steps, 0)]
    side, columns, left = 80, min(10, len(pictures[keys[0]])), 90
    sheet = Image.new("RGB", (left + columns * side, len(keys) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for y, key in enumerate(keys):
        pen.multiline_text((4, y * side + 28), f"{key[0]}\n{key[1]} steps" if key[1] else key[0], fill="black", font_size=12)
        for x, image in enumerate(pictures[key][:columns]):
            sheet.paste(image.resize((side - 2, side - 2), Image.Resampling.LANCZOS), (left + x * side, y * side))
    sheet.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
