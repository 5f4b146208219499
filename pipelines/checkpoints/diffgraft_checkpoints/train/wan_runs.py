"""Runs of emoji-wan in latents, and what is measured of them: the benchmarks of few-step plugins stand on these.

Case i is the i-th held-out caption (the checkpoint's own order) from seed i.

    judge      shares of clips whose object, background, size and motion are as the caption says, and all of them; Wilson's 95 %
    end        RMS distance of the final latents to the teacher's from the same noise
    frechet    of the latents' means over 2 x 2 fields of each frame, to the teacher's clips of the same captions from other noise; the
               teacher's own row, from its own noises, says what is left where nothing is wrong
    diversity  RMS distance of latents between four noises of one caption, eight captions

Means and ``frechet`` have a 95 % interval of a bootstrap over cases (captions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffgraft import Plugin, find_family, load_pipeline
from diffgraft.lab.metrics import Mean, share
from diffgraft.methods.decoding import decode
from diffgraft.methods.fitness import frechet
from PIL import Image, ImageDraw
from torch import Tensor

from ..emoji import motion, motion_judge
from .wan_measure import held_out_labels

BATCH, COLUMNS = 16, 6
SEEDS, CAPTIONS = 4, 8
"""Of the diversity."""
Interval = tuple[float, float, float]
"""Value and the ends of its 95 % interval."""


class WanRuns:
    """emoji-wan, ``cases`` captions of it, and what is asked of both."""

    def __init__(self, cases: int) -> None:
        self.pipe = load_pipeline("emoji-wan", plugins=[])
        self.pipe.set_progress_bar_config(disable=True)
        self.family, self.judge = find_family(type(self.pipe)), motion_judge.load_bundled()
        labels = held_out_labels()
        self.texts = [motion.caption(each) for each in labels[:cases]]
        self.several = [motion.caption(each) for each in labels[:CAPTIONS] for _ in range(SEEDS)]

    def make(self, texts: Sequence[str], first_seed: int, plugins: Iterable[Plugin], **call: Any) -> tuple[Tensor, int]:
        """(latents [cases, channels, frames, height, width], forwards of the denoiser for each clip), from seeds that follow each other."""
        self.pipe.plugins.clear()
        load_pipeline(self.pipe, plugins=list(plugins))
        asked = [list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        parts, forwards = [], []
        counting = self.pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
        try:
            for i, batch in enumerate(asked):
                noise = [torch.Generator().manual_seed(first_seed + i * BATCH + k) for k in range(len(batch))]
                parts.append(self.pipe(batch, generator=noise, output_type="latent", **call)[0].float())
        finally:
            counting.remove()
        return torch.cat(parts), len(forwards) // len(asked)

    def end(self, plugins: Iterable[Plugin], **call: Any) -> tuple[Tensor, int]:
        """A clip of each case."""
        return self.make(self.texts, 0, plugins, **call)

    def other(self, plugins: Iterable[Plugin], **call: Any) -> Tensor:
        """The cases from other noise: what ``frechet`` is measured to."""
        return self.make(self.texts, 10_000, plugins, **call)[0]

    def many(self, plugins: Iterable[Plugin], **call: Any) -> Tensor:
        """Several clips of a few captions, for ``diversity``."""
        return self.make(self.several, 1000, plugins, **call)[0]

    def clips(self, latents: Tensor) -> list[np.ndarray]:
        """Frames [frames, height, width, 3] of each."""
        return [motion.to_array(frames) for part in latents.split(4) for frames in decode(self.pipe, self.family, part, {})]

    def judged(self, clips: Sequence[np.ndarray]) -> dict[str, Interval]:
        """Shares of the first cases' clips that are as their captions say, by field, and in ``all``."""
        verdicts = {key: [bool(right) for right in row] for key, row in self.judge.score(clips, self.texts[: len(clips)]).items()}
        verdicts["all"] = [all(each) for each in zip(*verdicts.values(), strict=True)]
        shares = {key: share(row) for key, row in verdicts.items()}
        return {key: (found.share, found.low, found.high) for key, found in shares.items()}


def distances(made: Tensor, teacher: Tensor, other: Tensor, many: Tensor) -> dict[str, Interval]:
    """``end``, ``frechet`` (of as many cases as ``other`` has) and ``diversity`` of latents [cases, channels, frames, height, width]."""
    apart = (made - teacher).square().flatten(1).mean(1).sqrt().tolist()
    close = frechet_interval(fields(made[: len(other)]), fields(other))
    return {"end": interval(apart), "frechet": close, "diversity": interval(spread(many))}


def fields(x: Tensor) -> Tensor:
    """Means over 2 x 2 fields of each latent frame [n, channels * frames * 4]."""
    return torch.nn.functional.adaptive_avg_pool3d(x, (x.shape[2], 2, 2)).flatten(1).double()


def frechet_interval(x: Tensor, other: Tensor, draws: int = 100) -> Interval:
    """Basic bootstrap over cases: the bias that resampling itself has goes out."""
    rng, found = np.random.default_rng(0), frechet(x, other)
    again = np.array([frechet(x[torch.from_numpy(rng.integers(0, len(x), len(x)))], other) for _ in range(draws)])
    low, high = np.percentile(again - again.mean() + found, [2.5, 97.5])
    return found, float(low), float(high)


def spread(x: Tensor) -> list[float]:
    """Of each caption the mean RMS distance between its :data:`SEEDS` clips."""
    return [float(np.mean([float((a - b).square().mean().sqrt()) for a, b in combinations(rows, 2)])) for rows in x.split(SEEDS)]


def interval(values: Sequence[float]) -> Interval:
    """Mean of values with its interval."""
    found = Mean.of(values)
    return found.mean, found.low, found.high


def told(row: Mapping[str, Any]) -> str:
    """A row's intervals in one line."""
    return ", ".join("{} {:.3f} ({:.3f} to {:.3f})".format(key, *value) for key, value in row.items() if isinstance(value, (tuple, list)))


def sheet(shown: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """The first clips of each run: first, middle and last frame."""
    side, left = 56, 130
    page = Image.new("RGB", (left + COLUMNS * (3 * side + 4), len(shown) * (side + 2)), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, clips) in enumerate(shown.items()):
        pen.multiline_text((4, y * (side + 2) + 4), name, fill="black", font_size=11)
        for x, clip in enumerate(clips[:COLUMNS]):
            for k, i in enumerate((0, len(clip) // 2, -1)):
                frame = Image.fromarray(clip[i]).resize((side - 1, side - 1), Image.Resampling.LANCZOS)
                page.paste(frame, (left + x * (3 * side + 4) + k * side, y * (side + 2)))
    page.quantize(128).save(path, optimize=True)
