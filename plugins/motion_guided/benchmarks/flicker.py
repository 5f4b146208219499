"""Flicker against fidelity: clips whose motion is known, restored frame by frame, with the exact flow, a found one, and without.

    python plugins/motion_guided/benchmarks/flicker.py sr --out out/motion_guided          # emoji-sr: 16 x 16 pixels to 64 x 64
    python plugins/motion_guided/benchmarks/flicker.py img2img --out out/motion_guided     # emoji-sd: noisy frames, strength 0.5

A clip is one emoji that goes in a straight line over a plain background, five frames of a combination that no checkpoint was shown in
training, 3 to 7 pixels apart; the renderer knows each frame's mask and shift, so its flow is exact. Clip i runs in one call of its frames,
from the same noises in all arms. Figures of each arm, of 64 x 64 pixels in 0 to 1:

    psnr      to the true frames, in dB: fidelity
    flicker   rms of W(x_{i+1}, f_i) - x_i and of the way back, along the exact flow, where both frames see the same (255ths)
    sharp     rms of the differences of neighbouring pixels over that of the true frames: below 1 is blurred

Beside the plugin stand two ways that need none: the same noise for all frames, and the plain frames averaged with their neighbours along
a flow. Differences to the plain run are paired; means with a bootstrap's 95 % interval over clips.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.installed.errors import Unsupported
from diffgraft.lab.metrics import Mean
from diffgraft_checkpoints.emoji import motion, scenes
from diffgraft_motion_guided import MotionGuided
from diffgraft_motion_guided.flows import Flows, dis, estimated, opencv, read_clip, resized
from diffgraft_motion_guided.method import occluded, warped, warping
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

app = typer.Typer(add_completion=False)
STRENGTHS = "1,3,10,20,30"


class Clip:
    """True frames [T, 3, 64, 64] in 0 to 1, their exact flow, and where neighbours see the same."""

    def __init__(self, seed: int, index: int, frames: int) -> None:
        drawn = motion.draw_clip(seed, index, held_out=True)
        self.caption = motion.caption(drawn.labels)
        self.still = f"a {drawn.labels.size} {drawn.labels.object} on a {drawn.labels.background} background"
        self.frames = pixels(motion.render_clip(drawn, frames))
        shares = np.linspace(0, 1, frames).tolist()
        x, y = drawn.last.x - drawn.first.x, drawn.last.y - drawn.first.y
        masks = torch.stack([covered(replace(drawn.first, x=drawn.first.x + s * x, y=drawn.first.y + s * y)) for s in shares])
        shift = torch.tensor([x, y]).float().view(1, 2, 1, 1) / (frames - 1)
        self.flows = Flows(masks[:-1] * shift, -masks[1:] * shift)
        self.visible = [1 - each[:, None] for each in occluded(*self.flows, 0.01, 0.5)]

    def flicker(self, x: Tensor) -> float:
        there = (warped(x[None, 1:], warping(self.flows.forward))[0] - x[:-1]) * self.visible[0]
        back = (warped(x[None, :-1], warping(self.flows.backward))[0] - x[1:]) * self.visible[1]
        seen = 3 * (self.visible[0].sum() + self.visible[1].sum())
        return 255 * float(((there.square().sum() + back.square().sum()) / seen).sqrt())


def averaged(x: Tensor, flows: Flows) -> Tensor:
    """Each frame with its neighbours along a flow, where these see the same."""
    forward, backward = (resized(flow, *x.shape[-2:]) for flow in flows)
    seen, back = (1 - each[:, None] for each in occluded(forward, backward, 0.01, 0.5))
    total, weight = x.clone(), torch.ones_like(x[:, :1])
    total[:-1] += seen * warped(x[None, 1:], warping(forward))[0]
    total[1:] += back * warped(x[None, :-1], warping(backward))[0]
    weight[:-1] += seen
    weight[1:] += back
    return total / weight


def covered(scene: scenes.Scene) -> Tensor:
    """Where the object is, [1, 64, 64] of 0 and 1."""
    alpha = np.asarray(scenes.draw(scene).getchannel("A").reduce(2), dtype=np.float32)
    return torch.from_numpy(alpha > 127).float()[None]


def pixels(frames: list[Image.Image]) -> Tensor:
    return torch.from_numpy(motion.to_array(frames)).permute(0, 3, 1, 2).float() / 255


def pictures(x: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def psnr(x: Tensor, truth: Tensor) -> float:
    return float(-10 * torch.log10((x - truth).square().mean().clamp(min=1e-10)))


def sharp(x: Tensor, truth: Tensor) -> float:
    """Between neighbouring pixels, over that of the truth."""

    def edges(each: Tensor) -> Tensor:
        return (each.diff(dim=-1).square().mean() + each.diff(dim=-2).square().mean()).sqrt()

    return float(edges(x) / edges(truth))


def made(pipe: Any, clip: Clip, seed: int, asked: dict[str, Any], knobs: dict[str, Any] | None, same: bool = False) -> Tensor:
    """The frames that one call gives, each of a noise of its own or all of the ``same``."""
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[] if knobs is None else [MotionGuided(**knobs)])
    frames = len(clip.frames)
    draws = [torch.Generator().manual_seed(1000 * seed + (0 if same else i)) for i in range(frames)]
    return pixels(pipe(**asked, prompt=[clip.still] * frames, generator=draws).images)


def has_opencv() -> bool:
    """Whether OpenCV's flow can be found here."""
    try:
        opencv()
    except Unsupported:
        return False
    return True


def arms(clip: Clip, source: list[Image.Image], strengths: list[float], **knobs: Any) -> dict[str, dict[str, Any]]:
    """Name -> the plugin's knobs."""
    runs: dict[str, dict[str, Any]] = {}
    for g in strengths:
        runs[f"exact flow, g {g:g}"] = {"flow": tuple(clip.flows), "g": g}
        if has_opencv():
            runs[f"DIS of the given frames, g {g:g}"] = {"flow": "dis", "source": source, "g": g}
    middle = strengths[len(strengths) // 2]
    runs[f"no motion, g {middle:g}"] = {"flow": (0.0, 0.0), "g": middle}
    runs[f"official pairs, exact flow, g {middle:g}"] = {"flow": tuple(clip.flows), "g": middle, "pairs": "official"}
    runs[f"exact flow, below 0.6, g {middle:g}"] = {"flow": tuple(clip.flows), "g": middle, "below": 0.6}
    runs[f"exact flow, const, g {3 * middle:g}"] = {"flow": tuple(clip.flows), "g": 3 * middle, "scale_fn": "const"}
    return {name: {**run, **knobs} for name, run in runs.items()}


def measured(
    pipe: Any, clips: list[Clip], given: list[list[Image.Image]], strengths: list[float], out: Path, name: str, **call: Any
) -> None:
    """All arms on all clips; a table, OUT/NAME.json and OUT/NAME.png."""
    console = Console(markup=False, highlight=False, width=170)
    rows: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, Tensor] = {}

    def note(arm: str, clip: Clip, x: Tensor) -> None:
        values = {"psnr": psnr(x, clip.frames), "flicker": clip.flicker(x), "sharp": sharp(x, clip.frames)}
        for key, value in values.items():
            rows.setdefault(arm, {}).setdefault(key, []).append(value)
        if clip is clips[0]:
            shown[arm] = x

    for number, (clip, frames) in enumerate(zip(clips, given, strict=True)):
        asked = {"image": frames, **call}
        note("truth", clip, clip.frames)
        enlarged = [frame.resize((64, 64), Image.Resampling.BICUBIC) for frame in frames]
        note("given frames", clip, pixels(enlarged))
        plain = made(pipe, clip, number, asked, None)
        note("plain", clip, plain)
        note("plain, averaged along the exact flow", clip, averaged(plain, clip.flows))
        if has_opencv():
            note("plain, averaged along DIS", clip, averaged(plain, estimated(read_clip(frames), dis)))
        note("plain, same noise", clip, made(pipe, clip, number, asked, None, same=True))
        for arm, knobs in arms(clip, frames, strengths).items():
            note(arm, clip, made(pipe, clip, number, asked, knobs))
        middle = strengths[len(strengths) // 2]
        note(
            f"same noise and exact flow, g {middle:g}",
            clip,
            made(pipe, clip, number, asked, {"flow": tuple(clip.flows), "g": middle}, same=True),
        )
        console.print(f"clip {number + 1} of {len(clips)}: {clip.caption}")
    table = Table("arm", "psnr", "flicker", "sharp", "psnr less plain", "flicker less plain", title=f"{name}, {len(clips)} clips")
    told: dict[str, Any] = {}
    for arm, values in rows.items():
        means = {key: Mean.of(each) for key, each in values.items()}
        for key in ("psnr", "flicker"):
            means[f"{key}_less_plain"] = Mean.of([a - b for a, b in zip(values[key], rows["plain"][key], strict=True)])
        table.add_row(arm, *(f"{m.mean:.2f} ({m.low:.2f} to {m.high:.2f})" for m in means.values()))
        told[arm] = {key: (m.mean, m.low, m.high) for key, m in means.items()}
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    (out / f"{name}.json").write_text(json.dumps({"versions": versions, "clips": [c.caption for c in clips], "arms": told}, indent=1))
    drawn(told, strengths, shown, out / f"{name}.png", name)


def drawn(told: dict[str, Any], strengths: list[float], shown: dict[str, Tensor], path: Path, name: str) -> None:
    """Left the curve over g, right five frames of the first clip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    middle = strengths[len(strengths) // 2]
    strips = ["truth", "given frames", "plain", f"exact flow, g {middle:g}", f"exact flow, g {strengths[-1]:g}", "plain, same noise"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), gridspec_kw={"width_ratios": [1.15, 1]}, layout="constrained")
    for kind, mark in (("exact flow", "o-"), ("DIS of the given frames", "s--")):
        names = [f"{kind}, g {g:g}" for g in strengths if f"{kind}, g {g:g}" in told]
        if names:
            at = [(told[arm]["flicker"][0], told[arm]["psnr"][0]) for arm in names]
            left.plot(*zip(*at, strict=True), mark, label=kind)
            for arm, place in zip(names, at, strict=True):
                left.annotate(arm.rpartition("g ")[2], place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    others = ("plain", "plain, same noise", "plain, averaged along the exact flow", "plain, averaged along DIS", f"no motion, g {middle:g}")
    for arm, mark in zip((*others, "given frames"), "*DPhXv", strict=True):
        if arm not in told:
            continue
        left.plot(told[arm]["flicker"][0], told[arm]["psnr"][0], mark, markersize=9, label=arm)
    left.axvline(told["truth"]["flicker"][0], color="grey", linewidth=0.8, linestyle=":", label="the truth's own flicker")
    left.set(xlabel="flicker along the exact flow (255ths)", ylabel="PSNR to the truth (dB)", title=f"{name}: numbers are g")
    left.legend(fontsize=8)
    right.imshow(np.concatenate([strip(shown[arm]) for arm in strips]))
    right.set_yticks([32 + 64 * i for i in range(len(strips))], strips, fontsize=8)
    right.set_xticks([])
    figure.savefig(path, dpi=75)


def strip(x: Tensor) -> Any:
    """Five frames next to each other, [64, 320, 3]."""
    return torch.cat(list(x[:5]), -1).clamp(0, 1).permute(1, 2, 0).numpy()


def numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def clips_of(count: int, seed: int, frames: int) -> list[Clip]:
    """Clips that move."""
    chosen, index = [], 0
    while len(chosen) < count:
        if motion.draw_clip(seed, index, held_out=True).labels.motion != "still":
            chosen.append(Clip(seed, index, frames))
        index += 1
    return chosen


@app.command()
def sr(
    clips: Annotated[int, typer.Option(min=2)] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    strengths: Annotated[str, typer.Option(help="values of g")] = STRENGTHS,
    frames: Annotated[int, typer.Option(min=2)] = 5,
    seed: Annotated[int, typer.Option(help="of the clips")] = 11,
    out: Annotated[Path, typer.Option()] = Path("out/motion_guided"),
) -> None:
    """emoji-sr: four times as large, each frame by itself."""
    pipe, chosen = quiet(load_pipeline("emoji-sr")), clips_of(clips, seed, frames)
    given = [[frame.reduce(4) for frame in pictures(clip.frames)] for clip in chosen]
    measured(pipe, chosen, given, numbers(strengths), out, "emoji-sr", num_inference_steps=steps)


@app.command()
def img2img(
    clips: Annotated[int, typer.Option(min=2)] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    strength: Annotated[float, typer.Option(min=0.05, max=1)] = 0.5,
    noise: Annotated[float, typer.Option(min=0, help="deviation of the noise on the frames, of pixels in 0 to 1")] = 0.1,
    strengths: Annotated[str, typer.Option(help="values of g")] = STRENGTHS,
    frames: Annotated[int, typer.Option(min=2)] = 5,
    seed: Annotated[int, typer.Option(help="of the clips")] = 11,
    out: Annotated[Path, typer.Option()] = Path("out/motion_guided"),
) -> None:
    """emoji-sd: image to image of noisy frames, each frame by itself."""
    pipe, chosen = quiet(load_pipeline("emoji-sd")), clips_of(clips, seed, frames)
    pipe = quiet(load_pipeline(StableDiffusionImg2ImgPipeline.from_pipe(pipe)))
    draws = torch.Generator().manual_seed(seed)
    given = [pictures(clip.frames + noise * torch.randn(clip.frames.shape, generator=draws)) for clip in chosen]
    settings = {"strength": strength, "guidance_scale": 2.0, "num_inference_steps": steps}
    measured(pipe, chosen, given, numbers(strengths), out, "emoji-sd", **settings)


def quiet(pipe: Any) -> Any:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    app()
