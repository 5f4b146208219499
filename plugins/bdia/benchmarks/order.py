"""BDIA in figures: order of the error on a Gaussian mixture, round trips on emoji-sd, edits by prompt swap.

    python plugins/bdia/benchmarks/order.py --out edit.png

Error: RMS of the clean sample against 500 steps, on a one-dimensional mixture whose denoiser is exact, from the same 200 noises. Round
trip: a picture's latents to their code and back, 50 steps, guidance 2, largest difference of the latents; DDIM's inversion beside it.
Edits: without guidance, the default of an inversion.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.inversion import invert
from diffgraft.methods.inversion import round_trip as round_trip_of_picture
from diffgraft_bdia import BDIA, BDIAScheduler
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import grid, held_out_labels, renders
from diffusers import DDIMInverseScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor

MEANS, SPREADS, SHARES = (torch.tensor(values, dtype=torch.float64) for values in ([-1.5, 0.3, 1.2], [0.3, 0.2, 0.4], [0.3, 0.3, 0.4]))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
STEPS, GUIDANCE = 50, 2.0
GAMMAS = (1.0, 0.98, 0.96, 0.9)
console = Console(width=140)


def on_the_mixture(gamma: float, steps: int) -> Tensor:
    """Clean samples of the mixture."""
    scheduler = BDIAScheduler(**SD, gamma=gamma, precision="float64")
    scheduler.set_timesteps(steps)
    z = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod.double()[t].sqrt()
        s2 = 1 - a**2
        variance, away = (a * SPREADS) ** 2 + s2, z[:, None] - a * MEANS
        weight = (SHARES.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
        z = scheduler.step(s2.sqrt() * (weight * away / variance).sum(-1), t, z).prev_sample
    return z


def error_table() -> Table:
    """RMS errors and the order that two neighbouring ones show."""
    counts, reference = (10, 20, 40, 100, 200), on_the_mixture(0.0, 500)
    table = Table("gamma", *(f"{n} steps" for n in counts), "order 20 to 100", title="RMS against 500 DDIM steps, Gaussian mixture")
    for gamma in (0.0, 0.5, 0.9, 1.0):
        errors = [float((on_the_mixture(gamma, n) - reference).square().mean().sqrt()) for n in counts]
        order = math.log(errors[1] / errors[3]) / math.log(5)
        table.add_row(f"{gamma:g}", *(f"{each:.4f}" for each in errors), f"{order:.1f}")
    return table


def call(pipe: Any, prompt: str, **changes: Any) -> Any:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", **changes}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images


def round_trip(pipe: Any, gamma: float, precision: str, prompt: str, latents: Tensor) -> float:
    """Largest difference of latents that were inverted and made again."""
    knobs = {"gamma": gamma, "precision": precision}
    code = invert(pipe, BDIA(**knobs), latents, Sample(0, prompt), CallSettings(steps=STEPS, guidance_scale=GUIDANCE))
    load_pipeline(pipe, plugins=[BDIA(**knobs, start=code)])
    try:
        return float((call(pipe, prompt) - latents).abs().max())
    finally:
        unload(pipe)


def ddim_round_trip(pipe: Any, prompt: str, latents: Tensor) -> float:
    """The same with diffusers' DDIMInverseScheduler and DDIM."""
    own = pipe.scheduler
    pipe.scheduler = DDIMInverseScheduler.from_config(own.config)
    try:
        noise = call(pipe, prompt, latents=latents)
    finally:
        pipe.scheduler = own
    return float((call(pipe, prompt, latents=noise) - latents).abs().max())


def main(
    pictures: Annotated[int, typer.Option(help="Pictures that are inverted and edited.")] = 4,
    out: Annotated[Path, typer.Option(help="Picture: given, made again, edited.")] = Path("edit.png"),
) -> None:
    """Print the tables and draw the edits."""
    console.print(error_table())
    pipe = load_pipeline("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    labels = [each for each in held_out_labels() if each.size == "big"][:pictures]
    prompt = scenes.caption(labels[0])
    title = "largest difference of latents after a round trip on emoji-sd"
    table = Table("pipeline, states", *(f"gamma {gamma:g}" for gamma in GAMMAS), "DDIM inversion", title=title)
    for dtype, precision in ((torch.float32, "float32"), (torch.float64, "float64")):
        pipe.to(dtype)
        latents = call(pipe, prompt)
        rows = []
        for gamma in GAMMAS:
            try:
                rows.append(f"{round_trip(pipe, gamma, precision, prompt, latents):.1e}")
            except ValueError as error:  # the scheduler refuses what rounding would destroy
                rows.append(f"refused ({str(error).split(':')[0][-40:]})")
        table.add_row(precision, *rows, f"{ddim_round_trip(pipe, prompt, latents):.1e}")
    console.print(table)

    pipe.to(torch.float32)
    draw_edits(pipe, pictures, out)


def draw_edits(pipe: Any, pictures: int, out: Path) -> None:
    """Artworks, made again and edited without guidance, as `diffgraft invert` and `run` do it; how near they come made again."""
    labels = [each for each in held_out_labels() if each.size == "big"][:pictures]
    table = Table("picture", "autoencoder alone", "made again from the code", title="PSNR to the picture, dB")
    settings, shown = CallSettings(steps=STEPS), []
    for given, each in zip(renders(labels, 5), labels, strict=True):
        words = [scenes.caption(each), *edits(each)]
        code = invert(pipe, BDIA(), given, Sample(0, words[0]), settings)
        alone, again = round_trip_of_picture(pipe, BDIA(), given, Sample(0, words[0]), settings, code)
        table.add_row(words[0], f"{alone:.2f}", f"{again:.2f}")
        load_pipeline(pipe, plugins=[BDIA(start=code)])
        shown += [(given, "given"), *((pipe(text, num_inference_steps=STEPS).images[0], text) for text in words)]
        unload(pipe)
    console.print(table)
    grid([image for image, _ in shown], [text for _, text in shown], columns=4).save(out)


def edits(labels: scenes.Labels) -> list[str]:
    """The same caption with another background, and with another object."""
    background = "blue" if labels.background != "blue" else "red"
    thing = "star" if labels.object != "star" else "apple"
    return [scenes.caption(replace(labels, background=background)), scenes.caption(replace(labels, object=thing))]


if __name__ == "__main__":
    typer.run(main)
