"""emoji-flux: a Flux transformer and its two text encoders, trained jointly by flow matching on latents of the pool.

The autoencoder, the CLIP tokenizer, the judge and the scenes are those of emoji-sd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge, load_bundled
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, step_generator
from .flux_model import (
    TOKENS,
    TrainingAttention,
    build_pipeline,
    build_scheduler,
    build_text_encoder_2,
    build_tokenizer,
    build_transformer,
    export,
)
from .pool import Pairs, Pool
from .recipe import BASE, Base, Device, Out, Prompts, Scenes, Seed, Steps, describe, load_data, read_recipe, start, write_recipe
from .unet import (
    BATCH,
    CAPTION_DROPOUT,
    LEARNING_RATE,
    POSITIONS,
    SLOPE,
    Encoded,
    build_text_encoder,
    draw_batch,
    encode_pool,
    loss_weight,
    slope_at,
)

NAME = "emoji-flux"


CALL: dict[str, Any] = {"height": scenes.SIZE, "width": scenes.SIZE, "max_sequence_length": TOKENS}
"""What every call needs: `FluxPipeline` would draw 512 x 512 pixels and pad the prompt to 512 tokens."""


HALF_EVERY = 5
"""Every so many steps a batch of scenes at half the size."""


PAIRS_FROM = 0.3
"""Share of the steps after which pairs join the single objects."""


HALF_SIZE_PROMPTS = 96


GUIDANCES = (1.0, 1.5, 2.0, 3.0)


def train_flux(
    pools: Sequence[Pool | Pairs],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    folder: Path,
    steps: int,
    seed: int,
    accelerator: Accelerator,
) -> FluxPipeline:
    """The pipeline of the trained transformer and text encoders (averaged weights, fp32, CPU)."""
    torch.manual_seed(seed + 3)
    tokenizer_2 = build_tokenizer()
    transformer, text_encoder, text_encoder_2 = build_transformer(), build_text_encoder(tokenizer), build_text_encoder_2(tokenizer_2)
    transformer.set_attn_processor(TrainingAttention())
    # the time reaches its embedding in the precision of the tokens, and bf16 cannot tell 998 from 1,000
    transformer.x_embedder.register_forward_hook(lambda module, arguments, out: out.float())
    modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    device = accelerator.device
    full = [(each, *encode_pool(each, vae, folder)) for each in pools]
    half = [(each, *encode_pool(shrink(each), vae, folder / "half")) for each in pools]

    @cache
    def tokenize(text: str) -> tuple[list[int], list[int]]:
        both = ((tokenizer, POSITIONS), (tokenizer_2, TOKENS))
        first, second = (each(text, padding="max_length", max_length=length, truncation=True).input_ids for each, length in both)
        return first, second

    def loss(step: int) -> Tensor:
        progress = step / steps
        generator, rng = step_generator(seed + 3, step), np.random.default_rng([seed, step, 3])
        latents, captions = draw_batch(choose_pools(step, progress, full, half), generator, rng)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        tokens = [tokenize("" if d else c) for c, d in zip(captions, dropped.tolist(), strict=True)]
        ids, ids_2 = (torch.tensor(each).to(device) for each in zip(*tokens, strict=True))
        latents += slope_at(progress) * slope(latents.shape[-1])
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = draw_sigmas(latents.shape[-1], generator, progress)
        sigma = sigmas.view(-1, 1, 1, 1)
        out = transformer(
            pack(latents.lerp(noise, sigma)).to(device),
            encoder_hidden_states=text_encoder_2(ids_2).last_hidden_state,
            pooled_projections=text_encoder(ids).pooler_output,
            timestep=sigmas.to(device),
            img_ids=places(latents.shape[-1]).to(device),
            txt_ids=torch.zeros(TOKENS, 3, device=device),
            return_dict=False,
        )[0]
        error = (out.float() - pack(noise - latents).to(device)).square().mean(dim=(1, 2))
        return (flow_weight(sigmas, progress).to(device) * error).mean()

    averages = Stage("flux", folder, modules, steps, LEARNING_RATE, accelerator).run(loss)
    return build_pipeline(vae, tokenizer, averages)


def choose_pools(step: int, progress: float, full: list[Encoded], half: list[Encoded]) -> list[Encoded]:
    """Where this step's batch comes from: single objects, later pairs too; every fifth batch at half the size."""
    chosen = half if step % HALF_EVERY == HALF_EVERY - 1 else full
    return chosen if progress >= PAIRS_FROM else chosen[:1]


def shrink(pool: Pool | Pairs) -> Pool | Pairs:
    """The same scenes, at half the size."""
    pictures = torch.cat([F.avg_pool2d(part.float(), 2).round().byte() for part in pool.pictures.split(2000)])
    return Pool(pictures, pool.labels, pool.centers) if isinstance(pool, Pool) else Pairs(pictures, pool.labels)


def slope(side: int) -> Tensor:
    """`SLOPE` for latents of `side` x `side`."""
    return F.adaptive_avg_pool2d(SLOPE, side)


def pack(latents: Tensor) -> Tensor:
    """(N, 4, side, side) as the pipeline's tokens (N, side² / 4, 16)."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


@cache
def places(side: int) -> Tensor:
    """Row and column of the tokens of latents of `side` x `side`, as the pipeline numbers them."""
    return FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)


def draw_sigmas(side: int, generator: torch.Generator, progress: float) -> Tensor:
    """(BATCH,) shares of noise, spread evenly, in random order, over the steps of a sampler.

    With the scheduler's shift in the first half of the training; with its square root, denser in the middle, in the second.
    """
    config = build_scheduler().config
    lengths = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    shift = math.exp(calculate_shift(side**2 // 4, *lengths) * (1.0 if progress < 0.5 else 0.5))
    u = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
    return shift * u / (1 + (shift - 1) * u)


def flow_weight(sigma: Tensor, progress: float) -> Tensor:
    """The weight of the velocity's squared error that treats the error of the clean latents as `unet.loss_weight` does, which is for v.

    That error is sigma² times the velocity's and (1 - alpha) times v's, with alpha at the same signal-to-noise ratio.
    """
    power = (1 - sigma).square() + sigma.square()
    return loss_weight((1 - sigma).square() / power, progress) * power


class Guided:
    """A `FluxPipeline` that is called as `evaluate` calls Stable Diffusion: guidance against the empty prompt, our size and length."""

    def __init__(self, pipe: FluxPipeline, side: int = scenes.SIZE) -> None:
        self.pipe = pipe
        self.call = {**CALL, "height": side, "width": side}
        self.set_progress_bar_config = pipe.set_progress_bar_config

    def __call__(self, prompts: list[str], num_inference_steps: int, guidance_scale: float, generator: list[torch.Generator]) -> Any:
        guidance = {"negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance_scale}
        return self.pipe(prompts, num_inference_steps=num_inference_steps, generator=generator, **guidance, **self.call)


def evaluate(folder: Path, judge: Judge, out: Path, count: int, guidance: float) -> dict[str, Any]:
    """Figures for `count` held-out combinations, held-out pairs, and for half the size; grids go to `out`."""
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    result = measuring.evaluate(Guided(pipe), judge, out, count, guidance)
    few = [scenes.caption(each) for each in measuring.held_out_labels()[: min(count, HALF_SIZE_PROMPTS)]]
    small = measuring.generate(Guided(pipe, scenes.SIZE // 2), few, range(len(few)), guidance)
    measuring.grid(small[:64], few[:64]).save(out / "half-size.png")
    return {**result, "half_size": measuring.tally(judge.score(small, few))}


CARD = (
    """# emoji-flux

A small real text-to-image checkpoint: a standard `FluxPipeline` (double and single blocks, packed latents, flow matching, a CLIP and
a T5 text encoder) that draws 64 x 64 pictures of one or two emoji on a plain background. Its prompts say things that can be
measured exactly; how well it follows each is in the tables below. It was trained from scratch by diffgraft's own script, to try
plugins on real pictures without a download and without a GPU. It is not meant for anything else.

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("path/to/emoji-flux")
image = pipe(
    "a small apple on the left on a blue background",
    negative_prompt="", true_cfg_scale={guidance},
    height=64, width=64, max_sequence_length={tokens}, num_inference_steps=50,
).images[0]
```

`height`, `width` and `max_sequence_length` must be given: the pipeline's own defaults are 512 pixels and 512 tokens, and the
transformer has only ever seen {tokens} tokens of text. 32 x 32 pixels work too. There is no embedded guidance
(`guidance_scale` does nothing); `true_cfg_scale` with `negative_prompt=""` guides.

Prompts, in small letters: "a {{size}} {{object}} {{place}} on a {{background}} background" (size, place and background may be left
out), and two objects opposite each other: "a cat face on the left and a star on the right on a blue background".

- objects: {objects}
- backgrounds: red, orange, yellow, green, blue, purple, pink, gray
- sizes: small, big
- places: "on the left", "on the right", "at the top", "at the bottom", "in the center"

## Figures on held-out prompts

{held_out} of the {total} combinations of object, background, size and place were never shown in training. {prompts} of
them, 50 steps, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32, judged by the judge of emoji-sd:

| one object | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

{pair_prompts} prompts with two objects, from the {pairs_held_out} pairs of objects that no training picture shows together; a field is
right when it is right for both:

| two objects | right | share | 95 % Wilson interval |
|---|---|---|---|
{pairs}

The first {half_size_prompts} of the prompts with one object at 32 x 32 pixels:

| 32 x 32 | right | share | 95 % Wilson interval |
|---|---|---|---|
{half_size}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity}
  between true renders of one caption.
- Frechet distance of judge features to true renders of the same captions: {frechet} ({true_frechet} between two sets of
  true renders).
- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on other held-out combinations (64 prompts):

| guidance | object | background | size | place | all four |
|---|---|---|---|---|---|
{sweep}

"""
    + cards.MADE
    + """
- Autoencoder, judge and scenes: those of emoji-sd; {scene_count} scenes of one object, {pair_count} of two.
- Transformer and both text encoders: trained jointly from scratch, AdamW (learning rate 1e-3, cosine), batch 64, bf16 autocast, 10 %
  caption dropout, averaged weights (.998). Every fifth batch shows the scenes at 32 x 32 pixels; pairs join after 30 % of the steps.
- Flow matching. The error of the clean latents is weighted as in emoji-sd: clamp(SNR, 1, 5) in the first half, clamp(10 SNR, 1, 20) in the
  second. Noise levels: evenly over a sampler's steps with the scheduler's shift (3 at 64 x 64, 1.5 at 32 x 32), with its square root in the
  second half.
- Between 15 and 40 % of the steps the training latents carry a slope (brighter to the right and to the bottom, fading out), as in emoji-sd.

## Limits

One or two objects a picture; only the words above; softer than the artwork (small objects most of all). The judge sees what it was
trained on: it is more lenient than a person about fine detail, so look at the pictures too.

"""
)


def emoji_flux(
    out: Out,
    steps: Steps = 7000,
    base: Base = BASE,
    scenes: Scenes = 40_000,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Prompts = 160,
) -> None:
    """Train transformer and text encoders on the latents of emoji-sd's autoencoder, export, measure."""
    accelerator, sd = start(base, device)
    pipe = train_flux(load_data(out, scenes, seed), sd.vae, sd.tokenizer, out / "state", steps, seed, accelerator)
    export(out / NAME, pipe)
    write_recipe(out, NAME, describe(NAME, pipe, out / "state", ("flux",), {"": steps}, scenes, seed, device, pairs=True))
    measure_flux(out, prompts)


def measure_flux(
    out: Out,
    prompts: Prompts = 160,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Measure OUT/emoji-flux on held-out prompts; write its model card, and picture grids to OUT/grids-emoji-flux."""
    folder = out / NAME
    judge = load_bundled()
    guided = Guided(FluxPipeline.from_pretrained(folder, local_files_only=True))
    sweep = measuring.sweep_guidance(guided, judge, GUIDANCES)
    best = guidance or max(GUIDANCES, key=lambda g: sum(sweep[str(g)][name] for name in FIELDS))
    result = {**evaluate(folder, judge, out / f"grids-{NAME}", prompts, best), "guidance_sweep": sweep}
    recipe = read_recipe(out, NAME)
    text = notes.read_text() if notes else ""
    half = min(HALF_SIZE_PROMPTS, prompts)
    exporting.write_card(folder, cards.HEAD + CARD + cards.LICENCE, recipe, judge, result, text, tokens=TOKENS, half_size_prompts=half)
    for name in ("scores", "pairs", "half_size"):
        console.print(f"{name}: { {field: row['share'] for field, row in result[name].items()} }", highlight=False)
