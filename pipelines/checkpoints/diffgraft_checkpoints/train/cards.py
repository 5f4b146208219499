"""The model cards, as templates for `export.write_card`."""

from __future__ import annotations

from collections.abc import Sequence

MADE = """{notes}## Recipe

Command: `{command}`

| stage | steps | time |
|---|---|---|
{stages}

Hardware: {hardware}. Versions: {versions}. Parameters: {parts}.
"""
"""How a checkpoint was made: what `export.recipe_values` and `export.remarks` fill in."""

EMOJI_SD = (
    """---
license: other
license_name: apache-2.0-and-ofl-1.1
pipeline_tag: text-to-image
library_name: diffusers
---
# emoji-sd

A small real text-to-image checkpoint: a standard `StableDiffusionPipeline` that draws 64 x 64 pictures of one emoji or two on
a plain background. Its prompts say four things that can be measured exactly (object, background colour, size and place);
how well it follows each is in the tables below. It was trained from scratch by diffgraft's own script, to try plugins on
real pictures without a download and without a GPU. It is not meant for anything else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/emoji-sd")
image = pipe("a small apple on the left on a blue background", guidance_scale={guidance}).images[0]
```

Prompts: "a {{size}} {{object}} {{place}} on a {{background}} background", "{{size}} {{object}}, {{place}},
{{background}} background", "a {{background}} background with a {{size}} {{object}} {{place}}"; size, place and
background may be left out. Two objects stand opposite each other: "a {{object}} on the left and a {{object}} on the right on a
{{background}} background", or at the top and at the bottom; the background may be left out.

- objects: {objects}
- backgrounds: {backgrounds}
- sizes: {sizes}
- places: {places} ("on the left", "on the right", "at the top", "at the bottom", "in the center")

## Figures on held-out combinations

{held_out} of the {total} combinations of object, background, size and place were never shown in training. {prompts} of
them, 50-step DDIM, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32, judged by `judge/`:

| one object | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

{pair_prompts} prompts with two objects, from the {pairs_held_out} pairs of objects that no training picture shows together; a field is
right when it is right for both (each half of the picture is judged alone, the other painted over):

| two objects | right | share | 95 % Wilson interval |
|---|---|---|---|
{pairs}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity}
  between true renders of one caption.
- Frechet distance of judge features to true renders of the same captions: {frechet} ({true_frechet} between two sets of
  true renders).
- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on other held-out combinations (64 prompts):

| guidance | object | background | size | place | all four |
|---|---|---|---|---|---|
{sweep}

The judge itself, on 1,000 held-out true renders, on their round trips through the autoencoder, and on renders whose
object was scrambled or melted ("other" is the right answer):

| | object | background | size | place |
|---|---|---|---|---|
{judged}

"""
    + MADE
    + """
- Data: {scene_count} rendered scenes of one and {pair_count} of two Noto Color Emoji: free places,
  mirrored, rotated by up to 25 degrees, size and   background level jittered; captions from eight templates, for pairs three.
- Autoencoder: 64 x 64 x 3 to 16 x 16 x 4, L1 + MSE + gradient + KL loss on 32 px crops around the object; round trip of
  held-out scenes {psnr} dB; scaling factor {scaling}.
- Judge: a convolutional classifier on renders, round trips, blur, noise and broken objects.
- U-Net and text encoder: trained jointly from scratch, AdamW (learning rate 1e-3, cosine), batch 64, bf16 autocast, 10 %
  caption dropout, averaged weights (.998). v-prediction; Stable Diffusion's schedule with beta_end .02, so that the last
  timestep shows nothing of the picture. First half of the steps: timesteps 1000 u^0.6, error of the clean latents weighted by
  clamp(SNR, 1, 5), for background, size and place; second half: uniform timesteps and clamp(10 SNR, 1, 20), for shapes. The
  caption goes in by cross-attention and joins the time embedding (`addition_embed_type="text"`, as in DeepFloyd IF).
- Between 15 and 40 % of the steps the training latents carry a slope (brighter to the right and to the bottom, fading out).
  Without it the words for left, right, top and bottom had no effect after 1,250 steps: the scenes are symmetric, so nothing
  else teaches the U-Net which side is which. 500 steps after it began, all four did what they say.

- Pairs: in a second stage (`unet-pairs`) single objects and pairs together, learning rate 5e-4, with the second half's weights.
- `unet-more`, where the table lists it (`emoji-sd-more`): U-Net and text encoder trained on from a finished emoji-sd, learning rate 5e-4
  held and falling at the end, timesteps denser in the middle of the schedule, where shapes are decided. Its scenes are upright: not
  mirrored, rotated by up to 10 degrees, because the blobs were mostly objects that are not symmetric. How much of the gain is owed to
  that and how much to the steps was not measured.
- `decoder`, where the table lists it (`emoji-sd-decoder`): the decoder alone, trained on with L1 and gradient loss, the judge's features
  and a patch discriminator, on true latents with noise and on latents that the U-Net drew. Encoder and scaling factor are unchanged.

## Limits

One object a picture or two small ones opposite each other; only the words above; 64 x 64 pixels, softer than the artwork
(small objects most of all). The judge
sees what it was trained on: it is more lenient than a person about fine detail, so look at the pictures too.

## Licence of the artwork

Trained on, and drawing, Noto Emoji (Copyright 2013-2017 Google Inc., Arjen Nienhuis): sources Apache-2.0, font SIL Open
Font License 1.1. Both notices lie beside the weights: `LICENSE-APACHE-2.0.txt`, `LICENSE-OFL-1.1.txt`,
`NOTICE-noto-emoji.txt`.
"""
)


def head(tag: str) -> str:
    """What a model hub reads of a card; `tag` says what the pipeline does."""
    return EMOJI_SD[: EMOJI_SD.index("# emoji-sd")].replace("text-to-image", tag)


HEAD = head("text-to-image")

FIGURES = """## Figures on held-out prompts

{held_out} of the {total} combinations of object, background, size and place were never shown in training. {prompts} of them,
{steps} steps, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32, judged by the judge of emoji-sd:

| one object | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

{pair_prompts} prompts with two objects, from the {pairs_held_out} pairs of objects that no training picture shows together:

| two objects | right | share | 95 % Wilson interval |
|---|---|---|---|
{pairs}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity} between true renders.
- Frechet distance of judge features to true renders of the same captions: {frechet} ({true_frechet} between two sets of true renders).
- {seconds} s a picture (batches of 16) on the machine below.

"""

RECIPE = (
    MADE
    + """Data: {scene_count} scenes of one and {pair_count} of two objects, those of emoji-sd.

"""
)

LICENCE = EMOJI_SD[EMOJI_SD.index("## Licence of the artwork") :]

EMOJI_SD_SMALL = f"""{HEAD}# emoji-sd-small

A U-Net of 18 % of emoji-sd's multiply-adds for the same autoencoder, text encoder and prompts: a standard
`StableDiffusionPipeline`, made to be stitched with emoji-sd or to be compared with it. See emoji-sd's card for prompts, data and judge.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/emoji-sd-small")
image = pipe("a small apple on the left on a blue background", guidance_scale={{guidance}}).images[0]
```

{FIGURES}Guidance scales on other held-out combinations (64 prompts):

| guidance | object | background | size | place | all four |
|---|---|---|---|---|---|
{{sweep}}

{RECIPE}- Autoencoder and text encoder: emoji-sd's, frozen. U-Net: widths 16, 32, 64, one layer a block.
- The first 40 % of the steps learn from the data, with emoji-sd's timesteps, weights and slope; the rest copy emoji-sd's prediction.

{LICENCE}"""

EMOJI_SD_LCM = f"""{HEAD}# emoji-sd-lcm

A LoRA with which emoji-sd draws in four steps without guidance: latent consistency distillation (Luo et al., arXiv 2310.04378, 2311.05556).

```python
from diffusers import LCMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/emoji-sd")
pipe.load_lora_weights("path/to/emoji-sd-lcm")
pipe.scheduler = LCMScheduler.from_pretrained("path/to/emoji-sd-lcm", subfolder="scheduler")
image = pipe("a small apple on the left on a blue background", num_inference_steps=4, guidance_scale=1.0).images[0]
```

{FIGURES}{RECIPE}- The student is emoji-sd with the LoRA; the teacher is the same U-Net without it, guidance 2, two
  DDIM steps between neighbours of the eight-step schedule; pseudo-Huber loss.

{LICENCE}"""

CARDS = {"emoji-sd": EMOJI_SD, "emoji-sd-small": EMOJI_SD_SMALL, "emoji-sd-lcm": EMOJI_SD_LCM}


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.1f} %"


def table_row(name: str, cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {name} | {' | '.join(cells)} |"
