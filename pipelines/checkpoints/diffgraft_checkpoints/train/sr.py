"""emoji-sr: emoji-sd-small taught to enlarge pictures of 16 x 16 pixels four times, as Stable Diffusion's upscaler does.

`StableDiffusionUpscalePipeline` puts the small picture, a little noisy, beside the latents, which are as large; here both are 16 x 16.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffgraft.methods.fitness import frechet
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionUpscalePipeline, UNet2DConditionModel
from PIL import Image
from rich.progress import track
from torch import Tensor

from ..bundled import emoji_sd_small
from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge, load_bundled
from ..emoji.plain_sr import SCALE, PlainSR, bicubic
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, plain_attention, step_generator
from .pool import Pool, decode_labels, from_images, load_pool, to_bytes, to_float, to_images
from .recipe import HELD_OUT_SCENES, Device, Out, Scenes, Seed, Steps, describe, load_scenes, read_recipe, start, write_recipe
from .unet import BATCH, CAPTION_DROPOUT, POSITIONS, draw_timesteps, encode_pool, loss_weight
from .vae import psnr, round_trip

NAME = "emoji-sr"
SMALL = scenes.SIZE // SCALE
"""Side of the picture to enlarge, and of the latents, in pixels."""
MOST_NOISE = 100
"""Largest noise level of the small picture; the levels are timesteps of `build_low_res_scheduler`."""
NOISE_LEVEL = 10
LEARNING_RATE, PLAIN_LEARNING_RATE = 1e-3, 2e-3
PLAIN_BATCH = 32
PIPELINE_SCALING = 0.08333
"""`StableDiffusionUpscalePipeline` writes this scaling factor over whatever the autoencoder says."""
GUIDANCES = (1.0, 1.5, 2.0)
SWEEP_PICTURES = 64
Base = Annotated[Path, typer.Option(help="The emoji-sd-small to start from.")]
Pictures = Annotated[int, typer.Option(min=2, help="Held-out pictures to measure.")]


def build_low_res_scheduler() -> DDPMScheduler:
    """Ho et al.'s linear schedule: level 10 adds noise of .04 to a picture in -1..1, level 100 of .33."""
    return DDPMScheduler()


def shrink(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 64, 64) -> float (N, 3, 16, 16) in -1..1: means over 4 x 4 pixels, rounded to the 256 levels of a picture."""
    small = torch.nn.functional.avg_pool2d(pictures.float(), SCALE).round()
    return small / 127.5 - 1


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with three channels more, for the small picture, and a table of its noise levels; both begin without effect."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": 7, "num_class_embeds": MOST_NOISE + 1})
    weights = dict(unet.state_dict())
    narrow = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([narrow, torch.zeros(narrow.shape[0], 3, *narrow.shape[2:])], dim=1)
    weights["class_embedding.weight"] = torch.zeros_like(wide.class_embedding.weight)
    wide.load_state_dict(weights)
    return wide


@torch.no_grad()
def rescaled(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder whose latents, with the scaling factor that the pipeline insists on, are those of `vae` with its own."""
    ratio = vae.config.scaling_factor / PIPELINE_SCALING
    new = copy.deepcopy(vae)
    channels = new.config.latent_channels
    new.quant_conv.weight[:channels] *= ratio
    new.quant_conv.bias[:channels] *= ratio
    new.quant_conv.bias[channels:] += 2 * math.log(ratio)  # the logarithm of the variance
    new.post_quant_conv.weight /= ratio
    new.register_to_config(scaling_factor=PIPELINE_SCALING)
    return new


def train_plain(pool: Pool, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> PlainSR:
    """The trained plain network (averaged weights, fp32, CPU): least absolute error."""
    torch.manual_seed(seed + 11)
    net = PlainSR()

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 11, step)
        pictures = pool.pictures[torch.randint(len(pool.pictures), (PLAIN_BATCH,), generator=generator)]
        out = net(shrink(pictures).to(accelerator.device))
        return (out.float() - to_float(pictures).to(accelerator.device)).abs().mean()

    averages = Stage("sr-plain", folder, {"net": net}, steps, PLAIN_LEARNING_RATE, accelerator).run(loss)
    trained = PlainSR()
    trained.load_state_dict(averages["net"])
    return trained.eval()


def train_sr(
    pool: Pool, small: StableDiffusionPipeline, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> StableDiffusionUpscalePipeline:
    """emoji-sd-small's U-Net, trained on to see the small picture (averaged weights, fp32, CPU), as a pipeline."""
    torch.manual_seed(seed + 12)
    mean, deviation = encode_pool(pool, small.vae, folder)
    alphas, noises = small.scheduler.alphas_cumprod, build_low_res_scheduler()
    unet, text_encoder = widen(small.unet), small.text_encoder.to(accelerator.device).eval().requires_grad_(False)
    plain_attention(unet)
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(text: str) -> Tensor:
        if text not in known:
            tokens = small.tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt").input_ids
            known[text] = text_encoder(tokens.to(accelerator.device)).last_hidden_state[0].bfloat16()
        return known[text]

    def loss(step: int) -> Tensor:
        generator, rng = step_generator(seed + 12, step), np.random.default_rng([seed, step, 12])
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        latents = mean[index].float() + deviation[index].float() * torch.randn(mean[index].shape, generator=generator)
        low = shrink(pool.pictures[index])
        levels = torch.randint(MOST_NOISE + 1, (BATCH,), generator=generator)
        low = noises.add_noise(low, torch.randn(low.shape, generator=generator), levels)
        dropped = (torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT).tolist()
        said = ["" if drop else caption for drop, caption in zip(dropped, pool.captions(index, rng), strict=True)]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = draw_timesteps(len(alphas), generator, 1.0)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        latents, low, noise, timesteps, alpha, levels = (
            each.to(accelerator.device) for each in (latents, low, noise, timesteps, alpha, levels)
        )
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        hidden = torch.stack([read(each) for each in said]).float()
        out = unet(torch.cat([noisy, low], dim=1), timesteps, hidden, class_labels=levels).sample
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return (loss_weight(alpha, 1.0) * (out.float() - v).square()).mean()

    averages = Stage("sr", folder, {"unet": unet}, steps, LEARNING_RATE, accelerator).run(loss)
    trained = widen(small.unet)
    trained.load_state_dict(averages["unet"])
    return build_pipeline(small, trained.eval())


def build_pipeline(small: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionUpscalePipeline:
    """The U-Net with the other parts of `small`, on the CPU."""
    return StableDiffusionUpscalePipeline(
        vae=rescaled(small.vae),
        text_encoder=small.text_encoder.requires_grad_(True),
        tokenizer=small.tokenizer,
        unet=unet,
        low_res_scheduler=build_low_res_scheduler(),
        scheduler=small.scheduler,
        max_noise_level=MOST_NOISE,
    ).to("cpu")


def generate(
    pipe: StableDiffusionUpscalePipeline, low: Sequence[Image.Image], prompts: Sequence[str], guidance: float, steps: int = 50
) -> list[Image.Image]:
    """The small pictures enlarged, picture i from seed i."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    starts = range(0, len(low), measuring.BATCH)
    for begin in track(starts, f"{len(low)} pictures", console=console, disable=not console.is_terminal):
        part = list(low[begin : begin + measuring.BATCH])
        generators = [torch.Generator().manual_seed(begin + i) for i in range(len(part))]
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "noise_level": NOISE_LEVEL}
        images += pipe(list(prompts[begin : begin + len(part)]), image=part, generator=generators, **call).images
    return images


@torch.no_grad()
def evaluate(
    pipe: StableDiffusionUpscalePipeline, plain: PlainSR, vae: AutoencoderKL, judge: Judge, held_out: Pool, out: Path, guidance: float
) -> dict[str, Any]:
    """Figures for the pictures of `held_out` made 16 x 16 and enlarged again, by every way; a grid goes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    true, prompts = held_out.pictures, captions_of(held_out)
    low = shrink(true)
    small = to_images(to_bytes(low))
    began = time.perf_counter()
    drawn = generate(pipe, small, prompts, guidance)
    seconds = time.perf_counter() - began
    ways = {
        "emoji-sr": drawn,
        "emoji-sr without text": generate(pipe, small, [""] * len(small), 1.0),
        "plain network": to_images(to_bytes(plain(low))),
        "bicubic": to_images(to_bytes(bicubic(low))),
        "through the autoencoder": to_images(round_trip(vae, true)),
        "true picture": to_images(true),
    }
    features = judge.features(ways["true picture"])
    rows = {}
    for name, images in ways.items():
        shares = {field: row["share"] for field, row in measuring.tally(judge.score(images, prompts)).items()}
        rows[name] = {
            "psnr_db": round(psnr(from_images(images), true), 2),
            "psnr_small_db": round(psnr(to_bytes(shrink(from_images(images))), to_bytes(low)), 2),
            "frechet": round(frechet(judge.features(images), features), 3),
            "scores": shares,
        }
        console.print(f"{name}: {rows[name]}", highlight=False)
    shown = [ways["bicubic"], ways["plain network"], drawn, ways["true picture"]]
    grid = [im for i in range(24) for im in (row[i] for row in shown)] if len(drawn) >= 24 else [row[0] for row in shown]
    measuring.grid(grid, ["bicubic", "plain network", "emoji-sr", "true picture"] * (len(grid) // 4), 8).save(out / "held-out.png")
    return {"pictures": len(true), "steps": 50, "guidance": guidance, "seconds_per_picture": round(seconds / len(true), 2), "ways": rows}


def captions_of(pool: Pool) -> list[str]:
    """One caption a picture, which says everything."""
    return [scenes.caption(decode_labels(row)) for row in pool.labels.tolist()]


def part_of(pool: Pool, which: slice) -> Pool:
    """Some of its pictures."""
    return Pool(pool.pictures[which], pool.labels[which], pool.centers[which])


def sweep_guidance(pipe: StableDiffusionUpscalePipeline, judge: Judge, others: Pool) -> dict[float, dict[str, float]]:
    """PSNR in dB and the judge's shares for several guidance scales, on other pictures than `evaluate`."""
    prompts, small = captions_of(others), to_images(to_bytes(shrink(others.pictures)))
    found = {}
    for guidance in GUIDANCES:
        images = generate(pipe, small, prompts, guidance)
        shares = {field: row["share"] for field, row in measuring.tally(judge.score(images, prompts)).items()}
        found[guidance] = {"psnr_db": round(psnr(from_images(images), others.pictures), 2), **shares}
        console.print(f"guidance {guidance}: {found[guidance]}", highlight=False)
    return found


CARD = (
    """# emoji-sr

A small real super-resolution checkpoint: a standard `StableDiffusionUpscalePipeline` that makes pictures of 16 x 16 pixels, of one emoji on
a plain background, four times as large. Beside it lies a plain network for the same (`plain_sr/`). It was trained by diffgraft's own
script, from emoji-sd-small, to try plugins on super-resolution without a download and without a GPU. It is not meant for anything else.

```python
from diffusers import StableDiffusionUpscalePipeline

pipe = StableDiffusionUpscalePipeline.from_pretrained("path/to/emoji-sr")
image = pipe("a small apple on the left on a blue background", image=picture, guidance_scale={guidance}, noise_level={noise_level},
             num_inference_steps=50).images[0]
```

```python
from diffgraft_checkpoints.emoji.plain_sr import load

enlarged = load("path/to/emoji-sr")(pixels)   # (N, 3, 16, 16) in -1..1 -> (N, 3, 64, 64)
```

The picture: 16 x 16 pixels, each the mean of 4 x 4. Prompts: those of emoji-sd with one object; "" works too. `noise_level`: 0 to
{most_noise}. `load_pipeline("emoji-sr")` knows noise level, guidance and a
start picture (`start.png`, the one of emoji-edit, 16 x 16), so it can be called with a prompt alone.

## Figures on held-out combinations

{pictures} pictures of combinations of object, background, size and place that were never shown in training, made 16 x 16 and enlarged
again; {steps}-step DDIM, guidance {guidance}, noise level {noise_level}, picture i with seed i, fp16 weights loaded as fp32, judged by
the judge of emoji-sd:

| | PSNR | PSNR at 16 x 16 | Frechet | object | background | size | place | all four |
|---|---|---|---|---|---|---|---|---|
{ways}

- PSNR: to the true picture, in dB. A network that is trained on the error alone (the plain one) gives the mean of what the picture may have
  been, which is best in PSNR and blurred; emoji-sr draws one that it may have been.
- PSNR at 16 x 16: of the enlarged picture made small again, to the picture that was given.
- Frechet: distance of judge features to those of the true pictures.
- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on {tried} other held-out pictures:

| guidance | PSNR | object | background | size | place | all four |
|---|---|---|---|---|---|---|
{sweep}

"""
    + cards.MADE
    + """
- Data: {scene_count} upright scenes of one object, as in the later stages of emoji-sd.
- U-Net: emoji-sd-small's, trained on, with three input channels more for the small picture and a table of its noise levels, which begin at
  zero; AdamW (learning rate 1e-3, cosine), batch 64, bf16 autocast, averaged weights (.998); v-prediction, uniform timesteps, the error of
  the clean latents weighted by clamp(10 SNR, 1, 20); 10 % of the captions dropped; noise levels 0 to {most_noise}, evenly.
- Plain network: {plain} M parameters, residual layers at 16 x 16 and a pixel shuffle beside bicubic; least absolute error, batch 32.
- Text encoder and autoencoder: emoji-sd-small's, unchanged. The pipeline writes the scaling factor .08333 over the autoencoder's own, so
  the last layer of the encoder and the first of the decoder are multiplied to make up for it; the scaled latents are those of emoji-sd.

## Limits

One object a picture, from 16 x 16 pixels; softer than the artwork, as everything that comes through the autoencoder. The judge is more
lenient than a person about fine detail, so look at the pictures too.

"""
)


def emoji_sr(
    out: Out,
    steps: Steps = 3000,
    steps_plain: Steps = 3000,
    base: Base = Path(emoji_sd_small.path),
    scenes: Scenes = 24_000,
    seed: Seed = 0,
    device: Device = "auto",
    pictures: Pictures = 256,
) -> None:
    """Train emoji-sd-small on to enlarge pictures, and a plain network for the same; export, measure."""
    accelerator, small = start(base, device)
    pool = load_scenes(out, scenes, seed, upright=True)
    state = out / "state" / "upright"
    plain = train_plain(pool, state, steps_plain, seed, accelerator).cpu()
    pipe = train_sr(pool, small, state, steps, seed, accelerator)
    exporting.export(out / NAME, pipe)
    plain.half().save_pretrained(out / NAME / "plain_sr")
    options = {"": steps, "plain": steps_plain}
    recipe = describe(NAME, pipe, state, ("sr-plain", "sr"), options, scenes, seed, device)
    recipe["parameters"]["plain_sr"] = sum(p.numel() for p in plain.parameters())
    write_recipe(out, NAME, recipe)
    measure_sr(out, pictures, base, seed=seed)


def measure_sr(
    out: Out,
    pictures: Pictures = 256,
    base: Base = Path(emoji_sd_small.path),
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure OUT/emoji-sr on held-out pictures; write its model card, and a picture grid to OUT/grids-emoji-sr."""
    folder = out / NAME
    judge = load_bundled()
    pipe = StableDiffusionUpscalePipeline.from_pretrained(folder, local_files_only=True)
    plain = PlainSR.from_pretrained(folder / "plain_sr", local_files_only=True).eval()
    vae = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True, upright=True)
    sweep = sweep_guidance(pipe, judge, part_of(held_out, slice(-SWEEP_PICTURES, None)))
    best = max(GUIDANCES, key=lambda guidance: sum(sweep[guidance][field] for field in FIELDS))
    result = evaluate(pipe, plain, vae, judge, part_of(held_out, slice(pictures)), out / f"grids-{NAME}", best)
    recipe = read_recipe(out, NAME)
    tried = [{"guidance": guidance, **row} for guidance, row in sweep.items()]
    exporting.save_figures(folder, {"recipe": recipe, "judge": judge.config.accuracy, **result, "guidance_sweep": tried})
    fields = (*FIELDS, "all four")
    card = (cards.head("image-to-image") + CARD + cards.LICENCE).format(
        **exporting.recipe_values(recipe),
        notes=exporting.remarks(notes.read_text() if notes else ""),
        pictures=result["pictures"],
        steps=result["steps"],
        guidance=best,
        noise_level=NOISE_LEVEL,
        most_noise=MOST_NOISE,
        seconds=result["seconds_per_picture"],
        tried=SWEEP_PICTURES,
        plain=round(recipe["parameters"]["plain_sr"] / 1e6, 2),
        ways="\n".join(
            cards.table_row(
                name, [*(str(row[k]) for k in ("psnr_db", "psnr_small_db", "frechet")), *(cards.percent(row["scores"][f]) for f in fields)]
            )
            for name, row in result["ways"].items()
        ),
        sweep="\n".join(
            cards.table_row(str(scale), [f"{row['psnr_db']} dB", *(cards.percent(row[name]) for name in fields)])
            for scale, row in sweep.items()
        ),
    )
    (folder / "README.md").write_text(card)
