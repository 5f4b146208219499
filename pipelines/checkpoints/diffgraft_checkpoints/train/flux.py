"""emoji-flux: a Flux transformer and its two text encoders, trained jointly by flow matching on latents of the pool.

The autoencoder, the CLIP tokenizer, the judge and the scenes are those of emoji-sd.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge, load_bundled
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, step_generator
from .pool import Pairs, Pool
from .recipe import BASE, Base, Device, Out, Prompts, Scenes, Seed, Steps, describe, start, write_recipe
from .unet import (
    BATCH,
    CAPTION_DROPOUT,
    LEARNING_RATE,
    POSITIONS,
    SLOPE,
    TEXT_WIDTH,
    Encoded,
    build_text_encoder,
    draw_batch,
    encode_pool,
    loss_weight,
    slope_at,
)

NAME = "emoji-flux"
TOKENS = 20
"""Tokens of a prompt for the T5 encoder (the longest caption has 18); all see each other, so a call must pad to the same number."""
CALL: dict[str, Any] = {"height": scenes.SIZE, "width": scenes.SIZE, "max_sequence_length": TOKENS}
"""What every call needs: `FluxPipeline` would draw 512 x 512 pixels and pad the prompt to 512 tokens."""
HEADS, HEAD_SIZE = 5, 32
HALF_EVERY = 5
"""Every so many steps a batch of scenes at half the size."""
PAIRS_FROM = 0.3
"""Share of the steps after which pairs join the single objects."""
HALF_SIZE_PROMPTS = 96
GUIDANCES = (1.0, 1.5, 2.0, 3.0)


# --- parts -----------------------------------------------------------------------------------------------------------


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flux's flow matching with its shift by resolution: 3 at 64 x 64 pixels (64 tokens), 1.5 at half that size (16 tokens).

    Background and place are decided while the noise is at 90 % and more; without a shift few steps would be spent there.
    """
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=round(math.log(1.5), 4),
        max_shift=round(math.log(3), 4),
        base_image_seq_len=16,
        max_image_seq_len=64,
    )


def build_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with the words of the captions as its pieces, and small letters for what is none of them."""
    said = (*scenes.OBJECTS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.PLACES, *scenes.PLACE_PHRASES.values(), "a an and with background")
    words = sorted({f"▁{word}" for phrase in said for word in phrase.split()})
    rest = ("▁", ",", *string.ascii_lowercase)
    pieces = [*((special, 0.0) for special in ("<pad>", "</s>", "<unk>")), *((word, -1.0) for word in words), *((c, -10.0) for c in rest)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def build_text_encoder_2(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """An untrained Flux transformer of two double and four single blocks for 16 x 16 x 4 latents, packed to 64 tokens of 16 channels.

    The modulations and the output start at zero, which diffusers does not do: each block begins as the identity (Peebles & Xie 2022).
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    zero: list[nn.Linear] = [transformer.norm_out.linear, transformer.proj_out]
    for double in transformer.transformer_blocks:
        zero += [double.norm1.linear, double.norm1_context.linear]
    zero += [single.norm.linear for single in transformer.single_transformer_blocks]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


class TrainingAttention:
    """`FluxAttnProcessor` written for training in bf16 on a CPU, where it takes a quarter off the time of a step.

    The rotation is a product with a constant matrix instead of strided copies, the attention plain matrix products (the backward pass of
    PyTorch's own in bf16 is slow there).
    """

    def __init__(self, head_size: int = HEAD_SIZE) -> None:
        even = torch.arange(0, head_size, 2)
        self.quarter_turn = torch.zeros(head_size, head_size)
        self.quarter_turn[even + 1, even], self.quarter_turn[even, even + 1] = -1.0, 1.0

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]

        def heads(of_text: nn.Linear | None, of_image: nn.Linear, norms: tuple[nn.Module, nn.Module] | None) -> Tensor:
            parts = [] if of_text is None else [of_text(encoder_hidden_states)]
            parts = [part.unflatten(-1, (-1, attn.head_dim)) for part in (*parts, of_image(hidden_states))]
            if norms is not None:
                parts = [normed(part, norm) for part, norm in zip(parts, norms[-len(parts) :], strict=True)]
            return torch.cat(parts, dim=1)

        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (None,) * 3
        query = heads(of_text[0], attn.to_q, (attn.norm_added_q if text else attn.norm_q, attn.norm_q))
        key = heads(of_text[1], attn.to_k, (attn.norm_added_k if text else attn.norm_k, attn.norm_k))
        value = heads(of_text[2], attn.to_v, None).transpose(1, 2)
        query, key = (self.turn(each, image_rotary_emb).transpose(1, 2) for each in (query, key))
        shares = (query * attn.head_dim**-0.5 @ key.mT).softmax(dim=-1).to(value.dtype)
        hidden_states = (shares @ value).transpose(1, 2).flatten(2)
        if not text:
            return hidden_states
        return attn.to_out[0](hidden_states[:, text:]), attn.to_add_out(hidden_states[:, :text])

    def turn(self, x: Tensor, by: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotary embedding of (N, tokens, heads, head size)."""
        if by is None:
            return x
        cos, sin = (each[:, None].to(x.dtype) for each in by)
        return x * cos + (x @ self.quarter_turn.to(x)) * sin


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`torch.nn.RMSNorm` with the mean in fp32 and the rest in the precision of `x`."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps).to(x.dtype) * norm.weight.to(x.dtype)


# --- training --------------------------------------------------------------------------------------------------------

Averages = dict[str, dict[str, Tensor]]


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


def build_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, averages: Averages) -> FluxPipeline:
    """The pipeline with these averaged weights, on the CPU in fp32."""
    tokenizer_2 = build_tokenizer()
    parts = {
        "transformer": build_transformer(),
        "text_encoder": build_text_encoder(tokenizer),
        "text_encoder_2": build_text_encoder_2(tokenizer_2),
    }
    for name, part in parts.items():
        part.load_state_dict(averages[name])
        part.eval()
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, None or not
    return FluxPipeline(vae=vae.cpu(), tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=build_scheduler(), **parts)


def export(folder: Path, pipe: FluxPipeline) -> None:
    """Replace `folder` by the checkpoint in fp16; `pipe` is fp32 afterwards as before."""
    with exporting.replacing(folder) as fresh:
        pipe.to(dtype=torch.float16).save_pretrained(fresh)
        pipe.to(dtype=torch.float32)
        for name in ("text_encoder", "text_encoder_2"):
            exporting.load_as_fp32(fresh / name / "config.json")
        pipe.tokenizer.backend_tokenizer.model.save(str(fresh / "tokenizer"))


# --- measuring -------------------------------------------------------------------------------------------------------


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


CARD = """# emoji-flux

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

{notes}## Recipe

Command: `{command}`

| stage | steps | time |
|---|---|---|
{stages}

Hardware: {hardware}. Versions: {versions}. Parameters: {parts}.

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


# --- commands --------------------------------------------------------------------------------------------------------


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
    accelerator, pools, sd = start(out, base, scenes, seed, device)
    pipe = train_flux(pools, sd.vae, sd.tokenizer, out / "state", steps, seed, accelerator)
    export(out / NAME, pipe)
    write_recipe(out, NAME, describe(NAME, pipe, out / "state", ("flux",), {"": steps}, scenes, seed, device))
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
    recipe = json.loads((out / f"recipe-{NAME}.json").read_text())
    text = notes.read_text() if notes else ""
    half = min(HALF_SIZE_PROMPTS, prompts)
    exporting.write_card(folder, cards.HEAD + CARD + cards.LICENCE, recipe, judge, result, text, tokens=TOKENS, half_size_prompts=half)
    for name in ("scores", "pairs", "half_size"):
        console.print(f"{name}: { {field: row['share'] for field, row in result[name].items()} }", highlight=False)
