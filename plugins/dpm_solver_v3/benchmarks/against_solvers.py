"""Error against a long run at few denoiser calls, beside diffusers' solvers: MSE of the latents, and the judge's score.

    diffgraft calibrate dpm_solver_v3 --pipeline emoji-sd --prompts prompts.txt --out ems.safetensors -a num_images_per_prompt=8
    python plugins/dpm_solver_v3/benchmarks/against_solvers.py --artefact ems.safetensors --prompts 48 --out solvers
    ... --full full.safetensors                      # beside it: statistics of every element (ems_shape=full)
    ... --every --steps 5                            # all variants of the corrector, and diffusers' solvers as `from_config` makes them

All arms get the same prompts and seeds, and end at the noise level at which DDIM ends on this pipeline (its `set_alpha_to_one` is off); the
solvers of diffusers are given the evenly spaced timesteps that DPM-Solver-v3 uses (`linspace`), except those called "as is". The reference
is DDIM with --reference-steps; it is kept in OUT.pt and made again when prompts or steps differ.
Intervals are 95 % of a bootstrap over the pictures; those of the ratio to DPM-Solver++ resample the pictures of both together.
Writes OUT.json, OUT.png (curves) and OUT-grid.png (pictures).
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
from diffgraft.lab.judging import load_judge
from diffgraft.lab.metrics import share
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_dpm_solver_v3 import DPMSolverV3
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

BATCH = 16
EVEN = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min", "lower_order_final": True}

MAIN = ("ddim", "dpm++ 2m", "unipc", "v3, l=1, no corrector", "v3, no corrector", "v3", "v3, full corrector", "v3 full, no corrector")
"""What is measured without --every."""

Arm = Callable[[Any], Any]
"""Puts a solver on a plain pipeline."""


def scheduler(cls: Any, **options: Any) -> Arm:
    """One of diffusers'."""

    def put(pipe: Any) -> None:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)

    return put


def plugin(**knobs: Any) -> Arm:
    """DPM-Solver-v3."""
    return lambda pipe: load_pipeline(pipe, plugins=[DPMSolverV3(**knobs)])


def arms(artefact: Path | None, full: Path | None, order: int) -> dict[str, Arm]:
    """All arms by name."""
    end = {"final_sigmas_type": "sigma_min"}
    found = {
        "ddim": scheduler(DDIMScheduler, timestep_spacing="linspace"),
        "dpm++ 2m": scheduler(DPMSolverMultistepScheduler, **EVEN),
        "dpm++ 2m heun": scheduler(DPMSolverMultistepScheduler, **EVEN, solver_type="heun"),
        "dpm++ 2m as is": scheduler(DPMSolverMultistepScheduler, **end),
        "unipc": scheduler(UniPCMultistepScheduler, **EVEN),
        "unipc as is": scheduler(UniPCMultistepScheduler, **end),
        "v3, l=1, no corrector": plugin(order=order, corrector="off"),
        "v3, l=1": plugin(order=order, corrector="pseudo"),
    }
    if artefact is not None:
        found["v3, no corrector"] = plugin(artefact=artefact, order=order, corrector="off")
        found["v3"] = plugin(artefact=artefact, order=order, corrector="pseudo")
        for half in ("t<=0.5", "t>0.5"):
            found[f"v3, corrector {half}"] = plugin(artefact=artefact, order=order, corrector="pseudo", half=half)
        found["v3, full corrector"] = plugin(artefact=artefact, order=order, corrector="full")
        found["v3, order 3"] = plugin(artefact=artefact, order=3, corrector="pseudo")
    if full is not None:
        found["v3 full, no corrector"] = plugin(artefact=full, order=order, corrector="off")
    return found


def generate(pipe: Any, prompts: list[str], steps: int, guidance: float, what: str) -> torch.Tensor:
    """Latents [n, ...]; picture i from seed 1000 + i."""
    parts = []
    for first in track(range(0, len(prompts), BATCH), what, transient=True):
        batch = prompts[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(1000 + first + i) for i in range(len(batch))]
        parts.append(pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent").images)
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Latents as pictures."""
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 10000) -> list[float]:
    """95 % interval of a statistic of rows [n, ...]."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return [float(x) for x in np.quantile(statistic(values[chosen]), (0.025, 0.975))]


def draw(rows: list[dict[str, Any]], shown: list[str], path: Path) -> None:
    """MSE against denoiser calls, and its ratio to DPM-Solver++'s."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for i, name in enumerate(shown):
        mine = [row for row in rows if row["arm"] == name]
        x = [row["steps"] for row in mine]
        for axis, key in ((left, "mse"), (right, "ratio")):
            if not mine or (axis is right and name == "ddim"):
                continue
            low, high = zip(*(row[f"{key}_95"] for row in mine), strict=True)
            axis.plot(x, [row[key] for row in mine], "o-", label=name, color=f"C{i}")
            axis.fill_between(x, low, high, alpha=0.12, linewidth=0, color=f"C{i}")
    left.set(xlabel="denoiser calls", ylabel="MSE of the latents to the reference", yscale="log")
    right.set(xlabel="denoiser calls", ylabel="MSE divided by that of dpm++ 2m")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    artefact: Annotated[Path | None, typer.Option()] = None,
    prompts: Annotated[int, typer.Option(min=2)] = 48,
    steps: Annotated[str, typer.Option()] = "5,6,8,10",
    full: Annotated[Path | None, typer.Option()] = None,
    every: Annotated[bool, typer.Option()] = False,
    guidance: Annotated[float | None, typer.Option()] = None,
    order: Annotated[int, typer.Option(min=1, max=3)] = 2,
    reference_steps: Annotated[int, typer.Option()] = 500,
    out: Annotated[Path, typer.Option()] = Path("solvers"),
) -> None:
    console = Console()
    torch.set_num_threads(1)
    bundled = registry.bundled()[pipeline]
    scale = guidance or bundled.guidance_scale or 1.0
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(bundled)
    texts = [scenes.caption(label) for label in held_out_labels()[:prompts]]
    own = pipe.scheduler
    kept, key = out.with_suffix(".pt"), (pipeline, prompts, reference_steps, scale)
    if kept.exists() and torch.load(kept)["key"] == key:
        reference = torch.load(kept)["latents"]
    else:
        reference = generate(pipe, texts, reference_steps, scale, f"reference, {reference_steps} steps")
        torch.save({"key": key, "latents": reference}, kept)
    pictures: dict[tuple[str, int], list[Image.Image]] = {("reference", reference_steps): decode(pipe, reference)}

    def verdict(images: list[Image.Image]) -> Any:
        fields = judge.score(images, texts)
        asked = [[row for row in column if row is not None] for column in zip(*fields.values(), strict=True)]
        return share([all(row) for row in asked])

    errors: dict[tuple[str, int], np.ndarray] = {}
    wanted = {name: arm for name, arm in arms(artefact, full, order).items() if every or name in MAIN}
    for n in (int(x) for x in steps.split(",")):
        for name, put in wanted.items():
            try:
                put(pipe)
                latents = generate(pipe, texts, n, scale, f"{name}, {n} steps")
            finally:
                unload(pipe)
                pipe.scheduler = own
            errors[name, n] = (latents - reference).square().flatten(1).mean(1).numpy()
            pictures[name, n] = decode(pipe, latents)
    table = Table("solver", "calls", "MSE", "95 %", "to dpm++ 2m", "95 %", "judge: all right")
    rows = []
    for (name, n), error in errors.items():
        base = errors.get(("dpm++ 2m", n), error)
        found = verdict(pictures[name, n])
        row = {
            "arm": name, "steps": n, "mse": float(error.mean()), "mse_95": bootstrap(error, lambda x: x.mean(1)),
            "ratio": float(error.mean() / base.mean()),
            "ratio_95": bootstrap(np.stack([error, base], 1), lambda x: x[..., 0].mean(1) / x[..., 1].mean(1)),
            "judge": vars(found),
        }  # fmt: skip
        rows.append(row)
    for row in rows:
        low, high = row["mse_95"]
        ratio = row["ratio_95"]
        right = row["judge"]
        table.add_row(row["arm"], str(row["steps"]), f"{row['mse']:.4f}", f"{low:.4f} to {high:.4f}", f"{row['ratio']:.2f}",
                      f"{ratio[0]:.2f} to {ratio[1]:.2f}", f"{right['share']:.2f} ({right['low']:.2f} to {right['high']:.2f})")  # fmt: skip
    console.print(table)
    at = verdict(pictures["reference", reference_steps])
    console.print(f"reference: {reference_steps} steps of DDIM, judge {at.share:.2f}; {prompts} prompts, guidance {scale}")
    facts = {"pipeline": pipeline, "prompts": prompts, "guidance": scale, "reference_steps": reference_steps, "order": order,
             "judge_of_reference": vars(at), "python": platform.python_version(), "torch": torch.__version__,
             "diffusers": diffusers.__version__, "rows": rows}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    shown = ["ddim", "dpm++ 2m", "unipc", "v3, l=1, no corrector", "v3, no corrector", "v3"]
    draw(rows, shown, out.with_suffix(".png"))
    grid(pictures, errors, shown, out.with_name(out.stem + "-grid.png"))


def grid(pictures: dict[tuple[str, int], list[Image.Image]], errors: Any, shown: list[str], path: Path) -> None:
    """The first pictures of the shortest run of each arm, under the reference."""
    n = min(steps for _, steps in errors)
    keys = [next(iter(pictures)), *((name, n) for name in shown if (name, n) in pictures)]
    side, columns, left = 80, min(10, len(pictures[keys[0]])), 130
    sheet = Image.new("RGB", (left + columns * side, len(keys) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for y, key in enumerate(keys):
        pen.multiline_text((4, y * side + 28), f"{key[0]}\n{key[1]} calls", fill="black", font_size=12)
        for x, image in enumerate(pictures[key][:columns]):
            sheet.paste(image.resize((side - 2, side - 2), Image.Resampling.LANCZOS), (left + x * side, y * side))
    sheet.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
