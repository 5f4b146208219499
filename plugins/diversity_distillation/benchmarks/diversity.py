"""How different are the pictures of one prompt? The base, the distilled model, and the distilled model with diversity_distillation.

    python plugins/diversity_distillation/benchmarks/diversity.py --pipeline emoji-sd-lcm --base emoji-sd --out diversity
    python plugins/diversity_distillation/benchmarks/diversity.py --pipeline emoji-sd --lora random --prompts 2 --seeds 2 --base-steps 4

Every arm makes the same prompts from the same seeds. Per prompt: the mean distance of all pairs of seeds (pixels: RMS on 0..255; latents:
RMS; features: 1 - cosine of the judge's features), then its mean and standard error over the prompts, and in how many prompts an arm is
more diverse than the distilled model alone. LPIPS and DreamSim (the paper's measure) need weights that are not at hand offline. A judge of
a bundled pipeline says how many pictures show what was asked for. `strip.png`: the x0 estimate of every step (DT-visualisation).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.installed import registry
from diffgraft.kernel.loading import read_pipeline
from diffgraft.lab.judging import load_judge
from diffgraft.lab.metrics import share
from diffgraft.lab.pictures import draw_grid
from diffgraft.methods.adapters import adapter_layers
from diffgraft.methods.files import write_atomic
from diffusers import LCMScheduler
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

NAME = "diversity_distillation"
console = Console(width=160)


@dataclass
class Arm:
    """One side: a pipeline, the plugin's knobs (every arm has the plugin on, neutral where it says so, for the preview) and its call."""

    name: str
    pipe: Any
    knobs: dict[str, Any]
    steps: int
    guidance: float
    distances: dict[str, list[float]] = field(default_factory=dict)
    verdicts: list[bool | None] = field(default_factory=list)
    committed: list[list[float]] = field(default_factory=list)
    evaluations: float = 0.0
    seconds: float = 0.0


def pairwise(x: Tensor, scale: float = 1.0) -> float:
    """Mean RMS distance of all pairs of rows."""
    return float(np.mean([scale * (x[i] - x[j]).square().mean().sqrt().item() for i, j in combinations(range(len(x)), 2)]))


def pairwise_cosine(x: Tensor) -> float:
    """Mean 1 - cosine of all pairs of rows."""
    x = torch.nn.functional.normalize(x.flatten(1), dim=1)
    return float(np.mean([1 - float(x[i] @ x[j]) for i, j in combinations(range(len(x)), 2)]))


def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Latents [n, channels, height, width] of a pipeline with an AutoencoderKL as pictures."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    pictures: list[Image.Image] = []
    with torch.no_grad():
        for part in latents.to(pipe.vae.dtype).split(16):
            decoded = pipe.vae.decode(part / pipe.vae.config.scaling_factor + shift, return_dict=False)[0]
            pictures += pipe.image_processor.postprocess(decoded, output_type="pil")
    return pictures


def run(arm: Arm, prompt: str, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(latents [seeds, ...], x0 estimates [steps, seeds, ...]) of one prompt."""
    load_pipeline(arm.pipe, plugins=[(NAME, {**arm.knobs, "preview": True})])
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        latents = arm.pipe(
            [prompt] * len(seeds), num_inference_steps=arm.steps, guidance_scale=arm.guidance, generator=generators, output_type="latent"
        ).images
        arm.seconds += time.perf_counter() - started
        part = arm.pipe.plugins.report().plugins[NAME]
        arm.evaluations = part.total("base") + part.total("distilled")
        return latents.float().cpu(), part.records["x0"].float().cpu()
    finally:
        arm.pipe.plugins.clear()


def measure(arm: Arm, prompt: str, seeds: Sequence[int], judge: Any) -> None:
    """Run one prompt and add what it shows to the arm."""
    latents, x0 = run(arm, prompt, seeds)
    pictures = decode(arm.pipe, latents.to(arm.pipe.device))
    pixels = torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)) for p in pictures])
    found = {"pixels": pairwise(pixels), "latents": pairwise(latents)}
    if judge is not None:
        if hasattr(judge, "features"):
            found["features"] = pairwise_cosine(judge.features(pictures).float().cpu())
        scores = judge.score(pictures, [prompt] * len(pictures))
        said = [[field[i] for field in scores.values() if field[i] is not None] for i in range(len(pictures))]
        arm.verdicts += [all(each) if each else None for each in said]
    for name, value in found.items():
        arm.distances.setdefault(name, []).append(value)
    norm = latents.square().mean().sqrt()
    arm.committed.append([float((step - latents).square().mean().sqrt() / norm) for step in x0])


def random_lora(pipe: Any) -> None:
    """A LoRA with small random weights, to try the script without a trained one."""
    from peft import LoraConfig

    torch.manual_seed(0)
    for model in (getattr(pipe, name, None) for name in ("unet", "transformer")):
        if model is not None:
            model.add_adapter(LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
            model.eval().requires_grad_(False)


def spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{error}"


def table(arms: Sequence[Arm], distilled: Arm, pictures: int) -> Table:
    """The result for people."""
    measures = list(distilled.distances)
    shown = Table(title="Mean distance between pictures of one prompt (± standard error over prompts; in how many prompts above distilled)")
    for column in ("", "steps", "evaluations", "s/picture", *measures, "all right"):
        shown.add_column(column)
    for arm in arms:
        cells = []
        for name in measures:
            mine, theirs = arm.distances[name], distilled.distances[name]
            more = "" if arm is distilled else f" ({sum(a > b for a, b in zip(mine, theirs, strict=True))}/{len(mine)})"
            cells.append(spread(mine) + more)
        right = share(arm.verdicts)
        judged = f"{right.share:.0%} ({right.low:.0%}-{right.high:.0%})" if right else "-"
        shown.add_row(arm.name, str(arm.steps), f"{arm.evaluations:g}", f"{arm.seconds / pictures:.2f}", *cells, judged)
    return shown


def strip(arms: Sequence[Arm], prompt: str, seed: int, columns: int) -> Image.Image:
    """x0 estimates: a row an arm, a column a step (of a long run evenly chosen ones), the picture last."""
    rows = []
    for arm in arms:
        latents, x0 = run(arm, prompt, [seed])
        chosen = [round(i * (len(x0) - 1) / (columns - 1)) for i in range(columns)] if len(x0) > columns else list(range(len(x0)))
        pictures = decode(arm.pipe, torch.cat([x0[chosen, 0], latents]).to(arm.pipe.device))
        blank = [Image.new("RGB", pictures[0].size, "white")] * (columns - len(chosen))
        rows.append(([arm.name, "step " + ", ".join(str(i + 1) for i in chosen)], [*pictures[:-1], *blank, pictures[-1]]))
    captions = [*(f"x0 estimate {i + 1}" for i in range(columns)), "picture"]
    return draw_grid(
        f"{prompt} (seed {seed})", "Diffusion-Target visualisation: what the model takes the picture to be", captions, rows, 96
    )


def numbers(text: str) -> list[float]:
    """``1,2,7`` as numbers."""
    return [float(part) for part in text.split(",") if part.strip()]


def main(
    pipeline: Annotated[str, typer.Option(help="the distilled pipeline: bundled name, folder or Hub id")] = "emoji-sd-lcm",
    base: Annotated[str, typer.Option(help="the base pipeline: an arm, and the base of the hybrid where no LoRA is loaded")] = "emoji-sd",
    lora: Annotated[str | None, typer.Option(help="distillation LoRA for --pipeline, with the LCM scheduler; 'random' for a trial")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many of the bundled prompts")] = 16,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt of your own instead (repeat for several)")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="pictures a prompt")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="N_D")] = 4,
    k: Annotated[int, typer.Option(min=1, help="k: the base's part of N_D")] = 1,
    guidance: Annotated[str, typer.Option(help="w_B: one hybrid arm each")] = "1,2,7",
    base_steps: Annotated[int, typer.Option(min=1, help="steps of the base alone")] = 50,
    base_guidance: Annotated[float | None, typer.Option(help="guidance scale of the base alone; default: the bundled one")] = None,
    own_schedule: Annotated[int | None, typer.Option(help="N_B: one more arm, in which the base makes its own steps")] = None,
    device: str = "cpu",
    out: Path = Path("diversity"),
) -> None:
    """Pairwise distances, judge and DT strip of base, distilled and hybrid."""
    bundled = registry.find_bundled(base) if base in registry.bundled_names() else None
    texts = prompt or list(bundled.prompts[:prompts] if bundled else [])
    if not texts:
        raise typer.BadParameter("give --prompt TEXT: the base is no bundled pipeline")
    judge = load_judge(bundled) if bundled else None
    scale = base_guidance if base_guidance is not None else bundled.guidance_scale if bundled else 7.5
    first, second = read_pipeline(base).to(device), read_pipeline(pipeline).to(device)
    if lora is not None:
        second.scheduler = LCMScheduler.from_config(second.scheduler.config)
        random_lora(second) if lora == "random" else second.load_lora_weights(lora)
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(second, "unet", None) or second.transformer
    model = {} if adapter_layers(denoiser) else {"model": first}  # with a LoRA the base is the pipeline without it
    alone = Arm("distilled alone", second, {"steps": 0}, steps, 1.0)
    arms = [Arm("base alone", first, {"steps": 0}, base_steps, scale), alone]
    arms += [Arm(f"hybrid k={k} w_B={w:g}", second, {"steps": k, "guidance_scale": w, **model}, steps, 1.0) for w in numbers(guidance)]
    if own_schedule is not None:
        knobs = {"steps": k, "guidance_scale": scale, "base_steps": own_schedule, "model": first}
        arms.append(Arm(f"hybrid k={k} w_B={scale:g} N_B={own_schedule}", second, knobs, steps, 1.0))
    for number, text in enumerate(track(texts, "prompts", console=console)):
        for arm in arms:
            measure(arm, text, range(1000 + number * seeds, 1000 + (number + 1) * seeds), judge)
    console.print(table(arms, alone, len(texts) * seeds))
    for arm in arms:  # how near the estimate of each step is to the picture, RMS relative to the picture's own
        nearness = np.mean(arm.committed, axis=0)
        console.print(f"{arm.name}: distance of the x0 estimates from the picture " + " ".join(f"{value:.2f}" for value in nearness))
    settings = {"pipeline": pipeline, "base": base, "lora": lora, "prompts": texts, "seeds": seeds, "torch": torch.__version__}
    keep = ("name", "knobs", "steps", "guidance", "distances", "verdicts", "committed", "evaluations", "seconds")
    results = [{key: value for key, value in vars(arm).items() if key in keep} for arm in arms]
    for result in results:
        result["knobs"] = {key: value if key != "model" else base for key, value in result["knobs"].items()}
    write_atomic(out / "diversity.json", json.dumps({**settings, "arms": results}, indent=1).encode())
    strip(arms, texts[0], 1000, steps).save(out / "strip.png")
    console.print(f"written: {out / 'diversity.json'}, {out / 'strip.png'}")


if __name__ == "__main__":
    typer.run(main)
