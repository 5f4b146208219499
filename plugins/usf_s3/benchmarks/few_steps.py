"""Error against a long run in few steps, on prompts and noises that no search has seen: found schedules beside fixed solvers.

    python plugins/usf_s3/benchmarks/few_steps.py                                        # small: 3 minutes
    python plugins/usf_s3/benchmarks/few_steps.py --prompts 48 --steps 4,5,6,8,10 --reference-steps 200 --v3 ems.safetensors --out few

`prompts` prints the training captions that the searches were made on, one a line; a search is, for each number of steps,

    python plugins/usf_s3/benchmarks/few_steps.py --show-prompts 12 > prompts.txt
    diffgraft evolve usf_s3 --pipeline emoji-sd --prompts prompts.txt --steps 8 --population 20 --epochs 9 --top 5 --mutations 14 \
        --crossovers 4 --reference-steps 100 --out emoji-sd-8.json

Found schedules are read from FOUND/PIPELINE-STEPS.json. The control "best of 12 known" is
the best, chosen on these very prompts, of the known solvers on the tables of timesteps that a search begins with.
The reference is diffusers' UniPC with --reference-steps. Errors are mean squared errors of the latents; intervals are 95 % of a
bootstrap over the pictures, those of ratios resample the pictures of both together. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.judging import load_judge
from diffgraft.lab.metrics import share
from diffgraft.methods.findings import Finding
from diffgraft.methods.search import look
from diffgraft.methods.variants import own_size
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_usf_s3 import USFS3, S3Searcher
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
BATCH = 16
KNOWN = 12
CONTROL = "best of 12 known"
FIRST_SEED = 20_000
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EVEN = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}

Arm = Callable[[Any], Any]
"""Puts a solver on a plain pipeline."""


def diffusers_solver(cls: Any, **options: Any) -> Arm:
    """One of diffusers', on even timesteps, ending where the pipeline's own scheduler ends; of a flow model on its own sigmas."""

    def put(pipe: Any) -> None:
        old = pipe.scheduler.config
        flow = "base_image_seq_len" in old
        told = {**FLOW, "flow_shift": old.get("shift", 1.0)} if flow else EVEN
        pipe.scheduler = cls.from_config(old, **told, **options)

    return put


def plugin(name: str, **knobs: Any) -> Arm:
    return lambda pipe: load_pipeline(pipe, plugins=[(name, knobs)])


def over_unipc(found: Path) -> Arm:
    """AutoDiffusion's timesteps under UniPC, as examples/benchmarks searched them."""

    def put(pipe: Any) -> None:
        told = Finding.load(found, "autodiffusion").made_for.scheduler_config
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **told)
        load_pipeline(pipe, plugins=[("autodiffusion", {"artefact": found})])

    return put


def generate(pipe: Any, prompts: list[str], first_seed: int, steps: int, guidance: float, what: str) -> torch.Tensor:
    """Latents [n, ...]; picture i from seed first_seed + i."""
    parts = []
    for first in track(range(0, len(prompts), BATCH), what, transient=True):
        batch = prompts[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(first_seed + first + i) for i in range(len(batch))]
        parts.append(pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent").images)
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, *own_size(pipe), pipe.vae_scale_factor)
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + (getattr(pipe.vae.config, "shift_factor", None) or 0.0)).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 10000) -> list[float]:
    """95 % interval of a statistic of rows [n, ...]."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return [float(x) for x in np.quantile(statistic(values[chosen]), (0.025, 0.975))]


def known_schedules(pipe: Any, text: str, n: int, guidance: float) -> list[dict[str, Any]]:
    """Known solvers on the tables of timesteps that a search of n steps begins with."""
    search = USFS3()
    searcher = S3Searcher()
    searcher.prepare(look(pipe, search, lambda: generate(pipe, [text], 0, n, guidance, "a look"))[0])
    return [genome for i in range(KNOWN) if (genome := searcher.first(random.Random(0), i, 2 * KNOWN)) is not None]


def training_captions(count: int) -> list[str]:
    trained = scenes.split()[0]
    return [scenes.caption(trained[i]) for i in np.random.default_rng(5).choice(len(trained), count, replace=False)]


def main(
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    found: Annotated[Path, typer.Option(help="Folder of the found schedules.")] = HERE,
    autodiffusion: Annotated[Path, typer.Option()] = HERE.parents[2] / "examples/benchmarks/found",
    v3: Annotated[Path | None, typer.Option(help="Statistics of dpm_solver_v3.")] = None,
    prompts: Annotated[int, typer.Option(min=2)] = 12,
    steps: Annotated[str, typer.Option()] = "5,8",
    reference_steps: Annotated[int, typer.Option()] = 100,
    out: Annotated[Path, typer.Option()] = Path("few_steps"),
    show_prompts: Annotated[int, typer.Option(help="Print so many training captions and end.")] = 0,
) -> None:
    if show_prompts:
        for text in training_captions(show_prompts):
            typer.echo(text)
        return
    torch.set_num_threads(1)
    console = Console(width=150)
    bundled = registry.bundled()[pipeline]
    guidance = bundled.guidance_scale or 1.0
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    judge, own = load_judge(bundled), pipe.scheduler
    texts = [scenes.caption(label) for label in held_out_labels()]
    texts = random.Random(0).sample(texts, prompts)

    def made(put: Arm, n: int, what: str) -> torch.Tensor:
        try:
            put(pipe)
            return generate(pipe, texts, FIRST_SEED, n, guidance, what)
        finally:
            unload(pipe)
            pipe.scheduler = own

    began = time.process_time()
    reference = made(diffusers_solver(UniPCMultistepScheduler), reference_steps, f"reference, {reference_steps} steps")
    rows: list[dict[str, Any]] = []
    for n in (int(x) for x in steps.split(",")):
        arms = {
            "dpm++ 2m": diffusers_solver(DPMSolverMultistepScheduler),
            "unipc": diffusers_solver(UniPCMultistepScheduler),
            "usf_s3, no schedule": plugin("usf_s3"),
        }
        if v3 is not None:
            arms["dpm_solver_v3"] = plugin("dpm_solver_v3", artefact=v3, corrector="pseudo")
        if (over := autodiffusion / f"{pipeline}-UniPC-{n}.json").exists():
            arms["autodiffusion, unipc"] = over_unipc(over)
        known = {f"known {i}": plugin("usf_s3", schedule=genome) for i, genome in enumerate(known_schedules(pipe, texts[0], n, guidance))}
        if (file := found / f"{pipeline}-{n}.json").exists():
            arms["found"] = plugin("usf_s3", artefact=file)
        errors, pictures = {}, {}
        for name, put in {**known, **arms}.items():
            latents = made(put, n, f"{name}, {n} steps")
            errors[name] = (latents - reference).double().square().flatten(1).mean(1).numpy()
            if name in arms:
                pictures[name] = decode(pipe, latents)
            elif errors[name].mean() <= min(errors[each].mean() for each in errors):
                pictures[CONTROL], best = decode(pipe, latents), name
        errors = {CONTROL: errors[best], **{name: errors[name] for name in arms}}
        for name, error in errors.items():
            fields = judge.score(pictures[name], texts)
            right = share([all(v is not False for v in column) for column in zip(*fields.values(), strict=True)])
            base = errors["unipc"]
            rows.append({
                "arm": name, "steps": n, "mse": float(error.mean()), "mse_95": bootstrap(error, lambda x: x.mean(1)),
                "ratio": float(error.mean() / base.mean()),
                "ratio_95": bootstrap(np.stack([error, base], 1), lambda x: x[..., 0].mean(1) / x[..., 1].mean(1)),
                "median": float(np.median(error)), "nearer": int((error < base).sum()), "right": right.right, "of": right.total,
            })  # fmt: skip
    table = Table("solver", "calls", "MSE", "95 %", "median", "to unipc", "95 %", "nearer than unipc", "judge: all right")
    for row in rows:
        low, high = row["mse_95"]
        table.add_row(row["arm"], str(row["steps"]), f"{row['mse']:.5f}", f"{low:.5f} to {high:.5f}", f"{row['median']:.5f}",
                      f"{row['ratio']:.2f}", "{:.2f} to {:.2f}".format(*row["ratio_95"]), f"{row['nearer']}/{row['of']}",
                      f"{row['right']}/{row['of']}")  # fmt: skip
    console.print(table)
    spent = time.process_time() - began
    console.print(
        f"{prompts} held-out prompts, guidance {guidance}, reference: UniPC with {reference_steps} steps; {spent:.0f} s of a core"
    )
    facts = {"pipeline": pipeline, "prompts": prompts, "guidance": guidance, "reference_steps": reference_steps, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(rows, out.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """MSE against denoiser calls, and its ratio to UniPC's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for i, name in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = [row for row in rows if row["arm"] == name]
        x = [row["steps"] for row in mine]
        for axis, key in ((left, "mse"), (right, "ratio")):
            low, high = zip(*(row[f"{key}_95"] for row in mine), strict=True)
            axis.plot(x, [row[key] for row in mine], "o-", label=name, color=f"C{i}", linewidth=2.5 if name == "found" else 1.2)
            axis.fill_between(x, low, high, alpha=0.1, linewidth=0, color=f"C{i}")
    left.set(xlabel="denoiser calls", ylabel="MSE of the latents to the reference", yscale="log")
    right.set(xlabel="denoiser calls", ylabel="MSE divided by that of UniPC")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    typer.run(main)
