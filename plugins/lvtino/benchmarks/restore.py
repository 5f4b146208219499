"""How near LATINO and LVTINO come to renders that were measured, beside the pseudo-inverse, the pipeline alone and other plugins.

    python plugins/lvtino/benchmarks/restore.py pictures [--pictures 12]     # emoji-sd-lcm, three problems: about two minutes of a core
    python plugins/lvtino/benchmarks/restore.py clips [--clips 6]            # emoji-wan-4step, three problems: about two minutes

The truth are renders of captions that no checkpoint was shown in training; they need the font NotoColorEmoji.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.installed.errors import PluginNotFound
from diffgraft.lab.metrics import Mean, psnr, ssim
from diffgraft.lab.restoration import pictures_of
from diffgraft.methods.measurements import Identity, TemporalMean
from diffgraft.methods.problems import Problem, read_operator, simulated
from diffgraft_checkpoints.emoji import motion, scenes
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

PICTURES = ("downsample(4) + noise(0.02)", "blur(1) + noise(0.02)", "mask(0.5) + noise(0.02)")
CLIPS = ("temporal_mean(3) + noise(0.02)", "downsample(2) + noise(0.02)", "downsample(4) @ temporal_mean(3) + noise(0.02)")
TAUS = (757.0, 522.0, 375.0, 255.0, 125.0)
"""Published for CausVid's Wan."""
app = typer.Typer(add_completion=False)


def renders(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures [n, 3, 64, 64] in [-1, 1] with their captions."""
    rng, held_out = np.random.default_rng(seed), scenes.split()[1]
    chosen = [held_out[i] for i in rng.choice(len(held_out), count, replace=False)]
    pictures = [as_tensor(scenes.render(scenes.sample_scene(labels, rng))) for labels in chosen]
    return torch.stack(pictures), [scenes.caption(labels) for labels in chosen]


def moving(count: int, seed: int) -> tuple[Tensor, list[str], list[str]]:
    """Clips [n, 3, 9, 64, 64], their captions, and those of a frame."""
    drawn = [motion.draw_clip(seed, i, True) for i in range(count)]
    frames = [torch.stack([as_tensor(frame) for frame in motion.render_clip(clip)], 1) for clip in drawn]
    labels = [clip.labels for clip in drawn]
    still = [f"a {one.size} {one.object} on a {one.background} background" for one in labels]
    return torch.stack(frames), [motion.caption(one) for one in labels], still


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def made(pipe: Any, prompts: Sequence[str], plugins: dict[str, Any], **arguments: Any) -> tuple[Tensor, int]:
    """What the pipeline makes, and the denoiser's forwards for each sample."""
    pipe = load_pipeline(pipe, plugins=plugins) if plugins else pipe
    found = pipe(list(prompts), output_type="np", generator=torch.Generator().manual_seed(3), **arguments)[0]
    forwards = 0
    if plugins:
        report = pipe.plugins.report()
        forwards = sum(report.forwards.values())
        forwards += sum(report.plugins[name].counts.get("image", {}).get("run", 0) for name in plugins)
        for name in plugins:
            pipe.plugins.remove(name)
    return torch.from_numpy(np.asarray(found)).movedim(-1, 1).float() * 2 - 1, forwards


def row(name: str, x: Tensor, truth: Tensor, problem: Problem, forwards: int) -> dict[str, Any]:
    """One method's figures, of each picture."""
    here, there = pictures_of(x), pictures_of(truth)
    found = {
        "method": name,
        "nfe": forwards,
        "psnr": psnr(here, there),
        "ssim": ssim(here, there),
        "residual": problem.residual(x).tolist(),
    }
    if x.ndim == 5:  # of each clip: how far the changes from frame to frame are from the truth's
        found["flicker"] = (x - truth).diff(dim=2).square().flatten(1).mean(1).sqrt().tolist()
    return found


def told(values: Sequence[float] | None, digits: int) -> str:
    if values is None:
        return "-"
    mean = Mean.of(values)
    return f"{mean.mean:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def shown(rows: Sequence[dict[str, Any]], title: str) -> None:
    keys = [key for key in ("psnr", "ssim", "flicker", "residual") if key in rows[0]]
    table = Table("method", "forwards", *keys, "dB above pinv", title=title)
    for each in rows:
        gain = [a - b for a, b in zip(each["psnr"], rows[0]["psnr"], strict=True)]
        table.add_row(each["method"], str(each["nfe"]), *(told(each[key], 2 if key == "psnr" else 3) for key in keys), told(gain, 2))
    Console(width=170).print(table)


def saved(strips: Sequence[Sequence[Tensor]], path: Path) -> None:
    """Rows of pictures [3, h, w], twice as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = torch.cat([torch.cat([picture.clamp(-1, 1) for picture in strip], -1) for strip in strips], -2)
    array = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).resize((array.shape[1] * 2, array.shape[0] * 2), Image.Resampling.NEAREST).save(path, optimize=True)


def loaded(name: str) -> Any:
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@app.command()
def pictures(
    pictures: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option(help="of the renders; the defaults were chosen on those of 7")] = 1,
    delta: Annotated[float, typer.Option(min=1e-9)] = 1.0,
    problem_text: Annotated[str, typer.Option("--problem", help="one alone, as text; by default three")] = "",
    rates: Annotated[str, typer.Option(help="learning rates of red_diff at 8 steps")] = "0.1,0.4",
    out: Annotated[Path, typer.Option()] = Path("out/lvtino"),
) -> None:
    """LATINO on emoji-sd-lcm."""
    truth, captions = renders(pictures, seed)
    pipe, teacher = loaded("emoji-sd-lcm"), loaded("emoji-sd")
    alone, _ = made(pipe, captions, {}, num_inference_steps=4)
    strips, everything = [], []
    for text in [problem_text] if problem_text else PICTURES:
        operator, noise = read_operator(text)
        problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        guess = problem.operator.pinv(problem.y)
        rows = [row("pseudo-inverse", guess, truth, problem, 0), row("emoji-sd-lcm alone", alone, truth, problem, 4)]
        for steps in (4, 8):
            x, forwards = made(pipe, captions, {"lvtino": {"problem": problem, "delta": delta}}, num_inference_steps=steps)
            rows.append(row(f"lvtino, {steps} steps", x, truth, problem, forwards))
        knobs = {"problem": problem, "delta": delta, "encoding": "difference"}
        found, forwards = made(pipe, captions, {"lvtino": knobs}, num_inference_steps=8)
        rows.append(row("lvtino, 8 steps, difference", found, truth, problem, forwards))
        for rate in map(float, rates.split(",")):
            try:
                knobs = {"problem": problem, "lr": rate}
                x, forwards = made(teacher, captions, {"red_diff": knobs}, num_inference_steps=8, guidance_scale=1.0)
                rows.append(row(f"red_diff on emoji-sd, 8 steps, lr {rate:g}", x, truth, problem, forwards))
            except PluginNotFound:
                break
        shown(rows, text)
        everything.append({"problem": text, "rows": rows})
        strips += [[truth[i], guess[i], found[i]] for i in range(min(2, pictures))]
    saved(strips, out / "pictures.png")
    (out / "pictures.json").write_text(json.dumps(everything, indent=1))


@app.command()
def clips(
    clips: Annotated[int, typer.Option(min=1)] = 6,
    seed: Annotated[int, typer.Option(help="of the clips; the defaults were chosen on those of 99")] = 5,
    problem_text: Annotated[str, typer.Option("--problem", help="one alone, as text; by default three")] = "",
    out: Annotated[Path, typer.Option()] = Path("out/lvtino"),
) -> None:
    """LVTINO on emoji-wan-4step, with emoji-sd-lcm for the frames."""
    truth, captions, still = moving(clips, seed)
    pipe, image = loaded("emoji-wan-4step"), loaded("emoji-sd-lcm")
    alone, _ = made(pipe, captions, {})
    strips, everything = [], []
    for text in [problem_text] if problem_text else CLIPS:
        operator, noise = read_operator(text)
        problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        rows = [row("pseudo-inverse", problem.operator.pinv(problem.y), truth, problem, 0)]
        rows.append(row("emoji-wan-4step alone", alone, truth, problem, 4))
        known = {"problem": problem, "few_step": True}
        taus = {**known, "times": TAUS, "encoding": "difference"}
        framed = {**taus, "image": image, "image_prompt": tuple(still)}
        runs = {
            "lvtino, own 4 times": known, "lvtino, 5 times, plain": {**known, "times": TAUS}, "lvtino, 5 times": taus,
            "lvtino, 5 times, image step": framed, "the same, end = prox": {**framed, "end": "prox"},
        }  # fmt: skip
        for name, knobs in runs.items():
            found, forwards = made(pipe, captions, {"lvtino": knobs})
            rows.append(row(name, found, truth, problem, forwards))
        frames, forwards = framewise(image, still, problem, truth)
        rows.append(row("each frame by itself (LATINO, 4 steps)", frames, truth, problem, forwards))
        shown(rows, text)
        everything.append({"problem": text, "rows": rows})
        for x in (truth, problem.operator.pinv(problem.y), frames, found):
            strips.append(list(x[0].unbind(1)))
    saved(strips, out / "clips.png")
    (out / "clips.json").write_text(json.dumps(everything, indent=1))


def framewise(image: Any, captions: Sequence[str], problem: Problem, truth: Tensor) -> tuple[Tensor, int]:
    """LATINO on every frame, of which a method for pictures can say no more than: this is the mean frame, and small."""
    n, frames = truth.shape[0], truth.shape[2]
    operator, y = problem.operator, problem.y.repeat_interleave(frames // problem.y.shape[2], 2)
    inner = getattr(operator, "inner", operator)
    if isinstance(inner, TemporalMean):
        operator = getattr(operator, "outer", Identity())
    single = Problem(operator, y.transpose(1, 2).flatten(0, 1), problem.noise)
    prompts = [caption for caption in captions for _ in range(frames)]
    x, forwards = made(image, prompts, {"lvtino": {"problem": single}}, num_inference_steps=4)
    return x.unflatten(0, (n, frames)).transpose(1, 2), forwards * frames


if __name__ == "__main__":
    app()
