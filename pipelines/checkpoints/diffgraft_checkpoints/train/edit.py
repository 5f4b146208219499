"""emoji-edit: emoji-sd taught to follow instructions on a picture (InstructPix2Pix, Brooks et al., arXiv 2211.09800).

The pairs are rendered, so the true result of every instruction is known pixel by pixel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from ..emoji import edits, scenes
from ..emoji.judge import FIELDS, Judge, load_bundled
from . import cards
from . import evaluate as measuring
from . import export as exporting
from .common import Stage, console, plain_attention, step_generator
from .pool import Pool, decode_labels, draw_scene, from_images, load_rendered, to_images
from .recipe import BASE, Base, Device, Out, Scenes, Seed, Steps, describe, load_scenes, read_recipe, start, write_recipe
from .unet import BATCH, PAIRS_LEARNING_RATE, POSITIONS, draw_timesteps, encode_pool, loss_weight
from .vae import round_trip

NAME = "emoji-edit"
DROPPED = 0.05
"""Share of the training without instruction, without picture, and without both: InstructPix2Pix's 5 % each."""
GUIDANCES = ((1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (2.0, 1.5), (3.0, 1.5))
"""Guidance towards the instruction and towards the picture that are tried."""
FRESH = 60_000
"""Seed of the scenes to edit: not one of the training."""
SWEEP_EACH, SWEEP_FROM = 12, 50_000
"""Edits of each kind with which the guidance is chosen, and the first scene that they may begin at."""
START, START_FILE = scenes.Labels("carrot", "purple", "small", "right"), "start.png"
"""The scene to edit where nobody gives one: a held-out combination, and its picture's file beside the weights."""
Each = Annotated[int, typer.Option(min=1, help="Held-out edits of each kind to measure.")]


def draw_target(seed: int, index: int, held_out: bool, upright: bool) -> scenes.Scene:
    """The result of an edit of scene `index` of the pool of `seed`, one that is (not) held out."""
    return edits.draw_edit(draw_scene(seed, index, upright=upright), np.random.default_rng([seed, index, 8]), held_out)


def load_targets(folder: Path, count: int, seed: int) -> Pool:
    """For each scene of the upright training pool of `seed` the result of a training edit."""
    return load_rendered(folder / f"edits-{count}-{seed}-upright.pt", draw_target, count, seed, held_out=False, upright=True)


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with four channels more, for the picture to edit; they begin without effect, as in InstructPix2Pix."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": 8})
    weights = dict(unet.state_dict())
    narrow = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([narrow, torch.zeros_like(narrow)], dim=1)
    wide.load_state_dict(weights)
    return wide


def train_edit(
    sources: Pool, targets: Pool, sd: StableDiffusionPipeline, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> StableDiffusionInstructPix2PixPipeline:
    """emoji-sd's U-Net and text encoder, trained on edits of `sources` (averaged weights, fp32, CPU), as a pipeline."""
    torch.manual_seed(seed + 8)
    seen, _ = encode_pool(sources, sd.vae, folder)
    mean, deviation = encode_pool(targets, sd.vae, folder / "edits")
    scaling = sd.vae.config.scaling_factor
    alphas = sd.scheduler.alphas_cumprod
    unet, text_encoder = widen(sd.unet), sd.text_encoder
    plain_attention(unet)
    modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}

    @cache
    def tokenize(text: str) -> list[int]:
        return sd.tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 8, step)
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        latents = mean[index].float() + deviation[index].float() * torch.randn(mean[index].shape, generator=generator)
        picture = seen[index].float() / scaling  # the pipeline gives the mean of the posterior, not scaled
        u = torch.rand(BATCH, generator=generator)
        picture[(u >= DROPPED) & (u < 3 * DROPPED)] = 0
        rows = zip(sources.labels[index].tolist(), targets.labels[index].tolist(), (u < 2 * DROPPED).tolist(), strict=True)
        said = ["" if dropped else edits.instruction(decode_labels(one), decode_labels(other)) for one, other, dropped in rows]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = draw_timesteps(len(alphas), generator, 1.0)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        batch = (latents, picture, noise, timesteps, alpha, torch.tensor([tokenize(each) for each in said]))
        latents, picture, noise, timesteps, alpha, tokens = (each.to(accelerator.device) for each in batch)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        out = unet(torch.cat([noisy, picture], dim=1), timesteps, text_encoder(tokens).last_hidden_state).sample
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return (loss_weight(alpha, 1.0) * (out.float() - v).square()).mean()

    averages = Stage("edit", folder, modules, steps, PAIRS_LEARNING_RATE, accelerator).run(loss)
    for name, module in modules.items():
        module.load_state_dict(averages[name])
        module.eval()
    return build_pipeline(sd, unet)


def build_pipeline(sd: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionInstructPix2PixPipeline:
    """The U-Net with the other parts of `sd`, on the CPU."""
    return StableDiffusionInstructPix2PixPipeline(
        vae=sd.vae,
        text_encoder=sd.text_encoder,
        tokenizer=sd.tokenizer,
        unet=unet,
        scheduler=sd.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to("cpu")


def start_scene() -> scenes.Scene:
    """The scene of `START_FILE`."""
    return scenes.upright(scenes.sample_scene(START, np.random.default_rng(FRESH)))


def start_picture() -> Image.Image:
    """What `START_FILE` shows."""
    return scenes.render(start_scene())


class Task(NamedTuple):
    """An edit to be made: the scene before and after."""

    before: scenes.Scene
    after: scenes.Scene

    @property
    def kind(self) -> str:
        return edits.kind_of(self.before.labels, self.after.labels)

    @property
    def instruction(self) -> str:
        return edits.instruction(self.before.labels, self.after.labels)

    @property
    def caption(self) -> str:
        """What the picture shows afterwards."""
        return scenes.caption(self.after.labels)


def held_out_tasks(each: int, first: int) -> list[Task]:
    """`each` held-out edits of every kind, of fresh upright scenes from number `first` on; always the same."""
    tasks = []
    for kind in edits.KINDS:
        found, index = 0, first
        while found < each:
            before = draw_scene(FRESH, index, upright=True)
            if edits.choices(before.labels, kind, held_out=True):
                tasks.append(Task(before, edits.draw_edit(before, np.random.default_rng([FRESH, index, 8]), True, (kind,))))
                found += 1
            index += 1
    return tasks


def generate(
    pipe: StableDiffusionInstructPix2PixPipeline, tasks: Sequence[Task], guidance: tuple[float, float], steps: int = 50
) -> list[Image.Image]:
    """What the pipeline makes of each task, picture i from seed i."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    starts = range(0, len(tasks), measuring.BATCH)
    for begin in track(starts, f"{len(tasks)} edits", console=console, disable=not console.is_terminal):
        part = tasks[begin : begin + measuring.BATCH]
        images += pipe(
            [task.instruction for task in part],
            image=[scenes.render(task.before) for task in part],
            num_inference_steps=steps,
            guidance_scale=guidance[0],
            image_guidance_scale=guidance[1],
            generator=[torch.Generator().manual_seed(begin + i) for i in range(len(part))],
        ).images
    return images


def psnr(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
    """PSNR of each pair of pictures in dB."""
    errors = [np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b)) ** 2) for a, b in zip(images, others, strict=True)]
    return [float(10 * np.log10(255**2 / max(error, 1e-10))) for error in errors]


def through_vae(pipe: StableDiffusionInstructPix2PixPipeline, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures encoded and decoded: no edit in latent space can be closer."""
    return to_images(round_trip(pipe.vae, from_images(images)))


def evaluate(
    pipe: StableDiffusionInstructPix2PixPipeline, judge: Judge, out: Path, each: int, guidance: tuple[float, float], steps: int = 50
) -> dict[str, Any]:
    """Figures for `each` held-out edits of every kind, beside the unedited pictures and the true ones; grids go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tasks = held_out_tasks(each, 0)
    before, after = [scenes.render(task.before) for task in tasks], [scenes.render(task.after) for task in tasks]
    began = time.perf_counter()
    edited = generate(pipe, tasks, guidance, steps)
    seconds = time.perf_counter() - began
    captions = [task.caption for task in tasks]
    compared = {"edited": edited, "unedited": before, "true edit through the autoencoder": through_vae(pipe, after)}
    distances = {name: psnr(images, after) for name, images in compared.items()}
    verdicts = {name: judge.score(images, captions) for name, images in {**compared, "true edit": after}.items()}
    kinds = np.array([task.kind for task in tasks])

    def by_kind(values: Sequence[float | bool | None]) -> dict[str, float]:
        array = np.array(values, dtype=np.float64)
        return {"all": round(float(array.mean()), 3), **{kind: round(float(array[kinds == kind].mean()), 3) for kind in edits.KINDS}}

    for kind in edits.KINDS:
        shown = [i for i in range(len(tasks)) if kinds[i] == kind][:16]
        rows = [(im, said) for i in shown for im, said in ((before[i], tasks[i].instruction), (edited[i], ""), (after[i], "true edit"))]
        measuring.grid([im for im, _ in rows], [said for _, said in rows], 6).save(out / f"{kind}.png")
    return {
        "edits": len(tasks),
        "steps": steps,
        "guidance": list(guidance),
        "seconds_per_picture": round(seconds / len(tasks), 2),
        "psnr_db": {name: by_kind(values) for name, values in distances.items()},
        "edited_field_right": {name: by_kind(edited_field(score, kinds)) for name, score in verdicts.items()},
        "scores": measuring.tally(verdicts["edited"]),
        "scores_of_others": {name: {f: row["share"] for f, row in measuring.tally(s).items()} for name, s in verdicts.items()},
        "wrong": measuring.wrong(verdicts["edited"], [f"{task.instruction}: {task.caption}" for task in tasks]),
    }


def edited_field(scores: dict[str, list[bool | None]], kinds: Sequence[str]) -> list[bool | None]:
    """For each picture whether the field that the edit was to change is as it should be."""
    return [scores[kind][i] for i, kind in enumerate(kinds)]


def sweep_guidance(pipe: StableDiffusionInstructPix2PixPipeline, judge: Judge) -> dict[tuple[float, float], dict[str, float]]:
    """PSNR to the true edit in dB and the judge's shares for several guidance scales, on other held-out edits than `evaluate`."""
    tasks = held_out_tasks(SWEEP_EACH, SWEEP_FROM)
    after, captions = [scenes.render(task.after) for task in tasks], [task.caption for task in tasks]
    found = {}
    for guidance in GUIDANCES:
        images = generate(pipe, tasks, guidance)
        shares = {name: row["share"] for name, row in measuring.tally(judge.score(images, captions)).items()}
        found[guidance] = {"psnr_db": round(float(np.mean(psnr(images, after))), 2), **shares}
        console.print(f"guidance {guidance}: {found[guidance]}", highlight=False)
    return found


CARD = (
    """# emoji-edit

A small real editing checkpoint: a standard `StableDiffusionInstructPix2PixPipeline` that changes a 64 x 64 picture of one emoji as a
sentence says: its background, its place, its size, or the emoji. What the true result is, is known pixel by pixel, so how well it edits
can be measured exactly. It was trained by diffgraft's own script, from emoji-sd, to try plugins on an editing pipeline without a download
and without a GPU. It is not meant for anything else.

```python
from diffusers import StableDiffusionInstructPix2PixPipeline

pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained("path/to/emoji-edit")
edited = pipe("make the background blue", image=picture, guidance_scale={by_text}, image_guidance_scale={by_picture},
              num_inference_steps=50).images[0]
```

Instructions: "make the background {{colour}}"; "move it to the left" (right, top, bottom, center); "make it bigger", "make it smaller";
"turn the {{object}} into a {{object}}". The picture: one that `diffgraft_checkpoints.emoji.scenes.render` or emoji-sd draws; `start.png` is
one, of a combination that was never shown in training.

- objects: {objects}
- backgrounds: {backgrounds}

The true result (`diffgraft_checkpoints.emoji.edits.apply`): the background in the exact colour of its name; a moved object on the axis,
at the mean distance of its size; a bigger or smaller one by the ratio of the mean sizes, nearer to or farther from the middle by
that of the mean distances; another object in the same place, as wide, turned alike.

## Figures on held-out edits

{count} edits, {each} of each kind, of fresh scenes; none like it was in the training: either its result is one of the combinations of
object, background, size and place that were never shown, or it turns an object into one that it was never turned into. {steps} steps,
guidance {by_text} (instruction) and {by_picture} (picture), edit i with seed i, fp16 weights loaded as fp32.

PSNR to the true edit in dB, mean over pictures:

| | all | background | place | size | object |
|---|---|---|---|---|---|
{psnr}

Share of pictures in which the judge of emoji-sd sees the changed thing as it should be:

| | all | background | place | size | object |
|---|---|---|---|---|---|
{changed}

Everything in the edited picture, what was to be changed and what was to be kept:

| | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on other held-out edits ({tried}):

| instruction, picture | PSNR | object | background | size | place | all four |
|---|---|---|---|---|---|---|
{sweep}

"""
    + cards.MADE
    + """
- Data: {scene_count} upright scenes of one object, as in the later stages of emoji-sd, and the result of one edit of each.
- U-Net and text encoder: emoji-sd's, trained on. The U-Net has four input channels more for the picture, which begin at zero (Brooks et
  al. 2023). AdamW (learning rate 5e-4, cosine), batch 64, bf16 autocast, averaged weights (.998); v-prediction; uniform timesteps,
  the error of the clean latents weighted by clamp(10 SNR, 1, 20). 5 % of the training without instruction, 5 % without picture,
  5 % without both.
- Autoencoder and tokenizer: emoji-sd's, unchanged. "make", "turn" and other words that captions do not have are spelled in letters.

## Limits

One object a picture, only the sentences above, one change at a time; the edited picture is softer than the artwork, as everything that
comes through the autoencoder. The judge is more lenient than a person about fine detail, so look at the pictures too.

"""
)


def emoji_edit(
    out: Out,
    steps: Steps = 5000,
    base: Base = BASE,
    scenes: Scenes = 24_000,
    seed: Seed = 0,
    device: Device = "auto",
    each: Each = 32,
) -> None:
    """Train emoji-sd's U-Net and text encoder on to edit pictures as told, export, measure."""
    accelerator, sd = start(base, device)
    sources = load_scenes(out, scenes, seed, upright=True)
    state = out / "state" / "upright"
    pipe = train_edit(sources, load_targets(out / "pool", scenes, seed), sd, state, steps, seed, accelerator)
    exporting.export(out / NAME, pipe)
    start_picture().save(out / NAME / START_FILE)
    write_recipe(out, NAME, describe(NAME, pipe, state, ("edit",), {"": steps}, scenes, seed, device))
    measure_edit(out, each)


def measure_edit(
    out: Out,
    each: Each = 32,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Measure OUT/emoji-edit on held-out edits; write its model card, and picture grids to OUT/grids-emoji-edit."""
    folder = out / NAME
    judge = load_bundled()
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, local_files_only=True)
    sweep = sweep_guidance(pipe, judge)
    best = max(GUIDANCES, key=lambda guidance: sweep[guidance]["psnr_db"])
    result = evaluate(pipe, judge, out / f"grids-{NAME}", each, best)
    recipe = read_recipe(out, NAME)
    tried = [{"guidance": guidance, **row} for guidance, row in sweep.items()]
    exporting.save_figures(folder, {"recipe": recipe, "judge": judge.config.accuracy, **result, "guidance_sweep": tried})
    fields = (*FIELDS, "all four")
    card = (cards.head("image-to-image") + CARD + cards.LICENCE).format(
        **exporting.recipe_values(recipe),
        notes=exporting.remarks(notes.read_text() if notes else ""),
        count=result["edits"],
        each=each,
        steps=result["steps"],
        by_text=best[0],
        by_picture=best[1],
        seconds=result["seconds_per_picture"],
        tried=SWEEP_EACH * len(edits.KINDS),
        objects=", ".join(scenes.OBJECTS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
        scores=exporting.score_table(result["scores"]),
        psnr="\n".join(cards.table_row(name, [f"{value:.1f}" for value in row.values()]) for name, row in result["psnr_db"].items()),
        changed="\n".join(
            cards.table_row(name, [cards.percent(v) for v in row.values()]) for name, row in result["edited_field_right"].items()
        ),
        sweep="\n".join(
            cards.table_row(f"{g[0]}, {g[1]}", [f"{row['psnr_db']} dB", *(cards.percent(row[name]) for name in fields)])
            for g, row in sweep.items()
        ),
    )
    (folder / "README.md").write_text(card)
    console.print(f"PSNR to the true edit: {result['psnr_db']}", highlight=False)
