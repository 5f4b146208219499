"""emoji-pixel: an unconditional U-Net on 32 x 32 pixels, trained to predict the noise (Ho et al. 2020)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffgraft.methods.fitness import frechet
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from rich.progress import track
from torch import Tensor

from ..emoji import scenes
from ..emoji.judge import Judge, load_bundled
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, keep_freed_memory, make_accelerator, plain_attention, step_generator
from .flux import shrink
from .pool import Pool, draw_scene, from_images, load_rendered, to_float
from .recipe import Device, Out, Scenes, Seed, Steps, describe, needs_artwork, read_recipe, write_recipe
from .unet import LEARNING_RATE, draw_timesteps

NAME = "emoji-pixel"
SIDE = 32
"""Side of a picture in pixels."""
KINDS = (
    "panda", "pig", "frog", "ladybug", "apple", "carrot", "eggplant", "mushroom", "donut", "sunflower", "bus", "balloon", "soccer ball",
    "gift", "star", "heart",
)  # fmt: skip
"""Objects that it draws. Of all 64, a network of this size drew what the judge recognised in 31 % of its pictures."""
BATCH = 32
SAMPLERS: dict[str, tuple[type[DDPMPipeline] | type[DDIMPipeline], int]] = {"DDPM": (DDPMPipeline, 100), "DDIM": (DDIMPipeline, 50)}
"""What is measured: a pipeline for these weights and how many steps it takes."""
DRAWN_AT_ONCE = 32
SHOWN = 64
"""Pictures in a grid, and pictures among which the diversity is measured."""
Pictures = Annotated[int, typer.Option(min=2, help="Pictures to measure.")]


def draw_pixel_scene(seed: int, index: int, held_out: bool = False, upright: bool = True) -> scenes.Scene:
    """Scene `index` of the pool of `seed`, of one of `KINDS`."""
    found = draw_scene(seed, index, held_out, upright)
    kind = KINDS[int(np.random.default_rng([seed, index, 9]).integers(len(KINDS)))]
    return replace(found, labels=replace(found.labels, object=kind))


def load_pixel_scenes(out: Path, count: int, seed: int) -> Pool:
    """Training scenes of `KINDS`, rendered where they are not there yet."""
    with needs_artwork():
        return load_rendered(out / "pool" / f"pixel-{count}-{seed}.pt", draw_pixel_scene, count, seed, held_out=False, upright=True)


def build_unet() -> UNet2DModel:
    """An untrained U-Net of three levels; attention on the lowest, where it is cheap."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    """The linear schedule of Ho et al., prediction of the noise: diffusers' defaults."""
    return DDPMScheduler()


def noise_weight(alpha: Tensor) -> Tensor:
    """Weight of the noise's squared error: clamp(1 / SNR, 1, 10).

    Ho et al.'s plain error (1) hardly weights the noisiest timesteps, where the background and the place are decided. A first emoji-sd
    that was trained so drew the wrong colour; these weights put it right.
    """
    return ((1 - alpha) / alpha).clamp(1, 10)


def train_pixel(pool: Pool, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> UNet2DModel:
    """The trained U-Net (averaged weights, fp32, CPU)."""
    torch.manual_seed(seed + 9)
    pictures = shrink(pool).pictures
    alphas = build_scheduler().alphas_cumprod
    unet = build_unet()
    plain_attention(unet)

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 9, step)
        clean = to_float(pictures[torch.randint(len(pictures), (BATCH,), generator=generator)])
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(len(alphas), generator, step / steps, BATCH)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        clean, noise, timesteps, alpha = (each.to(accelerator.device) for each in (clean, noise, timesteps, alpha))
        out = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps).sample
        return (noise_weight(alpha) * (out.float() - noise).square()).mean()

    averages = Stage("pixel", folder, {"unet": unet}, steps, LEARNING_RATE, accelerator, decay=steps // 4).run(loss)
    trained = build_unet()
    trained.load_state_dict(averages["unet"])
    return trained.eval()


def generate(pipe: DDPMPipeline | DDIMPipeline, count: int, steps: int, seed: int = 0) -> list[Image.Image]:
    """`count` pictures of 32 x 32 pixels, picture i from seed `seed` + i."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    starts = range(0, count, DRAWN_AT_ONCE)
    for start in track(starts, f"{count} pictures", console=console, disable=not console.is_terminal):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(start, min(start + DRAWN_AT_ONCE, count))]
        images += pipe(batch_size=len(generators), generator=generators, num_inference_steps=steps).images
    return images


def true_pictures(count: int, seed: int) -> list[Image.Image]:
    """Renders as the training shows them, upright and at 32 x 32 pixels, but not those of the training."""
    return [scenes.render(draw_pixel_scene(seed, i)).reduce(scenes.SIZE // SIDE) for i in range(count)]


def nearest(images: Sequence[Image.Image], training: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture the RMS pixel distance (0..255) to its nearest training picture, and which that is; `training` is (M, 3, 32, 32)."""
    rows = from_images(images).flatten(1).float()
    distances = torch.cat([torch.cdist(rows, part.flatten(1).float()) for part in training.split(4000)], dim=1)
    found = distances.min(dim=1)
    return found.values / rows.shape[1] ** 0.5, found.indices


def recognised(judge: Judge, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What the judge, which knows 64 objects, sees: the share of pictures of one of `KINDS`, and how many different ones there are."""
    seen = [each["object"] for each in judge.predict(images)]
    objects = [name for name in seen if name in KINDS]
    return {"share": round(len(objects) / len(seen), 4), "objects": len(set(objects))}


def evaluate(folder: Path, judge: Judge, training: Tensor, out: Path, count: int) -> dict[str, Any]:
    """Figures for `count` pictures of each sampler, beside those of as many true renders; grids go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    true, other = (true_pictures(count, seed) for seed in (1001, 1002))
    reference = judge.features(true)

    def figures(images: Sequence[Image.Image]) -> dict[str, Any]:
        return {
            "frechet_to_renders": round(frechet(judge.features(images), reference), 3),
            "recognised": recognised(judge, images),
            "nearest_training_rms": round(float(nearest(images, training)[0].mean()), 2),
            "diversity_rms": round(measuring.rms_distance(images[:SHOWN]), 1),
        }

    result: dict[str, Any] = {"pictures": count, "true_renders": figures(other), "samplers": {}}
    for name, (cls, steps) in SAMPLERS.items():
        pipe = cls.from_pretrained(folder, local_files_only=True)
        began = time.perf_counter()
        images = generate(pipe, count, steps)
        seconds = round((time.perf_counter() - began) / count, 2)
        result["samplers"][name] = {"steps": steps, "seconds_per_picture": seconds, **figures(images)}
        console.print(f"{name}, {steps} steps: {result['samplers'][name]}", highlight=False)
        seen = [each["object"] for each in judge.predict(images[:SHOWN])]
        measuring.grid(images[:SHOWN], seen).save(out / f"{name.lower()}.png")
        if cls is DDPMPipeline:
            which = nearest(images[: SHOWN // 2], training)[1]
            beside = [each for i, im in enumerate(images[: SHOWN // 2]) for each in (im, to_image(training[which[i]]))]
            measuring.grid(beside, ["drawn", "nearest in training"] * (len(beside) // 2)).save(out / "nearest.png")
    return result


def to_image(picture: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a PIL picture."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


CARD = (
    """# emoji-pixel

A small real unconditional checkpoint: a standard `DDPMPipeline` (a U-Net on pixels, prediction of the noise) that draws 32 x 32 pictures
of one emoji on a plain background. It was trained from scratch by diffgraft's own script, to try plugins on a pixel model without a
download and without a GPU. It is not meant for anything else.

```python
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("path/to/emoji-pixel")
image = pipe(num_inference_steps=100).images[0]
```

`DDIMPipeline.from_pretrained` takes the same folder.

## Figures

{count} pictures of each sampler, picture i with seed i, fp16 weights loaded as fp32, beside as many true renders that are not in the
training. The judge is that of emoji-sd, which looks at all of them enlarged to 64 x 64:

| | steps | Frechet | the judge sees one of the {kinds} | different objects | nearest training picture | diversity |
|---|---|---|---|---|---|---|
{figures}

- Frechet: distance of judge features to those of true renders.
- "The judge sees one of the {kinds}": and not one of the 48 others that it knows, a scrambled one or a shapeless blob.
- Nearest training picture: mean RMS pixel difference (0..255) to the nearest of the {scene_count} training pictures, in `nearest.png` side
  by side. A model that repeats its training pictures would be far below the true renders; a blurred picture is a little nearer, too.
- Diversity: mean pairwise RMS pixel difference (0..255).
- Seconds a picture (batches of {batch}) on the machine below: {seconds}.

"""
    + cards.MADE
    + """
- Data: {scene_count} upright scenes of one object, as in the later stages of emoji-sd, averaged to 32 x 32 pixels. Objects:
  {names}.
- U-Net: widths 32, 64, 96, two layers a block, attention at 8 x 8; AdamW (learning rate 1e-3, falling in the last
  quarter), batch {batch_size}, bf16 autocast, averaged weights (.998). Ho et al.'s linear schedule; the error of the noise weighted by
  clamp(1 / SNR, 1, 10); timesteps 1000 u^0.6 in the first half of the steps, uniform in the second.

## Limits

One object a picture, of {kinds}, and no way to ask for one; 32 x 32 pixels. The judge was trained on 64 x 64 pictures and is more lenient
than a person about fine detail, so look at the pictures too.

"""
)


def emoji_pixel(
    out: Out,
    steps: Steps = 12_000,
    scenes: Scenes = 24_000,
    seed: Seed = 0,
    device: Device = "auto",
    pictures: Pictures = 512,
) -> None:
    """Train an unconditional U-Net on small pictures, export, measure."""
    keep_freed_memory()
    accelerator = make_accelerator(device)
    pool = load_pixel_scenes(out, scenes, seed)
    state = out / "state" / "upright"
    pipe = DDPMPipeline(unet=train_pixel(pool, state, steps, seed, accelerator), scheduler=build_scheduler())
    exporting.export(out / NAME, pipe)
    write_recipe(out, NAME, describe(NAME, pipe, state, ("pixel",), {"": steps}, scenes, seed, device))
    measure_pixel(out, pictures, scenes=scenes, seed=seed)


def measure_pixel(
    out: Out,
    pictures: Pictures = 512,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
    scenes: Scenes = 24_000,
    seed: Seed = 0,
) -> None:
    """Measure OUT/emoji-pixel; write its model card, and picture grids to OUT/grids-emoji-pixel."""
    folder = out / NAME
    judge = load_bundled()
    pool = load_pixel_scenes(out, scenes, seed)
    result = evaluate(folder, judge, shrink(pool).pictures, out / f"grids-{NAME}", pictures)
    recipe = read_recipe(out, NAME)
    exporting.save_figures(folder, {"recipe": recipe, **result})
    card = (cards.head("unconditional-image-generation") + CARD + cards.LICENCE).format(
        **exporting.recipe_values(recipe),
        notes=exporting.remarks(notes.read_text() if notes else ""),
        count=pictures,
        batch=DRAWN_AT_ONCE,
        kinds=len(KINDS),
        names=", ".join(KINDS),
        batch_size=BATCH,
        figures="\n".join(figure_row(name, row) for name, row in (*result["samplers"].items(), ("true renders", result["true_renders"]))),
        seconds=", ".join(f"{name} {row['seconds_per_picture']}" for name, row in result["samplers"].items()),
    )
    (folder / "README.md").write_text(card)


def figure_row(name: str, row: dict[str, Any]) -> str:
    """One sampler's figures as a row of the card."""
    seen = row["recognised"]
    cells = (
        name, row.get("steps", ""), row["frechet_to_renders"], f"{100 * seen['share']:.1f} %", seen["objects"], row["nearest_training_rms"],
        row["diversity_rms"],
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
