"""`python -m diffgraft_checkpoints.train NAME --out DIR`: train a bundled checkpoint. The same command goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import LCMScheduler, StableDiffusionPipeline

from ..emoji import scenes as emoji_scenes
from ..emoji.judge import FIELDS, Judge
from . import cards
from . import decoder as decoder_stage
from . import dit as dit_stage
from . import edit as edit_stage
from . import evaluate as measuring
from . import export as exporting
from . import flux as flux_stage
from . import judge as judge_stage
from . import lcm as lcm_stage
from . import more as more_stage
from . import pixel as pixel_stage
from . import small as small_stage
from . import sr as sr_stage
from . import text as text_stage
from . import unet as unet_stage
from . import vae as vae_stage
from . import wan as wan_stage
from .common import console, keep_freed_memory, make_accelerator
from .pool import load_pool
from .recipe import (
    BASE,
    HELD_OUT_SCENES,
    Base,
    Device,
    Out,
    Prompts,
    Scenes,
    Seed,
    Steps,
    continued,
    describe,
    load_data,
    load_scenes,
    read_recipe,
    recipe_of,
    start,
    write_recipe,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command("emoji-flux")(flux_stage.emoji_flux)
app.command("measure-flux")(flux_stage.measure_flux)
app.command("emoji-wan")(wan_stage.emoji_wan)
app.command("emoji-dit")(dit_stage.emoji_dit)
app.command("measure-dit")(dit_stage.measure_dit)
app.command("emoji-edit")(edit_stage.emoji_edit)
app.command("measure-edit")(edit_stage.measure_edit)
app.command("emoji-pixel")(pixel_stage.emoji_pixel)
app.command("measure-pixel")(pixel_stage.measure_pixel)
app.command("emoji-sr")(sr_stage.emoji_sr)
app.command("measure-sr")(sr_stage.measure_sr)
app.command("emoji-text")(text_stage.emoji_text)
app.command("measure-text")(text_stage.measure_text)

GUIDANCES = (1.5, 2.0, 3.0)


@app.command("emoji-sd")
def emoji_sd(
    out: Out,
    steps_vae: Steps = 8500,
    steps_judge: Steps = 1200,
    steps_unet: Steps = 8500,
    steps_pairs: Steps = 6000,
    scenes: Scenes = 40_000,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
) -> None:
    """Train autoencoder, judge, U-Net and text encoder, export, measure."""
    keep_freed_memory()
    accelerator = make_accelerator(device)
    pool, pairs = load_data(out, scenes, seed)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True)
    state = out / "state"
    vae = vae_stage.train_vae(pool, state, steps_vae, seed, accelerator)
    judge = judge_stage.train_judge(pool, held_out, vae, state, steps_judge, seed, accelerator)
    unet, text, tokenizer = unet_stage.train_unet(pool, pairs, vae, state, (steps_unet, steps_pairs), seed, accelerator)
    trips = vae_stage.round_trip(vae, held_out.pictures)
    pipe = exporting.stable_diffusion(vae, unet, text, tokenizer)
    exporting.export(out / "emoji-sd", pipe, judge)
    options = {"vae": steps_vae, "judge": steps_judge, "unet": steps_unet, "pairs": steps_pairs}
    recipe = describe("emoji-sd", pipe, state, ("vae", "judge", "unet", "unet-pairs"), options, scenes, seed, device, pairs=True)
    recipe["vae_psnr_db"] = round(vae_stage.psnr(trips, held_out.pictures), 2)
    recipe["scaling_factor"] = vae.config.scaling_factor
    write_recipe(out, "emoji-sd", recipe)
    measure(out, "emoji-sd", prompts)


@app.command("emoji-sd-small")
def emoji_sd_small(
    out: Out,
    steps: Steps = 6000,
    base: Base = BASE,
    scenes: Scenes = 40_000,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
) -> None:
    """Train a small U-Net for the autoencoder and the text encoder of emoji-sd, export, measure."""
    accelerator, pipe = start(base, device)
    pools = load_data(out, scenes, seed)
    pipe.register_modules(unet=small_stage.train_small(pools, pipe, out / "state", steps, seed, accelerator))
    exporting.export(out / "emoji-sd-small", pipe.to("cpu"))
    recipe = describe("emoji-sd-small", pipe, out / "state", ("unet-small",), {"": steps}, scenes, seed, device, pairs=True)
    write_recipe(out, "emoji-sd-small", recipe)
    measure(out, "emoji-sd-small", prompts, base=base)


@app.command("emoji-sd-more")
def emoji_sd_more(
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Steps from BASE on; no more than are made already: export what there is.")] = 20_000,
    decay: Annotated[int, typer.Option(min=1, help="The last steps, in which the learning rate falls.")] = 1000,
    base: Base = BASE,
    scenes: Scenes = 24_000,
    upright: Annotated[bool, typer.Option(help="Objects as the artist drew them, or mirrored and turned by up to 25 degrees.")] = True,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
    figures: Annotated[bool, typer.Option(help="Measure at the end.")] = True,
    often: Annotated[str, typer.Option(help="Objects that are hard to draw, with commas between: drawn three times as often.")] = "",
) -> None:
    """Train the U-Net and the text encoder of BASE on, export as OUT/emoji-sd, measure."""
    hard = [name.strip() for name in often.split(",") if name.strip()]
    if unknown := [name for name in hard if name not in emoji_scenes.OBJECTS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not among the objects {', '.join(emoji_scenes.OBJECTS)}", param_hint="--often")
    before = recipe_of(base)
    accelerator, pipe = start(base, device)
    pools = load_data(out, scenes, seed, upright)
    state = out / "state" / ("upright" if upright else "free")
    more_stage.train_more(pools, pipe, state, steps, decay, seed, accelerator, hard)
    exporting.export(out / "emoji-sd", pipe.to("cpu"), Judge.from_pretrained(base / "judge"))
    recipe = describe("emoji-sd-more", pipe, state, ("unet-more",), {"": steps}, scenes, seed, device, pairs=True)
    recipe["command"] += f" --decay {decay} {'--upright' if upright else '--no-upright'}" + (f" --often '{often}'" if often else "")
    write_recipe(out, "emoji-sd", continued(before, recipe))
    if figures:
        measure(out, "emoji-sd", prompts, 2.0)


@app.command("emoji-sd-decoder")
def emoji_sd_decoder(
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Steps from BASE on; no more than are made already: export what there is.")] = 4000,
    decay: Annotated[int, typer.Option(min=1, help="The last steps, in which the learning rate falls.")] = 500,
    base: Base = BASE,
    scenes: Scenes = 24_000,
    upright: Annotated[bool, typer.Option(help="As for emoji-sd-more.")] = True,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
    figures: Annotated[bool, typer.Option(help="Measure at the end.")] = True,
) -> None:
    """Train the decoder of BASE on for sharper edges, export as OUT/emoji-sd, measure. The encoder stays as it is."""
    before = recipe_of(base)
    accelerator, pipe = start(base, device)
    pool = load_scenes(out, scenes, seed, upright)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True)
    judge = Judge.from_pretrained(base / "judge")
    state = out / "state" / ("upright" if upright else "free")
    decoder_stage.train_decoder(pool, pipe, judge, state, steps, decay, seed, accelerator)
    exporting.export(out / "emoji-sd", pipe.to("cpu"), judge)
    recipe = describe("emoji-sd-decoder", pipe, state, ("decoder",), {"": steps}, scenes, seed, device)
    recipe["command"] += f" --decay {decay} {'--upright' if upright else '--no-upright'}"
    recipe["vae_psnr_db"] = round(vae_stage.psnr(vae_stage.round_trip(pipe.vae, held_out.pictures), held_out.pictures), 2)
    write_recipe(out, "emoji-sd", continued(before, recipe))
    if figures:
        measure(out, "emoji-sd", prompts, 2.0)


@app.command("emoji-sd-lcm")
def emoji_sd_lcm(
    out: Out,
    steps: Steps = 700,
    base: Base = BASE,
    scenes: Scenes = 40_000,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
) -> None:
    """Distil emoji-sd into a LoRA for four steps without guidance, export it, measure."""
    accelerator, pipe = start(base, device)
    pools = load_data(out, scenes, seed)
    lora = lcm_stage.train_lcm(pools, pipe, out / "state", steps, seed, accelerator)
    exporting.export_lora(out / "emoji-sd-lcm", lora, lcm_stage.build_lcm_scheduler())
    recipe = describe("emoji-sd-lcm", pipe, out / "state", ("lcm",), {"": steps}, scenes, seed, device, pairs=True)
    recipe["parameters"] = {"LoRA": sum(part.numel() for part in lora.values())}
    write_recipe(out, "emoji-sd-lcm", recipe)
    measure(out, "emoji-sd-lcm", prompts, base=base)


@app.command()
def measure(
    out: Out,
    name: Annotated[str, typer.Argument(help="emoji-sd, emoji-sd-small or emoji-sd-lcm.")],
    prompts: Prompts = 160,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
    base: Base = BASE,
) -> None:
    """Measure OUT/NAME on held-out prompts; write its model card, and picture grids to OUT/grids-NAME."""
    folder = out / name
    lora = name == "emoji-sd-lcm"
    pipe = StableDiffusionPipeline.from_pretrained(base if lora else folder, local_files_only=True)
    judge = Judge.from_pretrained((folder if name == "emoji-sd" else base) / "judge")
    if lora:
        pipe.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
        pipe.load_lora_weights(folder)
        result = measuring.evaluate(pipe, judge, out / f"grids-{name}", prompts, 1.0, steps=4)
    else:
        sweep = measuring.sweep_guidance(pipe, judge, GUIDANCES)
        best = guidance or max(GUIDANCES, key=lambda g: sum(sweep[str(g)][field] for field in FIELDS))
        result = {**measuring.evaluate(pipe, judge, out / f"grids-{name}", prompts, best), "guidance_sweep": sweep}
    recipe = read_recipe(out, name)
    exporting.write_card(folder, cards.CARDS[name], recipe, judge, result, notes.read_text() if notes else "")
    for what in ("scores", "pairs"):
        for field, row in result[what].items():
            console.print(f"{what}, {field}: {row['right']} / {row['total']}, 95 % interval {row['wilson_95']}", highlight=False)


@app.command("export")
def export_now(out: Out, to: Annotated[Path, typer.Option(help="Folder to write.")], scenes: Scenes = 40_000, seed: Seed = 0) -> None:
    """Write emoji-sd with the averaged weights of the latest U-Net checkpoint while training goes on; nothing is measured."""
    state = out / "state"
    pool = load_scenes(out, scenes, seed)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True)
    accelerator = make_accelerator("cpu")
    unet_name = "unet-pairs" if (state / "unet-pairs.pt").exists() else "unet"
    names = ("vae", "judge", unet_name)
    if missing := [name for name in names if not (state / f"{name}.pt").exists()]:
        console.print(f"[red]{state} holds no checkpoint of {', '.join(missing)} yet; run emoji-sd first[/red]")
        raise typer.Exit(2)
    done = {name: torch.load(state / f"{name}.pt", weights_only=True, map_location="cpu") for name in names}
    vae = vae_stage.train_vae(pool, state, done["vae"]["step"], seed, accelerator)
    judge = judge_stage.train_judge(pool, held_out, vae, state, done["judge"]["step"], seed, accelerator)
    parts = unet_stage.load_averages(done[unet_name]["averages"], unet_stage.load_tokenizer(state))
    exporting.export(to, exporting.stable_diffusion(vae, *parts), judge)
    console.print(f"exported step {done[unet_name]['step']} of {unet_name} to {to}")


if __name__ == "__main__":
    app()
