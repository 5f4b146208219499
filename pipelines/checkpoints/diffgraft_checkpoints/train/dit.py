"""emoji-dit: a class-conditional diffusion transformer (Peebles & Xie 2022) on the latents of emoji-sd; the labels are the objects.

It learns the variance of its steps beside the picture, as DiT and Nichol & Dhariwal's models do; `DiTPipeline` drops that half.
"""

from __future__ import annotations

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
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from ..emoji import scenes
from ..emoji.judge import Judge, load_bundled
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, plain_attention, step_generator
from .pool import Pool, load_pool, to_float
from .recipe import BASE, HELD_OUT_SCENES, Base, Device, Out, Scenes, Seed, Steps, describe, load_scenes, read_recipe, start, write_recipe
from .unet import BATCH, CAPTION_DROPOUT, LEARNING_RATE, build_scheduler, draw_timesteps, encode_pool, loss_weight

NAME = "emoji-dit"
BLOCKS, HEADS, HEAD_SIZE = 12, 4, 32
NULL = 1000
"""The label for "no label": `DiTPipeline` has it written in, so the tables have 1,001 rows though there are 64 objects."""
LABEL_SPREAD = 0.3
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0)
SWEEP_SEED = 50_000
Each = Annotated[int, typer.Option(min=2, help="Pictures of each object to measure.")]


def build_transformer() -> DiTTransformer2DModel:
    """An untrained transformer of 12 blocks for 16 x 16 x 4 latents (64 tokens), with two numbers a channel: v and its variance.

    Width 128 instead of the usual 192: diffusers gives every block its own embedding of time and label, which alone would be 7 MB there.
    The modulations and the output start at zero, which diffusers does not do: each block begins as the identity. The labels start about
    as large as the embedded time, to which they are added; diffusers' would drown it. Rows of labels that are no object are zero.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        in_channels=4,
        out_channels=8,
        num_layers=BLOCKS,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL,
        attention_bias=True,
    )
    zero: list[nn.Linear] = [
        transformer.proj_out_1,
        transformer.proj_out_2,
        *(block.norm1.linear for block in transformer.transformer_blocks),
    ]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            table = block.norm1.emb.class_embedder.embedding_table.weight
            nn.init.normal_(table, std=LABEL_SPREAD)
            table[len(scenes.OBJECTS) : NULL] = 0
    return transformer


def prepare(transformer: DiTTransformer2DModel) -> None:
    """Make `transformer` ready for training: in bf16 on a CPU, and with labels that are dropped for all blocks alike or for none."""
    plain_attention(transformer)
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # each block would drop labels by itself, with random numbers that no step owns
    # every block adds to the tokens in their own precision, and bf16 is too coarse for twelve of them
    transformer.pos_embed.register_forward_hook(lambda module, arguments, out: out.float())


class Variances:
    """What DiT's second half of the output means: where the variance of a step lies between its two extremes.

    The scheduler's steps q(x_{t-1} | x_t, x_0) have the mean c x_0 + c' x_t and the variance b~, the smaller extreme; the larger one is b
    (Ho et al. 2020, eq. 6 and 7). A number `spread` in -1..1 stands for b^f b~^(1 - f) with f = (spread + 1) / 2 (Nichol & Dhariwal 2021,
    eq. 15).
    """

    def __init__(self, alphas: Tensor) -> None:
        self.alphas = alphas
        """alphas_cumprod, one for each timestep."""
        before = torch.cat([torch.ones(1), alphas[:-1]])
        beta = 1 - alphas / before
        tilde = beta * (1 - before) / (1 - alphas)
        tilde[0] = tilde[1]  # the last step has no noise, and no variance to learn
        self.log_larger, self.log_smaller = beta.log(), tilde.log()
        self.weight_of_clean = beta * before.sqrt() / (1 - alphas)

    def bits(self, spread: Tensor, error: Tensor, timesteps: Tensor) -> Tensor:
        """KL(q || p) of a step in bits a number, like `spread` and `error` (N, 4, H, W): what the variance costs at this error of v."""
        larger, smaller, weight, alpha = (
            table.to(spread.device)[timesteps].view(-1, 1, 1, 1)
            for table in (self.log_larger, self.log_smaller, self.weight_of_clean, self.alphas)
        )
        log = smaller + (spread + 1) / 2 * (larger - smaller)
        apart = weight * (1 - alpha).sqrt() * error  # of the means: the error of the clean latents is sqrt(1 - alpha) times that of v
        return 0.5 * (log - smaller - 1 + ((smaller - log).exp() + apart.square() * (-log).exp())) / math.log(2)


def predict(
    transformer: DiTTransformer2DModel, alpha: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The error of v and the spread, both (N, 4, 16, 16) fp32, where `latents` are hidden by `noise`; `alpha` is (N, 1, 1, 1)."""
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    v, spread = transformer(noisy, timestep=timesteps, class_labels=labels).sample.float().chunk(2, dim=1)
    return v - (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents), spread


def train_dit(pool: Pool, vae: AutoencoderKL, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> DiTTransformer2DModel:
    """The trained transformer (averaged weights, fp32, CPU).

    Its loss is emoji-sd's for v, plus the cost of the variance, through which no gradient reaches v (Nichol & Dhariwal's L_hybrid).
    """
    torch.manual_seed(seed + 7)
    mean, deviation = encode_pool(pool, vae, folder)
    objects = pool.labels[:, 0]
    variances = Variances(build_scheduler().alphas_cumprod)
    transformer = build_transformer()
    prepare(transformer)

    def loss(step: int) -> Tensor:
        progress = step / steps
        generator = step_generator(seed + 7, step)
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        latents = draw_latents(mean[index], deviation[index], generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = draw_timesteps(len(variances.alphas), generator, progress)
        alpha = variances.alphas[timesteps].view(-1, 1, 1, 1)
        batch = (alpha, latents, noise, timesteps, torch.where(dropped, NULL, objects[index]))
        alpha, latents, noise, timesteps, labels = (each.to(accelerator.device) for each in batch)
        error, spread = predict(transformer, alpha, latents, noise, timesteps, labels)
        return (loss_weight(alpha, progress) * error.square()).mean() + variances.bits(spread, error.detach(), timesteps).mean()

    averages = Stage("dit", folder, {"transformer": transformer}, steps, LEARNING_RATE, accelerator).run(loss)
    trained = build_transformer()
    trained.load_state_dict(averages["transformer"])
    return trained.eval()


def draw_latents(mean: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of these posteriors, fp32."""
    return mean.float() + deviation.float() * torch.randn(mean.shape, generator=generator)


def build_pipeline(vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> DiTPipeline:
    """The parts as a pipeline whose labels have names (`pipe.get_label_ids(["apple"])`), also after saving and loading."""
    names = dict(enumerate(scenes.OBJECTS))
    pipe = DiTPipeline(transformer=transformer, vae=vae.cpu(), scheduler=build_scheduler(), id2label=names)
    pipe.register_to_config(id2label=names)
    return pipe


class Named:
    """A `DiTPipeline` that is called as `evaluate` calls Stable Diffusion: with prompts that name an object each, and nothing else."""

    def __init__(self, pipe: DiTPipeline) -> None:
        self.pipe = pipe
        self.set_progress_bar_config = pipe.set_progress_bar_config

    def __call__(self, prompt: list[str], **call: Any) -> Any:
        return self.pipe(class_labels=self.pipe.get_label_ids([scenes.parse_caption(each).object for each in prompt]), **call)


def true_pictures(objects: Sequence[str], seed: int) -> list[Image.Image]:
    """A render of each object, as the training shows them: upright, in a training combination."""
    shown: dict[str, list[scenes.Labels]] = {}
    for labels in scenes.split()[0]:
        shown.setdefault(labels.object, []).append(labels)
    pictures = []
    for i, name in enumerate(objects):
        rng = np.random.default_rng([seed, i, 7])
        labels = shown[name][int(rng.integers(len(shown[name])))]
        pictures.append(scenes.render(scenes.upright(scenes.sample_scene(labels, rng))))
    return pictures


@torch.no_grad()
def variance_bits(pipe: DiTPipeline, pool: Pool, seed: int = 0) -> dict[str, float]:
    """Bits a latent number that all 1,000 steps cost on `pool`, with the variance learned, and with each extreme of it instead."""
    variances = Variances(build_scheduler().alphas_cumprod)
    found: dict[str, list[Tensor]] = {"learned": [], "larger": [], "smaller": []}
    for i, (pictures, rows) in enumerate(zip(pool.pictures.split(BATCH), pool.labels.split(BATCH), strict=True)):
        generator = step_generator(seed, i)
        posterior = pipe.vae.encode(to_float(pictures)).latent_dist
        scale = pipe.vae.config.scaling_factor
        latents = draw_latents(posterior.mean * scale, posterior.std * scale, generator)
        timesteps = draw_timesteps(len(variances.alphas), generator, 1.0)[: len(rows)]
        noise = torch.randn(latents.shape, generator=generator)
        alpha = variances.alphas[timesteps].view(-1, 1, 1, 1)
        error, spread = predict(pipe.transformer, alpha, latents, noise, timesteps, rows[:, 0])
        for name, value in (("learned", spread), ("larger", torch.ones_like(spread)), ("smaller", -torch.ones_like(spread))):
            found[name].append(variances.bits(value, error, timesteps).mean(dim=(1, 2, 3)))
    return {name: round(len(variances.alphas) * float(torch.cat(rows).mean()), 3) for name, rows in found.items()}


def evaluate(pipe: DiTPipeline, judge: Judge, held_out: Pool, out: Path, each: int, guidance: float, steps: int = 50) -> dict[str, Any]:
    """Figures for `each` pictures of every object, picture i from seed i; grids go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    objects = [name for name in scenes.OBJECTS for _ in range(each)]
    prompts = [scenes.fill("a {object}", scenes.Labels(name)) for name in objects]
    began = time.perf_counter()
    images = measuring.generate(Named(pipe), prompts, range(len(prompts)), guidance, steps)
    seconds = time.perf_counter() - began
    measuring.grid(images[::each], prompts[::each]).save(out / "objects.png")
    columns = min(each, 8)
    some = [i + j for i in range(0, len(images), 8 * each) for j in range(columns)]
    measuring.grid([images[i] for i in some], [prompts[i] for i in some], columns).save(out / "seeds.png")
    scores = {"object": judge.score(images, prompts)["object"]}
    true, other = (true_pictures(objects, seed) for seed in (1, 2))
    features = [judge.features(pictures) for pictures in (images, true, other)]
    right = {name: sum(bool(s) for s, o in zip(scores["object"], objects, strict=True) if o == name) for name in scenes.OBJECTS}
    return {
        "prompts": len(images),
        "each": each,
        "steps": steps,
        "guidance": guidance,
        "seconds_per_picture": round(seconds / len(images), 2),
        "scores": {"object": measuring.tally(scores)["object"]},
        "right_of_each": right,
        "true_renders_right": round(float(np.mean([bool(s) for s in judge.score(true, prompts)["object"]])), 4),
        "frechet_to_renders": round(frechet(features[0], features[1]), 3),
        "frechet_renders_to_renders": round(frechet(features[2], features[1]), 3),
        "diversity_rms": {"generated": diversity(images, each), "true_renders": diversity(true, each)},
        "variance_bits": variance_bits(pipe, held_out),
    }


def diversity(images: Sequence[Image.Image], each: int) -> float:
    """Mean pairwise RMS pixel distance (0..255) of the pictures of one object, over all objects."""
    return round(float(np.mean([measuring.rms_distance(images[i : i + each]) for i in range(0, len(images), each)])), 1)


def sweep_guidance(pipe: DiTPipeline, judge: Judge) -> dict[str, float]:
    """Share of right objects for several guidance scales: a picture of each object, from other seeds than `evaluate` takes."""
    prompts = [scenes.fill("a {object}", scenes.Labels(name)) for name in scenes.OBJECTS]
    found = {}
    for guidance in GUIDANCES:
        images = measuring.generate(Named(pipe), prompts, range(SWEEP_SEED, SWEEP_SEED + len(prompts)), guidance)
        found[str(guidance)] = measuring.tally({"object": judge.score(images, prompts)["object"]})["object"]["share"]
        console.print(f"guidance {guidance}: {found[str(guidance)]}", highlight=False)
    return found


CARD = (
    """# emoji-dit

A small real class-conditional checkpoint: a standard `DiTPipeline` (12 blocks, adaLN-Zero, learned variance) that draws 64 x 64 pictures
of the emoji that its label names, at a size, in a place and on a background of its own choice. It was trained from scratch by
diffgraft's own script, to try plugins on a diffusion transformer without a download and without a GPU. It is not meant for anything else.

```python
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("path/to/emoji-dit")
image = pipe(class_labels=pipe.get_label_ids(["apple"]), guidance_scale={guidance}).images[0]
```

Labels 0 to {last}, in this order: {objects}. Label 1000 is "no label", which `DiTPipeline` guides against; the others draw nothing
in particular.

The autoencoder is that of emoji-sd, so latents go from one to the other; noise schedule and v-prediction are the same too.

## Figures

{each} pictures of each object, {steps}-step DDIM, guidance {guidance}, picture i with seed i, fp16 weights loaded as fp32, judged by the
judge of emoji-sd, which calls {true_right} % of true renders by their name:

| | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

Fewest right, of {each}: {worst}.

- Frechet distance of judge features to as many true renders of the same objects: {frechet} ({true_frechet} between two sets of true
  renders).
- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between pictures of one object; {true_diversity} between true renders.
- Learned variance: on held-out renders all 1,000 steps together cost {learned} bits a latent number; {larger} with the larger of the two
  variances of Ho et al. (2020), {smaller} with the smaller.
- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on other seeds, a picture of each object:

| guidance | object |
|---|---|
{guidances}

"""
    + cards.MADE
    + """
- Data: {scene_count} upright scenes of one object, as in the later stages of emoji-sd.
- Transformer: 12 blocks of width 128, 4 heads, patches of 2 x 2; modulations and output start at zero; AdamW (learning rate 1e-3, cosine),
  batch 64, bf16 autocast, 10 % of the labels dropped, averaged weights (.998).
- The loss of v is emoji-sd's: timesteps 1000 u^0.6 and clamp(SNR, 1, 5) on the clean latents in the first half of the steps, uniform
  timesteps and clamp(10 SNR, 1, 20) in the second. The variance costs its KL in bits, without gradient to v (Nichol & Dhariwal 2021).

## Limits

One object a picture, only these 64; softer than the artwork (small objects most of all). The pipeline itself does not use the
variance. The judge is more lenient than a person about fine detail, so look at the pictures too.

"""
)


def emoji_dit(
    out: Out,
    steps: Steps = 6500,
    base: Base = BASE,
    scenes: Scenes = 24_000,
    seed: Seed = 0,
    device: Device = "auto",
    each: Each = 8,
) -> None:
    """Train a class-conditional transformer on the latents of emoji-sd's autoencoder, export, measure."""
    accelerator, sd = start(base, device)
    pool = load_scenes(out, scenes, seed, upright=True)
    state = out / "state" / "upright"
    pipe = build_pipeline(sd.vae, train_dit(pool, sd.vae, state, steps, seed, accelerator))
    exporting.export(out / NAME, pipe)
    write_recipe(out, NAME, describe(NAME, pipe, state, ("dit",), {"": steps}, scenes, seed, device))
    measure_dit(out, each, seed=seed)


def measure_dit(
    out: Out,
    each: Each = 8,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure OUT/emoji-dit on every object; write its model card, and picture grids to OUT/grids-emoji-dit."""
    folder = out / NAME
    judge = load_bundled()
    pipe = DiTPipeline.from_pretrained(folder, local_files_only=True)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True, upright=True)
    sweep = sweep_guidance(pipe, judge)
    best = guidance or max(GUIDANCES, key=lambda scale: sweep[str(scale)])
    result = {**evaluate(pipe, judge, held_out, out / f"grids-{NAME}", each, best), "guidances": sweep}
    recipe = read_recipe(out, NAME)
    worst = sorted(result["right_of_each"].items(), key=lambda item: item[1])[:8]
    exporting.write_card(
        folder,
        cards.head("unconditional-image-generation") + CARD + cards.LICENCE,
        recipe,
        judge,
        result,
        notes.read_text() if notes else "",
        **result["variance_bits"],
        each=each,
        last=len(scenes.OBJECTS) - 1,
        true_right=round(100 * result["true_renders_right"], 1),
        worst=", ".join(f"{name} {right}" for name, right in worst),
        guidances="\n".join(f"| {scale} | {100 * share:.1f} % |" for scale, share in sweep.items()),
    )
    console.print(f"object: {result['scores']['object']}; Frechet {result['frechet_to_renders']}", highlight=False)
