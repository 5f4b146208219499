"""Measuring emoji-wan on held-out prompts: judge, motion, diversity, strips."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image, ImageDraw
from rich.progress import track

from ..emoji import motion, motion_judge, scenes
from ..emoji.motion_judge import FIELDS, MotionJudge
from .common import console
from .evaluate import grid, rms_distance, tally
from .vae import psnr
from .wan_vae import render_clips, round_trip

POSITIONS = 16
"""Tokens of a caption, padded; the longest has 14."""
HELD_OUT_CLIPS = 200
GUIDANCES = (2.0, 3.0, 5.0)
CALL: dict[str, Any] = {"num_frames": motion.FRAMES, "height": scenes.SIZE, "width": scenes.SIZE, "max_sequence_length": POSITIONS}
"""What every call of the pipeline needs: its own defaults are 81 frames of 480 x 832 and 512 tokens."""


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
