"""One, two and four steps on emoji-wan: jumps with a fitted LoRA, the same jumps without it, plain runs, and 50 guided steps.

    python plugins/rcm/benchmarks/few_steps.py                                # what a LoRA has to beat: 3 minutes on one core
    python plugins/rcm/benchmarks/few_steps.py --lora FILE --out few-steps    # and one

Case i is the i-th held-out caption (the checkpoint's own order) from seed i. ``teacher`` is the checkpoint as it is called: 50 Euler steps,
guidance 2, 100 forwards. ``plain, guided`` are fewer such steps, ``plain`` the same without guidance, ``jumps`` rCM's scheduler.

    all        share of clips whose object, background, size and motion are as the caption says (judge of clips), Wilson's 95 %
    end        RMS distance of the final latents to the teacher's from the same seed
    frechet    of the latents' means over 2 x 2 fields of each frame, to the teacher's clips of the same captions from other seeds; its own
               row says what is left where nothing is wrong
    diversity  RMS distance of latents between four seeds of a caption, eight captions

Means and ``frechet`` have a 95 % interval of a bootstrap over cases. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import platform
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import find_family, load_pipeline
from diffgraft.lab.metrics import Mean, share
from diffgraft.methods.decoding import decode
from diffgraft.methods.fitness import frechet
from diffgraft_checkpoints.emoji import motion, motion_judge
from diffgraft_checkpoints.train.wan_measure import held_out_labels
from diffgraft_rcm import RCM
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

BATCH, SEEDS, CAPTIONS = 16, 4, 8
FIELDS = ("object", "background", "size", "motion")
Interval = tuple[float, float, float]


class Model:
    """emoji-wan, and what is asked of it."""

    def __init__(self) -> None:
        self.pipe = load_pipeline("emoji-wan", plugins=[])
        self.pipe.set_progress_bar_config(disable=True)
        self.family, self.judge = find_family(type(self.pipe)), motion_judge.load_bundled()

    def make(self, texts: list[str], seeds: list[int], knobs: dict[str, Any], **call: Any) -> tuple[Tensor, int]:
        """(latents, denoiser forwards of a clip)."""
        self.pipe.plugins.clear()
        load_pipeline(self.pipe, plugins=[RCM(**knobs)])
        parts, forwards = [], 0
        for i in range(0, len(texts), BATCH):
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + BATCH]]
            parts.append(self.pipe(texts[i : i + BATCH], generator=noise, output_type="latent", **call)[0].float())
            forwards = sum(self.pipe.plugins.report().forwards.values())
        return torch.cat(parts), forwards

    def clips(self, latents: Tensor) -> list[np.ndarray]:
        """Frames [frames, height, width, 3] of each."""
        return [motion.to_array(frames) for part in latents.split(4) for frames in decode(self.pipe, self.family, part, {})]


def fields(x: Tensor) -> Tensor:
    """Means over 2 x 2 fields of each latent frame [n, channels * frames * 4]."""
    return torch.nn.functional.adaptive_avg_pool3d(x, (x.shape[2], 2, 2)).flatten(1).double()


def frechet_interval(x: Tensor, other: Tensor, draws: int = 50) -> Interval:
    """Bootstrap over cases, without the bias that resampling itself has."""
    rng, found = np.random.default_rng(0), frechet(x, other)
    again = np.array([frechet(x[torch.from_numpy(rng.integers(0, len(x), len(x)))], other) for _ in range(draws)])
    low, high = np.percentile(again - again.mean() + found, [2.5, 97.5])
    return found, float(low), float(high)


def spread(x: Tensor) -> list[float]:
    """Of each caption the mean RMS distance between its seeds."""
    return [float(np.mean([float((a - b).square().mean().sqrt()) for a, b in combinations(rows, 2)])) for rows in x.split(SEEDS)]


def of(values: list[float]) -> Interval:
    found = Mean.of(values)
    return found.mean, found.low, found.high


def main(
    lora: Annotated[str | None, typer.Option(help="a file of `diffgraft fit rcm`")] = None,
    steps: Annotated[str, typer.Option()] = "1,2,4",
    cases: Annotated[int, typer.Option(min=8, max=512)] = 32,
    table: Annotated[str, typer.Option(help="times of the jumps")] = "quality",
    out: Annotated[Path, typer.Option()] = Path("few-steps"),
) -> None:
    console = Console(markup=False, highlight=False, width=220)
    torch.set_num_threads(1)
    model, labels = Model(), held_out_labels()
    texts = [motion.caption(each) for each in labels[:cases]]
    several = [motion.caption(each) for each in labels[:CAPTIONS] for _ in range(SEEDS)]
    own: dict[str, Any] = {"times": None}
    arms: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("teacher", own, {"num_inference_steps": 50})]
    for n in map(int, steps.split(",")):
        arms += [
            ("plain, guided", own, {"num_inference_steps": n}),
            ("plain", own, {"num_inference_steps": n, "guidance_scale": 1.0}),
            ("jumps, no LoRA", {"times": table}, {"num_inference_steps": n}),
        ]
        arms += [("jumps", {"times": table, "lora": lora}, {"num_inference_steps": n})] if lora else []
    other, _ = model.make(texts, [10_000 + i for i in range(cases)], own, num_inference_steps=50)
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[np.ndarray]] = {}
    end: Tensor | None = None
    for name, knobs, call in arms:
        made, forwards = model.make(texts, list(range(cases)), knobs, **call)
        end = made if end is None else end
        many, _ = model.make(several, [1000 + i for i in range(len(several))], knobs, **call)
        clips = model.clips(made)
        verdicts: dict[str, Any] = {key: value for key, value in model.judge.score(clips, texts).items() if key in FIELDS}
        verdicts["all"] = [all(each) for each in zip(*verdicts.values(), strict=True)]
        row: dict[str, Any] = {"run": name, "steps": call["num_inference_steps"], "forwards": forwards}
        for key in (*FIELDS, "all"):
            found = share([bool(v) for v in verdicts[key]])
            row[key] = (found.share, found.low, found.high)
        row["end"] = of((made - end).square().flatten(1).mean(1).sqrt().tolist())
        row["frechet"] = frechet_interval(fields(made), fields(other))
        row["diversity"] = of(spread(many))
        rows.append(row)
        shown[f"{name}\n{row['steps']} steps\n{forwards} forwards"] = clips
        told = [f"{key} {value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})" for key, value in row.items() if isinstance(value, tuple)]
        console.print(f"{name}, {row['steps']} steps, {forwards} forwards | {', '.join(told)}")
    facts = {"cases": cases, "lora": lora, "table": table, "python": platform.python_version(), "torch": torch.__version__,
             "diffusers": diffusers.__version__, "rows": rows}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    sheet(shown, out.with_suffix(".png"))


def sheet(shown: dict[str, list[np.ndarray]], path: Path, columns: int = 6) -> None:
    """The first clips of each run: first, middle and last frame."""
    side, left = 56, 130
    columns = min(columns, min(map(len, shown.values())))
    page = Image.new("RGB", (left + columns * (3 * side + 8), len(shown) * (side + 4)), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, clips) in enumerate(shown.items()):
        pen.text((4, y * (side + 4) + 6), name, fill="black", font_size=11)
        for k, clip in enumerate(clips[:columns]):
            for x, i in enumerate((0, len(clip) // 2, -1)):
                frame = Image.fromarray(clip[i]).resize((side - 2, side - 2), Image.Resampling.LANCZOS)
                page.paste(frame, (left + k * (3 * side + 8) + x * side, y * (side + 4)))
    page.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
