"""What comes of a leap on emoji-wan, against its level and the number of steps, beside plain runs of as many denoiser forwards.

    python plugins/videoscene_leap/benchmarks/leap.py --out leap

Each case is a held-out caption of a moving object and a true render of it. Its drafts:

    static   the render's middle frame, nine times: right object, background and size, no motion
    turned   the render backwards: the opposite motion
    coarse   the render at an eighth of its resolution and back: right motion, poor pictures (what a fast renderer is like)

Case i runs from seed i in all arms, with the checkpoint's own guidance (two forwards a step) and UniPC, Wan's usual scheduler (the
checkpoint's Euler spends its last step at the lowest level, so that two steps give what one gives: ``--scheduler own``).
``motion`` and ``object`` are the verdicts of the judge of clips, against the caption; ``draft`` and ``truth`` are RMS distances in pixels
(0 to 1) to the draft and to the true render. Differences are to the plain run with as many steps, over pairs. Shares have Wilson's 95 %
interval, means one of a bootstrap over cases. emoji-wan is not distilled for few steps, as the authors' model is, and no LoRA for that is
bundled.

Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import find_family, load_pipeline
from diffgraft.lab.metrics import Mean, share
from diffgraft.methods.decoding import decode, to_latents
from diffgraft_checkpoints.emoji import motion, motion_judge
from diffgraft_videoscene_leap import VideosceneLeap
from diffusers import UniPCMultistepScheduler
from PIL import Image, ImageDraw
from rich.console import Console

KINDS = ("static", "turned", "coarse")
Clip = np.ndarray
"""[frames, height, width, 3] uint8."""


def draft_of(kind: str, true: Clip) -> Clip:
    """The draft that is made of a true render."""
    if kind == "static":
        return np.repeat(true[len(true) // 2 : len(true) // 2 + 1], len(true), 0)
    if kind == "turned":
        return np.ascontiguousarray(true[::-1])
    height, width = true.shape[1:3]
    small = [Image.fromarray(frame).resize((width // 8, height // 8), Image.Resampling.BOX) for frame in true]
    return np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BILINEAR)) for frame in small])


def cases(number: int) -> tuple[list[str], list[Clip]]:
    """(captions, true renders) of held-out combinations that move."""
    moving = [labels for labels in motion.split()[1] if labels.motion != "still"]
    chosen = [moving[int(i)] for i in np.random.default_rng(5).permutation(len(moving))[:number]]
    clips = [motion.sample_clip(labels, np.random.default_rng([17, i])) for i, labels in enumerate(chosen)]
    return [motion.caption(labels) for labels in chosen], [motion.to_array(motion.render_clip(clip)) for clip in clips]


def rms(made: list[Clip], others: list[Clip]) -> list[float]:
    return [float(np.sqrt(np.square(a / 255 - b / 255).mean())) for a, b in zip(made, others, strict=True)]


def main(
    number: Annotated[int, typer.Option(min=1, help="cases")] = 16,
    levels: Annotated[str, typer.Option()] = "0.4,0.55,0.68,0.8,0.9",
    steps: Annotated[str, typer.Option()] = "1,2,4,8",
    kinds: Annotated[str, typer.Option()] = ",".join(KINDS),
    scheduler: Annotated[str, typer.Option(help="unipc: Wan's usual one; own: the checkpoint's Euler")] = "unipc",
    out: Annotated[Path, typer.Option()] = Path("leap"),
) -> None:
    console = Console(markup=False, highlight=False, width=160)
    torch.set_num_threads(1)
    pipe = load_pipeline("emoji-wan", plugins=[])
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    family, judge = find_family(type(pipe)), motion_judge.load_bundled()
    texts, true = cases(number)
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[Clip]] = {"true render": true}

    def clips_of(latents: torch.Tensor) -> list[Clip]:
        return [motion.to_array(frames) for part in latents.split(4) for frames in decode(pipe, family, part, {})]

    def judged(name: dict[str, Any], made: list[Clip], drafts: list[Clip] | None, plain: dict[str, Any] | None) -> dict[str, Any]:
        verdicts = judge.score(made, texts)
        values: dict[str, Any] = {key: [bool(v) for v in verdicts[key]] for key in ("motion", "object", "background", "size")}
        values["all"] = [all(each) for each in zip(*values.values(), strict=True)]
        values["truth"] = rms(made, true)
        if drafts is not None:
            values["draft"] = rms(made, drafts)
        row = {**name}
        for key, each in values.items():
            found: Any = Mean.of(each) if isinstance(each[0], float) else share(each)
            row[key] = (found.mean if isinstance(found, Mean) else found.share, found.low, found.high)
            if plain is not None and key in plain:
                less = Mean.of([float(a) - float(b) for a, b in zip(each, plain[key], strict=True)])
                row[f"{key}_less_plain"] = (less.mean, less.low, less.high)
        rows.append(row)
        said = [f"{k} {v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" for k, v in row.items() if isinstance(v, tuple) and "_" not in k]
        more = [f"{v[0]:+.2f} ({v[1]:+.2f} to {v[2]:+.2f})" for k, v in row.items() if k == "motion_less_plain"]
        console.print(", ".join(f"{k} {v}" for k, v in name.items()), "|", ", ".join(said), *more)
        return values

    def run(n: int, **knobs: Any) -> tuple[list[Clip], int]:
        pipe.plugins.clear()
        load_pipeline(pipe, plugins=[VideosceneLeap(**(knobs or {"level": 1.0}))])
        seeds = [torch.Generator().manual_seed(i) for i in range(number)]
        latents = pipe(texts, num_inference_steps=n, generator=seeds, output_type="latent")[0]
        return clips_of(latents), sum(pipe.plugins.report().forwards.values())

    plain: dict[int, dict[str, Any]] = {}
    counts = [int(n) for n in steps.split(",")]
    for n in counts:
        made, forwards = run(n)
        plain[n] = judged({"draft kind": "none", "steps": n, "level": 1.0, "forwards": forwards}, made, None, None)
        shown[f"plain, {n} steps"] = made
    for kind in kinds.split(","):
        drafts = [draft_of(kind, clip) for clip in true]
        pixels = torch.from_numpy(np.stack(drafts)).movedim(-1, 1).float() / 127.5 - 1
        with torch.no_grad():
            round_trip = clips_of(torch.cat([to_latents(pipe, family, each[None]) for each in pixels]))
        judged({"draft kind": kind, "steps": 0, "level": 0.0, "forwards": 0}, round_trip, drafts, None)
        shown[f"draft: {kind}"] = drafts
        for level in map(float, levels.split(",")):
            for n in counts:
                made, forwards = run(n, draft=drafts, level=level)
                judged({"draft kind": kind, "steps": n, "level": level, "forwards": forwards}, made, drafts, plain[n])
                shown[f"{kind}, t = {level:g}, {n} steps"] = made
    facts = {"cases": number, "scheduler": scheduler, "captions": texts, "python": platform.python_version(), "torch": torch.__version__,
             "diffusers": diffusers.__version__, "rows": rows}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    sheet(shown, counts, kinds.split(","), [float(x) for x in levels.split(",")], out.with_suffix(".png"))


def sheet(shown: dict[str, list[Clip]], counts: list[int], kinds: list[str], levels: list[float], path: Path) -> None:
    """First, middle and last frames of three cases: truth, drafts, leaps and plain runs of one middle number of steps."""
    n, some = counts[min(1, len(counts) - 1)], levels[1::2] or levels
    keys = ["true render"]
    for kind in kinds:
        keys += [f"draft: {kind}", *(f"{kind}, t = {level:g}, {n} steps" for level in some)]
    keys.append(f"plain, {n} steps")
    side, left, films = 56, 150, min(4, len(shown["true render"]))
    page = Image.new("RGB", (left + films * (3 * side + 8), len(keys) * side), "white")
    pen = ImageDraw.Draw(page)
    for y, key in enumerate(keys):
        pen.text((4, y * side + side // 2 - 7), key, fill="black", font_size=12)
        for k in range(films):
            clip = shown[key][k]
            for x, i in enumerate((0, len(clip) // 2, -1)):
                frame = Image.fromarray(clip[i]).resize((side - 2, side - 2), Image.Resampling.LANCZOS)
                page.paste(frame, (left + k * (3 * side + 8) + x * side, y * side))
    page.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
