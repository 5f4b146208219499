"""Few steps on emoji-wan: a fitted LoRA on its levels, against the same levels without it, plain runs, and the teacher's 50 steps.

    python plugins/accvideo/benchmarks/few_steps.py                                     # without a LoRA: what it has to beat, 2 minutes
    python plugins/accvideo/benchmarks/few_steps.py --lora 4=FILE --lora 5=FILE --out few

Case i is the i-th held-out caption (the checkpoint's own order) from seed i. The teacher has the checkpoint's own guidance, as have the
runs called ``guided``, which cost two forwards a step; all others have none.

    judge      shares of clips whose object, background, size and motion are as the caption says (first ``--judged`` cases), Wilson's 95 %
    end        RMS distance of the final latents to the teacher's from the same noise
    frechet    of the latents' means over 2 x 2 fields of each frame, to the teacher's clips of the same captions from other noise;
               the first row is the teacher's own from these noises: what is left where nothing is wrong
    diversity  RMS distance of latents between four noises of one caption, eight captions

Means and ``frechet`` have a 95 % interval of a bootstrap over cases (captions). Writes OUT.json and OUT.png;
rows that are in OUT.json already are not measured again.
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
from diffgraft_accvideo import AccVideo
from diffgraft_checkpoints.emoji import motion, motion_judge
from diffgraft_checkpoints.train.wan_measure import held_out_labels
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

BATCH = 16
JUDGED = ("object", "background", "size", "motion")
SEEDS, CAPTIONS = 4, 8
"""Of the diversity."""
COLUMNS = 6
"""Clips of each run in the picture."""


class Model:
    """emoji-wan, and what is asked of it."""

    def __init__(self) -> None:
        self.pipe = load_pipeline("emoji-wan", plugins=[])
        self.pipe.set_progress_bar_config(disable=True)
        self.family = find_family(type(self.pipe))
        self.judge = motion_judge.load_bundled()

    def make(self, texts: list[str], seeds: list[int], knobs: dict[str, Any] | None, **call: Any) -> tuple[Tensor, int]:
        """(latents, forwards of the denoiser for each clip)."""
        self.pipe.plugins.clear()
        load_pipeline(self.pipe, plugins=[AccVideo(**({"steps": 0} if knobs is None else knobs))])
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


def interval_of_frechet(x: Tensor, other: Tensor, draws: int = 100) -> tuple[float, float, float]:
    """Basic bootstrap over cases: the resamples' own bias goes out."""
    rng, found = np.random.default_rng(0), frechet(x, other)
    again = [frechet(x[torch.from_numpy(rng.integers(0, len(x), len(x)))], other) for _ in range(draws)]
    shift = float(np.mean(again)) - found
    low, high = np.percentile(np.array(again) - shift, [2.5, 97.5])
    return found, float(low), float(high)


def spread(x: Tensor) -> list[float]:
    """Of each caption: mean RMS distance between its seeds."""
    return [float(np.mean([float((a - b).square().mean().sqrt()) for a, b in combinations(rows, 2)])) for rows in x.split(SEEDS)]


def main(
    lora: Annotated[list[str] | None, typer.Option(help="N=FILE, for as many N as there are")] = None,
    steps: Annotated[str, typer.Option(help="N of the runs")] = "4,5,10",
    cases: Annotated[int, typer.Option(min=8, max=512)] = 64,
    judged: Annotated[int, typer.Option(min=1, help="cases that are decoded and judged")] = 32,
    teacher: Annotated[Path | None, typer.Option(help="file of the teacher's latents: written, or read where it is there")] = None,
    out: Annotated[Path, typer.Option()] = Path("few-steps"),
) -> None:
    console = Console(markup=False, highlight=False, width=200)
    torch.set_num_threads(1)
    loras = {int(n): path for n, _, path in (each.partition("=") for each in lora or [])}
    model, labels = Model(), held_out_labels()
    texts = [motion.caption(each) for each in labels[:cases]]
    several = [motion.caption(each) for each in labels[:CAPTIONS] for _ in range(SEEDS)]
    fifty: dict[str, Any] = {"knobs": None, "num_inference_steps": 50}
    arms: list[tuple[str, int, dict[str, Any]]] = [("teacher", 50, fifty)]
    for n in map(int, steps.split(",")):
        preset = {"steps": n}
        arms += [
            ("plain, guided", n, {"knobs": None, "num_inference_steps": n}),
            ("plain", n, {"knobs": None, "num_inference_steps": n, "guidance_scale": 1.0}),
            ("levels, guided", n, {"knobs": {**preset, "guidance": "keep"}}),
            ("levels", n, {"knobs": preset}),
        ]
        if n in loras:
            arms.append(("AccVideo", n, {"knobs": {**preset, "lora": loras[n]}}))
    noises = {"end": (texts, 0), "other": (texts, 10_000), "many": (several, 1000)}
    if teacher is not None and teacher.exists():
        kept = load_file(teacher)
    else:
        kept = {name: model.make(said, [first + i for i in range(len(said))], **fifty)[0] for name, (said, first) in noises.items()}
        if teacher is not None:
            save_file(kept, teacher)
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[np.ndarray]] = {}
    page = out.with_suffix(".json")
    before = json.loads(page.read_text()) if page.exists() else {}
    done = before.get("rows", []) if (before.get("cases"), before.get("judged")) == (cases, judged) else []
    for name, n, arm in arms:
        what = {"run": name, "steps": n, "lora": (arm["knobs"] or {}).get("lora")}
        row = next((each for each in done if each.items() >= what.items()), None)
        few = COLUMNS if row else cases
        if name == "teacher":
            made, forwards = kept["end"][:few], 100
        else:
            made, forwards = model.make(texts[:few], list(range(few)), **arm)
        clips = model.clips(made[: COLUMNS if row else judged])
        if row is None:
            many = kept["many"] if name == "teacher" else model.make(several, [1000 + i for i in range(len(several))], **arm)[0]
            row = {**what, "forwards": forwards}
            row["end"] = tell(Mean.of((made - kept["end"]).square().flatten(1).mean(1).sqrt().tolist()))
            row["frechet"] = interval_of_frechet(fields(made), fields(kept["other"]))
            row["diversity"] = tell(Mean.of(spread(many)))
            verdicts = model.judge.score(clips, texts[:judged])
            verdicts["all"] = [all(each) for each in zip(*(verdicts[key] for key in JUDGED), strict=True)]
            for key in (*JUDGED, "all"):
                found = share([bool(v) for v in verdicts[key]])
                row[key] = (found.share, found.low, found.high)
        shown[f"{name}\n{n} steps\n{forwards} forwards"] = clips
        rows.append(row)
        told = ("{} {:.3f} ({:.3f} to {:.3f})".format(key, *value) for key, value in row.items() if isinstance(value, (tuple, list)))
        console.print(f"{name}, {n} steps, {forwards} forwards | " + ", ".join(told))
        facts = {"cases": cases, "judged": judged, "python": platform.python_version(), "torch": torch.__version__,
                 "diffusers": diffusers.__version__, "rows": rows}  # fmt: skip
        page.write_text(json.dumps({**facts, "rows": rows + [each for each in done if each not in rows]}, indent=1))
    sheet(shown, out.with_suffix(".png"))


def tell(found: Mean) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


def sheet(shown: dict[str, list[np.ndarray]], path: Path) -> None:
    """The first clips of each run: first, middle and last frame."""
    side, left = 56, 110
    page = Image.new("RGB", (left + COLUMNS * (3 * side + 4), len(shown) * (side + 2)), "white")
    pen = ImageDraw.Draw(page)
    for y, (key, clips) in enumerate(shown.items()):
        pen.multiline_text((4, y * (side + 2) + 4), key, fill="black", font_size=11)
        for x, clip in enumerate(clips[:COLUMNS]):
            for k, i in enumerate((0, len(clip) // 2, -1)):
                frame = Image.fromarray(clip[i]).resize((side - 1, side - 1), Image.Resampling.LANCZOS)
                page.paste(frame, (left + x * (3 * side + 4) + k * side, y * (side + 2)))
    page.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
