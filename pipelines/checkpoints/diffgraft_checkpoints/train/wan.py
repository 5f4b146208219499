"""emoji-wan, a small real `WanPipeline`: its autoencoder, transformer and text encoder, trained on moving emoji; export and figures."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from PIL import Image, ImageDraw
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ..emoji import motion, motion_judge, scenes
from ..emoji.motion_judge import FIELDS, MotionJudge
from .cards import LICENCE
from .common import Stage, console, keep_freed_memory, make_accelerator, step_generator, write_atomic
from .evaluate import grid, rms_distance, tally
from .export import load_as_fp32, replacing, score_table, versions
from .pool import Pool, load_pool, to_float
from .recipe import hardware
from .vae import KL_WEIGHT, crops, psnr, reconstruction_loss

CONTENT, COORDINATES = 16, 6
CHANNELS = CONTENT + COORDINATES
"""Latent channels: for the pixels, and for where a latent is; see `coordinates`."""
PICTURE_BATCH, CLIP_BATCH = 24, 4
CLIP_SEED = 1_000_003
"""Added to the seed for the clips that the autoencoder sees: other ones than the transformer's, and each only once."""
BATCH = 64
TEXT_WIDTH = 128
POSITIONS = 16
"""Tokens of a caption, padded; the longest has 14."""
CAPTION_DROPOUT = 0.1
HELD_OUT_CLIPS = 200
GUIDANCES = (2.0, 3.0, 5.0)
CALL: dict[str, Any] = {"num_frames": motion.FRAMES, "height": scenes.SIZE, "width": scenes.SIZE, "max_sequence_length": POSITIONS}
"""What every call of the pipeline needs: its own defaults are 81 frames of 480 x 832 and 512 tokens."""


# --- the autoencoder -------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKLWan:
    """An untrained autoencoder of 2.7 M parameters: 9 x 64 x 64 x 3 pixels to 3 x 8 x 8 x 22 latents.

    In the form of Wan 2.2 (pixels in blocks of 2 x 2, shortcuts past every level): its convolutions never run at full size, and
    the shortcuts carry a coarse picture from the first step on. The channels of `coordinates` it neither writes nor reads: the
    encoder gives 0 there, the decoder's first weights for them are 0, and as `train_vae` leaves these channels out, both remain.
    """
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    with torch.no_grad():
        vae.quant_conv.weight[CONTENT:CHANNELS] = 0
        vae.quant_conv.bias[CONTENT:CHANNELS] = 0
        vae.post_quant_conv.weight[:, CONTENT:] = 0
    return vae


def coordinates(frames: int, height: int, width: int) -> Tensor:
    """(6, frames, height, width): across, down and time of each latent, twice, about -1..1: what the last latent channels hold.

    Wan's transformer sees only how far tokens are from each other (rotary embeddings; text has no place), so in noise it cannot
    tell left from right nor the middle from the edge. A ramp of known slope and mean it can draw even so, each token by its
    neighbours, and with it everything else has a place: of four clips that a small transformer learned by heart (700 steps), three came
    back in their places; without the ramps one did, and the others as fragments.
    """
    across = torch.linspace(-1, 1, width).expand(frames, height, width)
    down = torch.linspace(-1, 1, height).view(-1, 1).expand(frames, height, width)
    moment = (torch.arange(frames, dtype=torch.float32) - 1).view(-1, 1, 1).expand(frames, height, width)
    return torch.stack([across, down, moment] * (COORDINATES // 3))


def render_clips(clips: Sequence[motion.Clip]) -> Tensor:
    """Clips as uint8 (N, 3, 9, 64, 64)."""
    return torch.from_numpy(np.stack([motion.to_array(motion.render_clip(clip)) for clip in clips])).permute(0, 4, 1, 2, 3).contiguous()


def train_vae(pool: Pool, folder: Path, steps: tuple[int, int], seed: int, accelerator: Accelerator) -> AutoencoderKLWan:
    """The trained autoencoder (averaged weights, fp32): `steps[0]` on crops of pictures, then `steps[1]` on ever new clips.

    Most of what it must learn is how emoji look, and a crop costs a thirtieth of a clip. The first half of the steps on clips
    sees 5 frames of each (one and four: all that the convolutions tell apart but for the third group), the second half all 9.
    """
    torch.manual_seed(seed + 3)
    vae = build_vae()

    def loss(target: Tensor, generator: torch.Generator) -> Tensor:
        target = target.to(accelerator.device)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(accelerator.device)
        mean, logvar = posterior.mean.float()[:, :CONTENT], posterior.logvar.float()[:, :CONTENT]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        latents = F.pad(mean + (0.5 * logvar).exp() * noise[:, :CONTENT], (0, 0) * 3 + (0, COORDINATES))
        return reconstruction_loss(vae.decode(latents).sample, target) + KL_WEIGHT * kl

    def picture_loss(step: int) -> Tensor:
        generator = step_generator(seed + 3, step)
        return loss(crops(pool, PICTURE_BATCH, generator).unsqueeze(2), generator)

    def clip_loss(step: int) -> Tensor:
        generator = step_generator(seed + 3, steps[0] + step)
        frames = 5 if step < steps[1] // 2 else motion.FRAMES
        clips = [motion.draw_clip(seed + CLIP_SEED, step * CLIP_BATCH + i) for i in range(CLIP_BATCH)]
        return loss(to_float(render_clips(clips)[:, :, :frames]), generator)

    pictures = Stage("wan-vae-pictures", folder, {"vae": vae}, steps[0], 2e-3, accelerator, ema=0.998)
    with flat_convolutions(vae):
        averages = pictures.run(picture_loss)
    vae.load_state_dict(averages["vae"])
    look_at_the_present(vae)
    clips = Stage("wan-vae-clips", folder, {"vae": vae}, steps[1], 1e-3, accelerator, ema=0.998)
    vae.load_state_dict(clips.run(clip_loss)["vae"])
    return vae.eval()


@contextlib.contextmanager
def flat_convolutions(vae: AutoencoderKLWan) -> Iterator[None]:
    """Inside, clips of one frame take two-dimensional convolutions: the same numbers, and a training step at 60 % of the time.

    A causal convolution sees zeros before the first frame, so only the newest slice of its weights counts there.
    """
    convolutions = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]

    def forward(module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] > 1 or cache_x is not None:
            return WanCausalConv3d.forward(module, x, cache_x)
        padded = F.pad(x[:, :, 0], module._padding[:4])
        return F.conv2d(padded, module.weight[:, :, -1], module.bias, module.stride[1:]).unsqueeze(2)

    for module in convolutions:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


@torch.no_grad()
def look_at_the_present(vae: AutoencoderKLWan) -> None:
    """Zero the weights for earlier frames, which pictures do not train, and let the convolutions between frame rates copy.

    Then the autoencoder takes each group of frames of a clip for a picture, and has only the differences to learn.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
            continue
        module.weight[:, :, :-1] = 0
        if name.endswith("time_conv"):
            copies = module.out_channels // module.in_channels
            module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels, device=module.weight.device).repeat(copies, 1)
            module.bias.zero_()


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, count: int, path: Path, seed: int, accelerator: Accelerator, batch: int = 32) -> Tensor:
    """Means and deviations of the latents of the training clips, (2, N, 22, 3, 8, 8) fp16, kept in `path`; the clips are not.

    The last channels are the `coordinates`, with deviation 0.
    """
    if not path.exists():
        parts = []
        for start in track(range(0, count, batch), f"encoding {count} clips", console=console, disable=not console.is_terminal):
            clips = [motion.draw_clip(seed, i) for i in range(start, min(start + batch, count))]
            with accelerator.autocast():
                posterior = vae.encode(to_float(render_clips(clips)).to(vae.device)).latent_dist
            both = torch.stack([posterior.mean, posterior.std]).float().cpu()
            both[0, :, CONTENT:], both[1, :, CONTENT:] = coordinates(*both.shape[3:]), 0.0
            parts.append(both.half())
        write_atomic(path, lambda p: torch.save(torch.cat(parts, dim=1), p))
    return torch.load(path, weights_only=True)


def note_statistics(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Write mean and standard deviation of each latent channel into the autoencoder's config, as `WanPipeline` expects."""
    mean, deviation = latents.float()
    spread = (mean.var(dim=(0, 2, 3, 4)) + deviation.square().mean(dim=(0, 2, 3, 4))).sqrt()
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in mean.mean(dim=(0, 2, 3, 4)).tolist()], latents_std=[round(v, 4) for v in spread.tolist()]
    )


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, clips: Tensor, batch: int = 8) -> Tensor:
    """uint8 (N, 3, F, H, W) -> the same clips through encoder (mean) and decoder, uint8."""
    parts = []
    for part in clips.split(batch):
        out = vae.decode(vae.encode(to_float(part).to(vae.device)).latent_dist.mode()).sample
        parts.append(((out.float() + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


# --- text, transformer, scheduler ------------------------------------------------------------------------------------


def build_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary in which every word of the captions is one token; other words fall apart into letters."""
    captions = (motion.fill(template, labels) for labels in motion.split()[0] for template, _ in motion.TEMPLATES)
    words = sorted({word for text in captions for word in re.findall("[a-z]+", text)})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((letter, -9.0) for letter in letters)]
    vocabulary = [*pieces, *((f"▁{word}", -3.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=POSITIONS)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """An untrained text encoder of two layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """An untrained transformer of 3.9 M parameters; a clip is 3 x 4 x 4 tokens."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        rope_max_seq_len=128,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps from sigma 1 (pure noise) down, closer together where noisy, as Wan does at low resolution."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


# --- training of the transformer -------------------------------------------------------------------------------------


def draw_sigmas(generator: torch.Generator, progress: float) -> Tensor:
    """(BATCH,) noise levels, spread evenly but for a shift to the noisy end; in the first half of the training a larger one.

    The same share of the steps is then as noisy as in the training of emoji-sd: motion and background are decided there.
    """
    u = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
    shift = 4.0 if progress < 0.5 else 2.5
    return (shift * u / (1 + (shift - 1) * u)).clamp_min(1e-3)


def loss_weight(sigma: Tensor, progress: float) -> Tensor:
    """Weight of the squared error of the velocity, which is that of the clean latents divided by sigma squared.

    The error of the clean latents gets the weights of emoji-sd, see `unet.loss_weight`.
    """
    snr = ((1 - sigma) / sigma).square()
    return (snr.clamp(1, 5) if progress < 0.5 else (10 * snr).clamp(1, 20)) * sigma.square()


def train_transformer(
    vae: AutoencoderKLWan, latents: Tensor, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> tuple[WanTransformer3DModel, UMT5EncoderModel, T5Tokenizer]:
    """The trained transformer and text encoder (averaged weights, fp32) and their tokenizer."""
    torch.manual_seed(seed + 4)
    tokenizer = build_tokenizer()
    transformer, text_encoder = build_transformer(), build_text_encoder(tokenizer)
    device = accelerator.device
    labels = [motion.draw_clip(seed, i).labels for i in range(latents.shape[1])]
    means, deviations = latents
    center, spread = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))

    @cache
    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids
        return ids

    def loss(step: int) -> Tensor:
        progress = step / steps
        generator, rng = step_generator(seed + 4, step), np.random.default_rng([seed, step, 4])
        index = torch.randint(len(labels), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        captions = ["" if d else motion.caption(labels[i], rng) for i, d in zip(index.tolist(), dropped.tolist(), strict=True)]
        tokens = torch.tensor([tokenize(text) for text in captions], device=device)
        mean, deviation = means[index].float(), deviations[index].float()
        clean = (mean + deviation * torch.randn(mean.shape, generator=generator) - center) / spread
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(generator, progress)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy, velocity = (1 - s) * clean + s * noise, noise - clean
        mask = tokens != tokenizer.pad_token_id
        hidden = text_encoder(tokens, mask).last_hidden_state * mask.unsqueeze(-1)  # zeros behind the caption, as in WanPipeline
        with plain_attention(device):
            out = transformer(noisy.to(device), 1000 * sigma.to(device), hidden).sample
        return (loss_weight(s, progress).to(device) * (out.float() - velocity.to(device)).square()).mean()

    stage = Stage("wan-transformer", folder, {"transformer": transformer, "text_encoder": text_encoder}, steps, 1e-3, accelerator)
    averages = stage.run(loss)
    transformer.load_state_dict(averages["transformer"])
    text_encoder.load_state_dict(averages["text_encoder"])
    return transformer.cpu().eval(), text_encoder.cpu().eval(), tokenizer


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, attention by plain matrix products: the backward pass of the fused kernel took half of a step."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


# --- export ----------------------------------------------------------------------------------------------------------


def export(folder: Path, vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text: UMT5EncoderModel, tokenizer: T5Tokenizer) -> None:
    """Replace `folder` by the checkpoint, weights in fp16; the parts given are rounded to it, and are fp32 again afterwards."""
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, scheduler=build_scheduler(), transformer=transformer)
    with replacing(folder) as fresh:
        pipe.to(dtype=torch.float16).save_pretrained(fresh)
        pipe.to(dtype=torch.float32)
        load_as_fp32(fresh / "text_encoder" / "config.json")


# --- figures ---------------------------------------------------------------------------------------------------------


def held_out_labels(seed: int = 0) -> list[motion.MotionLabels]:
    """All held-out combinations in a fixed random order."""
    held_out = motion.split()[1]
    return [held_out[i] for i in np.random.default_rng(seed).permutation(len(held_out))]


def generate(pipe: WanPipeline, prompts: Sequence[str], seeds: Sequence[int], guidance: float, steps: int = 50) -> list[np.ndarray]:
    """One clip (9, 64, 64, 3), 0..1, for each prompt, from that seed's noise."""
    pipe.set_progress_bar_config(disable=True)
    videos: list[np.ndarray] = []
    for start in track(range(0, len(prompts), 16), f"{len(prompts)} clips", console=console, disable=not console.is_terminal):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + 16]]
        batch = list(prompts[start : start + 16])
        videos += list(pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators, **CALL).frames)
    return videos


def strip(video: motion_judge.Video) -> Image.Image:
    """The frames of a clip side by side."""
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in motion_judge.to_frames(video)], axis=1))


def strips(videos: Sequence[motion_judge.Video], prompts: Sequence[str]) -> Image.Image:
    """Clips below each other, each with its prompt."""
    rows, text = [strip(video) for video in videos], 14
    sheet = Image.new("RGB", (rows[0].width, len(rows) * (scenes.SIZE + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        sheet.paste(row, (0, i * (scenes.SIZE + text)))
        draw.text((2, i * (scenes.SIZE + text) + scenes.SIZE), prompt, fill="black", font_size=10)
    return sheet


def save_animation(videos: Sequence[motion_judge.Video], prompts: Sequence[str], path: Path) -> None:
    """All clips moving in one grid, as an endless WebP."""
    frames = [grid(list(each), prompts) for each in zip(*map(motion_judge.to_frames, videos), strict=True)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[125] * (len(frames) - 1) + [800], loop=0, quality=85)


def diversity(pipe: WanPipeline, guidance: float, prompts: int = 8, seeds: int = 4) -> dict[str, float]:
    """Mean pairwise RMS pixel distance (0..255) over seeds of one prompt, of clips and of true renders."""
    labels = [each for each in held_out_labels()[:prompts] for _ in range(seeds)]
    made = generate(pipe, [motion.caption(each) for each in labels], range(1000, 1000 + len(labels)), guidance)
    true = [motion.render_clip(motion.sample_clip(each, np.random.default_rng([3, i]))) for i, each in enumerate(labels)]

    def mean_distance(videos: Sequence[motion_judge.Video]) -> float:
        rows = [strip(video) for video in videos]
        return round(float(np.mean([rms_distance(rows[s : s + seeds]) for s in range(0, len(rows), seeds)])), 1)

    return {"generated": mean_distance(made), "true_renders": mean_distance(true)}


def check_judge(vae: AutoencoderKLWan, judge: MotionJudge, seed: int) -> tuple[dict[str, dict[str, float]], float]:
    """The judge's accuracy on held-out true renders and on their round trips, and the PSNR of these in dB."""
    clips = [motion.draw_clip(seed + 1, i, held_out=True) for i in range(HELD_OUT_CLIPS)]
    prompts = [motion.caption(clip.labels) for clip in clips]
    true = render_clips(clips)
    trips = round_trip(vae, true)
    found = {}
    for what, videos in (("true renders", true), ("VAE round trips", trips)):
        scores = judge.score(list(videos.permute(0, 2, 3, 4, 1).numpy()), prompts)
        found[what] = {name: round(sum(map(bool, row)) / len(row), 4) for name, row in scores.items()}
    return found, round(psnr(trips, true), 2)


def evaluate(folder: Path, out: Path, count: int, guidance: float) -> dict[str, Any]:
    """Figures for `count` held-out combinations, 50 Euler steps, seed i for prompt i; pictures are written to `out`.

    A `guidance` of 0 takes the best of `GUIDANCES` on other held-out combinations.
    """
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    judge = motion_judge.load_bundled()
    out.mkdir(parents=True, exist_ok=True)
    labels = held_out_labels()
    others = [motion.caption(each) for each in labels[-32:]]
    sweep: dict[str, dict[str, float]] = {}
    for scale in GUIDANCES:
        scores = judge.score(generate(pipe, others, range(50_000, 50_000 + len(others)), scale), others)
        sweep[str(scale)] = {name: row["share"] for name, row in tally(scores).items()}
        console.print(f"guidance {scale}: {sweep[str(scale)]}", highlight=False)
    best = guidance or max(GUIDANCES, key=lambda scale: sum(sweep[str(scale)][name] for name in FIELDS))
    prompts = [motion.caption(each) for each in labels[:count]]
    began = time.perf_counter()
    videos = generate(pipe, prompts, range(count), best)
    seconds = time.perf_counter() - began
    strips(videos[:24], prompts[:24]).save(out / "held-out.png")
    save_animation(videos[:32], prompts[:32], out / "held-out.webp")
    scores = judge.score(videos, prompts)
    return {
        "prompts": count,
        "steps": 50,
        "guidance": best,
        "guidance_sweep": sweep,
        "seconds_per_clip": round(seconds / count, 2),
        "scores": tally(scores),
        "diversity_rms": diversity(pipe, best),
        "wrong": [
            {"prompt": p, "seed": i, "wrong": [n for n in FIELDS if scores[n][i] is False]}
            for i, p in enumerate(prompts)
            if any(scores[n][i] is False for n in FIELDS)
        ],
    }


def write_card(folder: Path, recipe: dict[str, Any], result: dict[str, Any], notes: str = "") -> None:
    """README.md with the recipe, the true figures and a person's `notes`; the figures as data in evaluation.json."""
    (folder / "evaluation.json").write_text(json.dumps({"recipe": recipe, **result}, indent=1) + "\n")

    def table(rows: dict[str, dict[str, float]], fields: Sequence[str]) -> str:
        return "\n".join(f"| {what} | " + " | ".join(f"{100 * row[field]:.1f} %" for field in fields) + " |" for what, row in rows.items())

    training, held_out = motion.split()
    card = (CARD + LICENCE).format(
        scores=score_table(result["scores"]), judged=table(recipe["judge"], FIELDS),
        sweep=table(result["guidance_sweep"], (*FIELDS, "all four")),
        stages="\n".join(f"| {name} | {row['steps']} | {row['seconds']} s |" for name, row in recipe["stages"].items()),
        parts=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in recipe["parameters"].items()),
        versions=", ".join(f"{k} {v}" for k, v in recipe["versions"].items()), command=recipe["command"], hardware=recipe["hardware"],
        videos=recipe["videos"], psnr=recipe["vae_psnr_db"], prompts=result["prompts"], guidance=result["guidance"],
        seconds=result["seconds_per_clip"], diversity=result["diversity_rms"]["generated"],
        true_diversity=result["diversity_rms"]["true_renders"], total=len(training) + len(held_out), held_out=len(held_out),
        objects=", ".join(scenes.OBJECTS), backgrounds=", ".join(scenes.BACKGROUNDS), sizes=", ".join(scenes.SIZES),
        motions=", ".join(f'"{phrase}"' for phrase in motion.MOTION_PHRASES.values()), positions=POSITIONS,
        notes=f"{notes.strip()}\n\n" if notes else "",
    )  # fmt: skip
    (folder / "README.md").write_text(card)


# --- the command -----------------------------------------------------------------------------------------------------


def emoji_wan(
    out: Annotated[Path, typer.Option(help="Working folder; the checkpoint is written to OUT/emoji-wan.")],
    steps_pictures: Annotated[int, typer.Option(help="Steps of the autoencoder on pictures.", min=1)] = 5000,
    steps_clips: Annotated[int, typer.Option(help="Steps of the autoencoder on clips.", min=1)] = 2000,
    steps_transformer: Annotated[int, typer.Option(min=1)] = 3600,
    pictures: Annotated[int, typer.Option(help="Rendered training scenes, as of emoji-sd.", min=1000)] = 40_000,
    videos: Annotated[int, typer.Option(help="Training clips whose latents are kept.", min=64)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of clips, weights and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure.", min=1)] = 96,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Train autoencoder, transformer and text encoder, export, measure. The same command goes on where it stopped."""
    began = time.perf_counter()
    keep_freed_memory()
    accelerator = make_accelerator(device)
    try:
        pool = load_pool(out / "pool", pictures, seed)
        scenes.load_artwork()
    except scenes.ArtworkMissing as missing:
        console.print(f"[red]{missing}[/red]")
        raise typer.Exit(2) from missing
    state, folder = out / "state", out / "emoji-wan"
    vae = train_vae(pool, state, (steps_pictures, steps_clips), seed, accelerator)
    latents = encode_clips(vae, videos, state / f"wan-latents-{videos}-{seed}-{steps_pictures}-{steps_clips}.pt", seed, accelerator)
    note_statistics(vae, latents)
    judged, decibels = check_judge(vae, motion_judge.load_bundled(), seed)
    console.print(f"wan-vae: {decibels} dB; judge {judged}", highlight=False)
    transformer, text, tokenizer = train_transformer(vae, latents, state, steps_transformer, seed, accelerator)
    export(folder, vae.cpu(), transformer, text, tokenizer)
    console.print(f"exported {folder}; {time.perf_counter() - began:.0f} s in this call")
    parts = {"transformer": transformer, "autoencoder": vae, "text encoder": text}
    times = json.loads((state / "seconds.json").read_text())
    recipe: dict[str, Any] = {
        "command": (
            f"python -m diffgraft_checkpoints.train emoji-wan --out DIR --steps-pictures {steps_pictures} --steps-clips {steps_clips} "
            f"--steps-transformer {steps_transformer} --pictures {pictures} --videos {videos} --seed {seed} --device {device}"
        ),
        "stages": {name: times[name] for name in ("wan-vae-pictures", "wan-vae-clips", "wan-transformer")},
        "videos": videos,
        "hardware": hardware(accelerator.device),
        "versions": versions(),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()},
        "vae_psnr_db": decibels,
        "judge": judged,
    }
    result = evaluate(folder, folder / "grids", prompts, guidance)
    write_card(folder, recipe, result, notes.read_text() if notes else "")
    for name, row in result["scores"].items():
        console.print(f"{name}: {row['right']} / {row['total']}, 95 % interval {row['wilson_95']}", highlight=False)


CARD = """---
license: other
license_name: apache-2.0-and-ofl-1.1
pipeline_tag: text-to-video
library_name: diffusers
---
# emoji-wan

A small real text-to-video checkpoint: a standard `WanPipeline` that draws 9 frames of 64 x 64 pixels of one emoji that moves over
a plain background. Its prompts say four things that can be measured exactly (object, background colour, size and motion); how well
it follows each is in the table below. It was trained from scratch by diffgraft's own script, to try plugins on real videos without
a download and without a GPU. It is not meant for anything else.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/emoji-wan")
prompt = "a small apple moves to the left on a blue background"
frames = pipe(prompt, num_frames=9, height=64, width=64, max_sequence_length={positions}, guidance_scale={guidance}).frames[0]
```

`max_sequence_length={positions}` is needed: `WanPipeline` pads prompts with zeros up to this length, its transformer attends to the
padding too, and this one has only seen {positions} tokens.

Prompts: "a {{size}} {{object}} {{motion}} on a {{background}} background", "{{size}} {{object}}, moving to the left, {{background}}
background", "a {{background}} background with a {{size}} {{object}} that {{motion}}"; size, motion and background may be left out.

- objects: {objects}
- backgrounds: {backgrounds}
- sizes: {sizes}
- motions: {motions}

## Figures on held-out combinations

{held_out} of the {total} combinations of object, background, size and motion were never shown in training. {prompts} of them, 50
Euler steps, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32:

| | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity} between true
  renders of one caption.
- {seconds} s a clip (batches of 16) on the machine below.

Guidance scales on other held-out combinations (32 prompts):

| guidance | object | background | size | motion | all four |
|---|---|---|---|---|---|
{sweep}

The judge is `diffgraft_checkpoints.emoji.motion_judge`: object, background and size by the network of emoji-sd's judge over all frames,
the motion by the object's centres in the first, middle and last frames. Its own accuracy on held-out true renders and on their
round trips through the autoencoder:

| | object | background | size | motion |
|---|---|---|---|---|
{judged}

{notes}## Recipe

Command: `{command}`

| stage | steps | time |
|---|---|---|
{stages}

Hardware: {hardware}. Versions: {versions}. Parameters: {parts}.

- Data: {videos} rendered clips of Noto Color Emoji for the transformer (their latents are kept), ever new ones for the autoencoder:
  straight ways at free places, mirrored, rotated by up to 25 degrees, size and background level jittered; seven caption templates.
- Autoencoder: 9 x 64 x 64 x 3 to 3 x 8 x 8 x 22, L1 + MSE + gradient + KL loss on crops of pictures first, then on clips; round trip
  of held-out clips {psnr} dB.
- Transformer and text encoder: trained jointly from scratch by flow matching, AdamW (learning rate 1e-3, cosine), batch 64, bf16
  autocast, 10 % caption dropout, averaged weights (.998). Noise levels shifted by 4, then 2.5; the error of the clean latents weighted
  by clamp(SNR, 1, 5) in the first half of the steps and by clamp(10 SNR, 1, 20) in the second.
- Six of the 22 latent channels hold where a latent is (across, down and time, twice): Wan's transformer sees only distances between
  tokens, and cannot tell in noise which side is which; a ramp it can draw. The autoencoder neither writes nor reads these channels.

## Limits

One object a clip, straight motion, only the words above; 9 frames of 64 x 64, softer than the artwork; text to video only, as the
encoder leaves six channels empty. The judge is more lenient than
a person about fine detail, so look at the clips in `grids/` too.

"""
