"""Where late runs begin, and what comes of it: emoji-sd (variance preserving) and emoji-wan (flow, video), 4 to 10 steps.

    python plugins/cil_start/benchmarks/start.py --out late

**Mismatch.** KL(q_M || start) in nats, q_M the Gaussian fit of held-out true renders noised to the run's first level, of the means of 2 x 2
fields (the lowest frequencies) and of all latents, for four starts:

    plain      the pipeline's own noise N(0, I)
    unit       Analytic-Init without an artefact: N(0, (s^2 + a^2) I)
    analytic   Analytic-Init, mean and variance from renders of training captions
    fit        the whole Gaussian (its full covariance) of these training renders, where there are more of them than numbers: what is left
               is the fits' own error

and, in closed form, what a run makes of it: DDIM with the exact denoiser of the fields' Gaussian, KL(result || data).

**Pictures.** Held-out captions, prompt i from seed i in all arms; the judge's verdict on all that the caption asks for, Frechet distance of
the means of 2 x 2 fields of the latents to true renders; of clips also the way that the object goes, in pixels, where it moves. The arm
`true` begins with a true render of the caption, noised: all that any start can bring. Intervals are 95 % of a bootstrap over captions;
differences to `plain, M = 1` are over pairs. Forwards are the report's. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.judging import all_right, load_judge
from diffgraft.methods.decoding import decode, to_latents
from diffgraft.methods.late import kind_of, late_levels, shorter
from diffgraft_checkpoints.emoji import motion, motion_judge, scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_cil_start import CilStart, measured_on
from diffgraft_cil_start.method import UNIT, Moments, optimum
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from torch import Tensor

SHARES = (1.0, 0.94, 0.9, 0.86, 0.82)
BATCH = 16
LEAST = 1e-6
"""Below this signal level there are no data in a start."""
Rows = np.ndarray
Triple = tuple[float, float, float]


def interval(values: Rows, draws: int = 10000) -> Triple:
    """A mean over the captions with its 95 % bootstrap interval."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def recentred(value: float, draws: Sequence[float]) -> Triple:
    """A value with the interval of its resamples, about the value itself: a fit to a resample is worse by itself."""
    low, high = np.quantile(np.asarray(draws) - np.mean(draws) + value, (0.025, 0.975))
    return value, float(low), float(high)


# true renders -------------------------------------------------------------------------------------------------------------------------


class Pictures:
    """emoji-sd: captions, true renders, and what the judge says."""

    name = "emoji-sd"

    def __init__(self) -> None:
        self.training, _ = scenes.split()
        self.held = held_out_labels()

    def caption(self, labels: Any) -> str:
        return scenes.caption(labels)

    def render(self, labels: Any, number: int) -> Rows:
        image = scenes.render(scenes.upright(scenes.sample_scene(labels, np.random.default_rng([11, number]))))
        return np.asarray(image).transpose(2, 0, 1)

    def moving(self, labels: Any) -> bool:
        return False


class Clips(Pictures):
    """emoji-wan."""

    name = "emoji-wan"

    def __init__(self) -> None:
        self.training, self.held = motion.split()

    def caption(self, labels: Any) -> str:
        return motion.caption(labels)

    def render(self, labels: Any, number: int) -> Rows:
        frames = motion.render_clip(motion.sample_clip(labels, np.random.default_rng([11, number])))
        return np.stack([np.asarray(frame) for frame in frames]).transpose(3, 0, 1, 2)

    def moving(self, labels: Any) -> bool:
        return bool(labels.motion != "still")


@torch.no_grad()
def encoded(pipe: Any, data: Pictures, labels: Sequence[Any], first: int) -> Tensor:
    """Clean latents [n, ...] of one true render of each caption."""
    family, parts = registry.find_family(type(pipe)), []
    for i in track(range(0, len(labels), BATCH), f"{data.name}: renders", transient=True):
        pixels = np.stack([data.render(each, first + i + k) for k, each in enumerate(labels[i : i + BATCH])])
        parts.append(to_latents(pipe, family, torch.from_numpy(pixels).float() / 127.5 - 1).float())
    return torch.cat(parts)


def drawn(labels: Sequence[Any], number: int, seed: int) -> list[Any]:
    chosen = np.random.default_rng(seed).integers(0, len(labels), number)
    return [labels[int(i)] for i in chosen]


# mismatch of the start ----------------------------------------------------------------------------------------------------------------


def fields(x: Tensor) -> Rows:
    """Latents [n, ..., height, width] along the directions of the means of 2 x 2 fields [n, others * 4]; unit noise is unit noise there."""
    side = (x.shape[-1] // 2) * (x.shape[-2] // 2)
    x = torch.nn.functional.adaptive_avg_pool2d(x.flatten(1, -3).float(), 2) * side**0.5
    return x.flatten(1).double().numpy()  # type: ignore[no-any-return]


def flat(x: Tensor) -> Rows:
    return x.flatten(1).double().numpy()  # type: ignore[no-any-return]


def levels_of_run(pipe: Any, steps: int, share: float) -> list[tuple[float, float]]:
    """(a, s) at each of a run's levels, and at its end."""
    family, scheduler = registry.find_family(type(pipe)), pipe.scheduler
    kind = kind_of("cil_start", family, scheduler)
    if kind == "flow":
        scheduler.set_timesteps(steps)
        return [(1 - s, s) for s in late_levels(scheduler.sigmas, share).tolist()]
    twin = shorter(scheduler, kind, share)
    twin.set_timesteps(steps)
    abar = scheduler.alphas_cumprod[twin.timesteps.long()].tolist()
    return [(a**0.5, (1 - a) ** 0.5) for a in abar] + [(1.0, 0.0)]


class Gaussian:
    """A fit to rows [n, d]: mean and the eigenvalues of the covariance, of which n - 1 at most are not zero."""

    def __init__(self, rows: Rows) -> None:
        self.mean, centred = rows.mean(0), rows - rows.mean(0)
        n, self.d = rows.shape
        gram = centred @ centred.T / n if n < self.d else centred.T @ centred / n
        self.values = np.linalg.eigvalsh(gram).clip(min=0)
        self.trace = float(self.values.sum())

    def divergence(self, a: float, s: float, m: Rows | float, v: float) -> float:
        """KL(N(a mean, a^2 Cov + s^2 I) || N(m, v I))."""
        logdet = np.log(a * a * self.values + s * s).sum() + (self.d - len(self.values)) * np.log(s * s)
        square = ((a * self.mean - m) ** 2).sum()
        return float(((a * a * self.trace + self.d * s * s + square) / v - self.d + self.d * np.log(v) - logdet) / 2)


def whole_divergence(rows: Rows, other: Rows, a: float, s: float) -> float:
    """KL of two such fits with their full covariances."""
    d = rows.shape[1]

    def cov(x: Rows) -> Rows:
        return a * a * np.cov(x.T, bias=True) + s * s * np.eye(d)

    P, Q, gap = cov(rows), cov(other), a * (rows.mean(0) - other.mean(0))
    solved = np.linalg.solve(Q, np.concatenate([P, gap[:, None]], 1))
    return float((np.trace(solved[:, :d]) + gap @ solved[:, d] - d + np.linalg.slogdet(Q)[1] - np.linalg.slogdet(P)[1]) / 2)


def starts(mean: Rows, trace: float, a: float, s: float) -> dict[str, tuple[Any, float]]:
    """name -> (m, v)."""
    levels = torch.tensor(a, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    (m, v), (_, u) = (optimum(x, *levels) for x in (Moments(torch.from_numpy(mean), torch.tensor(trace, dtype=torch.float64)), UNIT))
    return {"plain": (0.0, 1.0), "unit": (0.0, float(u)), "analytic": (m.numpy(), float(v))}


def result(data: Gaussian, axes: Rows, levels: Sequence[tuple[float, float]], m: Any, v: float) -> float:
    """KL(result || data) of DDIM with the exact denoiser of ``data``, from N(m, v I): along each axis of the covariance a run multiplies
    the deviation from the mean by a number of its own."""
    lam, factor = data.values, np.ones(data.d)
    for (a, s), (b, r) in pairwise(levels):
        k = a * lam / (a * a * lam + s * s)
        factor *= b * k + r * (1 - a * k) / s
    gap = (m - levels[0][0] * data.mean) @ axes * factor
    ratio = factor**2 * v / lam
    return float((ratio + gap**2 / lam - 1 - np.log(ratio)).sum() / 2)


def mismatch(
    pipe: Any, name: str, mean: Rows, trace: float, true: Rows, training: Rows, counts: Sequence[int], draws: int, say: Any
) -> list[dict[str, Any]]:
    """KL between where runs begin and true renders at that level; ``mean`` [d], ``true`` and ``training`` [n, d]."""
    found: list[dict[str, Any]] = []
    rng, fit, d = np.random.default_rng(0), Gaussian(true), true.shape[1]
    resamples = [Gaussian(true[rng.integers(0, len(true), len(true))]) for _ in range(draws)]
    axes = np.linalg.eigh(np.cov(true.T, bias=True))[1] if d < len(true) / 4 else None
    for n in counts:
        for share in SHARES:
            levels = levels_of_run(pipe, n, share)
            a, s = levels[0]
            same = {"of": name, "steps": n, "M": share, "a": a, "s": s}
            for start, (m, v) in starts(mean, trace, a, s).items():
                draw = [each.divergence(a, s, m, v) for each in resamples]
                row = {**same, "start": start, "kl": recentred(fit.divergence(a, s, m, v), draw)}
                found.append(row if axes is None else {**row, "result": result(fit, axes, levels, m, v)})
            if d < len(training):
                left = whole_divergence(true, training, a, s) if a > LEAST else 0.0
                found.append({**same, "start": "fit", "kl": (left, left, left)})
            told = (f"{row['start']} {row['kl'][0]:.3f} ({row['kl'][1]:.3f} to {row['kl'][2]:.3f})"
                    + (f" -> {row['result']:.2f}" if "result" in row else "") for row in found if row.items() >= same.items())  # fmt: skip
            say(f"{name} ({d}), {n} steps, M = {share}, a = {a:.4f}: " + ", ".join(told))
    return found


# pictures -----------------------------------------------------------------------------------------------------------------------------


def frechet(x: Rows, y: Rows) -> float:
    """|m - n|^2 + tr(S + R - 2 (S R)^1/2)."""
    S, R = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(S @ R).real.clip(min=0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(S) + np.trace(R) - 2 * root)


def way(frames: Sequence[Image.Image]) -> float:
    """Pixels between the object's middles in the first and the last frame; 0 where it is not seen."""
    first, last = (motion_judge.center_of(np.asarray(frames[i].convert("RGB"))) for i in (0, -1))
    return 0.0 if first is None or last is None else float(np.linalg.norm(last - first))


def generate(pipe: Any, texts: Sequence[str], steps: int, what: str, start: Tensor | None) -> tuple[Tensor, int]:
    """(latents, forwards of the denoiser for each batch)."""
    parts, forwards = [], 0
    for first in track(range(0, len(texts), BATCH), what, transient=True):
        batch = list(texts[first : first + BATCH])
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
        begun = {} if start is None else {"latents": start[first : first + BATCH]}
        parts.append(pipe(batch, num_inference_steps=steps, generator=seeds, output_type="latent", **begun)[0])
        forwards = sum(pipe.plugins.report().forwards.values())
    return torch.cat(parts), forwards


def pictures(
    pipe: Any, data: Pictures, artefact: Any, labels: Sequence[Any], true: Tensor, arms: Sequence[tuple[str, float]], counts: Sequence[int],
    console: Console, shown: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """What the arms make of held-out captions."""
    judge, family = load_judge(registry.bundled()[data.name]), registry.find_family(type(pipe))
    texts, moving = [data.caption(each) for each in labels], np.array([data.moving(each) for each in labels])
    own = encoded(pipe, data, labels, 10**6)
    found: list[dict[str, Any]] = []
    for n in counts:
        plain: dict[str, Rows] = {}
        for name, share in arms:
            a, s = levels_of_run(pipe, n, share)[0]
            noise = torch.stack([torch.randn(own.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(len(own))])
            start = a * own + s * noise if name == "true" else None
            knobs = {"init": "analytic", "artefact": artefact} if name == "analytic" else {"init": "plain"}
            load_pipeline(pipe, plugins=[CilStart(start=share, **knobs)])
            x0, forwards = generate(pipe, texts, n, f"{data.name}: {name}, M = {share}, {n} steps", start)
            unload(pipe)
            made: list[Any] = []
            for part in x0.split(BATCH):
                made += decode(pipe, family, part, {})
            measures = {"right": np.array(all_right(judge.score(made, texts)), dtype=float)}  # type: ignore[union-attr]
            if moving.any():
                measures["way"] = np.array([way(frames) for frames in made])[moving]
            plain = plain or measures
            here, there, rng = fields(x0), fields(true), np.random.default_rng(0)
            resamples = [frechet(here[rng.integers(0, len(here), len(here))], there) for _ in range(200)]
            row: dict[str, Any] = {"pipeline": data.name, "steps": n, "start": name, "M": share, "forwards": forwards}
            row["frechet"] = recentred(frechet(here, there), resamples)
            row |= {key: interval(value) for key, value in measures.items()}
            row |= {f"{key}_less_plain": interval(value - plain[key]) for key, value in measures.items()}
            found.append(row)
            shown[f"{data.name}\n{name}\nM = {share}\n{n} steps"] = made
            measured = ("frechet", *(key for key in ("right", "right_less_plain", "way", "way_less_plain") if key in row))
            console.print(f"{data.name}, {n} steps, {name}, M = {share}, {forwards} forwards: "
                          + ", ".join("{} {:.2f} ({:.2f} to {:.2f})".format(key, *row[key]) for key in measured))  # fmt: skip
    return found


def main(
    captions: Annotated[int, typer.Option(min=0, help="pictures of each arm; 0: the mismatch alone")] = 64,
    clips: Annotated[int, typer.Option(min=0, help="the same of clips")] = 0,
    renders: Annotated[int, typer.Option(min=64, help="true pictures for the moments, and as many for the check")] = 1024,
    films: Annotated[int, typer.Option(min=32, help="true clips, likewise")] = 320,
    steps: Annotated[str, typer.Option()] = "4,6,10",
    only: Annotated[str, typer.Option(help="emoji-sd or emoji-wan alone")] = "",
    out: Annotated[Path, typer.Option()] = Path("late"),
) -> None:
    console = Console(markup=False, highlight=False, width=160)
    torch.set_num_threads(1)
    counts = [int(n) for n in steps.split(",")]
    facts: dict[str, Any] = {"captions": captions, "clips": clips, "renders": renders, "films": films, "python": platform.python_version(),
                             "torch": torch.__version__, "diffusers": diffusers.__version__, "mismatch": [], "pictures": []}  # fmt: skip
    shown: dict[str, Any] = {}
    whole = [("plain", 1.0), ("plain", 0.94), ("analytic", 0.94), ("plain", 0.82), ("analytic", 0.82), ("true", 0.82)]
    for data, number, total in ((Pictures(), captions, renders), (Clips(), clips, films)):
        if only not in ("", data.name):
            continue
        pipe = unload(load_pipeline(data.name, plugins=[]))
        pipe.set_progress_bar_config(disable=True)
        training = encoded(pipe, data, drawn(data.training, total, 1), 0)
        held = encoded(pipe, data, drawn(data.held, total, 2), 10**5)
        artefact = measured_on(pipe, training)
        console.print(f"{data.name}: |E[x_0]|^2 / d = {float(artefact.tensors['mean'].square().mean()):.4f}, "
                      f"tr Cov / d = {float(artefact.tensors['trace']):.4f}, d = {held[0].numel()}")  # fmt: skip
        mean, trace = artefact.tensors["mean"].double(), float(artefact.tensors["trace"])
        for name, rows, draws in (("fields", fields, 300), ("all", flat, 40)):
            seen = mismatch(
                pipe, f"{data.name} {name}", rows(mean[None])[0], trace, rows(held), rows(training), counts, draws, console.print
            )
            facts["mismatch"] += seen
        if number:
            labels = data.held[:number]
            facts["pictures"] += pictures(pipe, data, artefact, labels, held, whole, [n for n in counts if n != 6], console, shown)
        out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    if shown:
        sheet(shown, counts[0], out.with_suffix(".png"))


def sheet(shown: dict[str, Any], steps: int, path: Path) -> None:
    """The first pictures of the shortest run of each arm; of clips the first, middle and last frame."""
    keys = [key for key in shown if key.endswith(f"\n{steps} steps")]
    side, left, columns = 72, 80, 12
    page = Image.new("RGB", (left + columns * side, len(keys) * side), "white")
    pen = ImageDraw.Draw(page)
    for y, key in enumerate(keys):
        pen.multiline_text((4, y * side + 4), key, fill="black", font_size=12)
        made = shown[key]
        cells = made[:columns] if isinstance(made[0], Image.Image) else [film[i] for film in made[:4] for i in (0, len(film) // 2, -1)]
        for x, image in enumerate(cells):
            page.paste(image.resize((side - 2, side - 2), Image.Resampling.LANCZOS), (left + x * side, y * side))
    page.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
