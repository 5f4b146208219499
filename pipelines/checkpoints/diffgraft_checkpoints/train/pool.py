"""The pool of rendered training scenes: pictures, labels and captions, made once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..emoji import scenes
from .common import console, write_atomic

CHUNK = 2000


@dataclass
class Pool:
    """`pictures` (N, 3, 64, 64) uint8, `labels` (N, 4) class indices, `centers` (N, 2) object centres in pixels."""

    pictures: Tensor
    labels: Tensor
    centers: Tensor

    def captions(self, index: Tensor, rng: np.random.Generator) -> list[str]:
        """A freshly drawn caption for each scene in `index`."""
        return [scenes.caption(decode_labels(row), rng) for row in self.labels[index].tolist()]


@dataclass
class Pairs:
    """`pictures` (N, 3, 64, 64) uint8 of two objects, `labels` (N, 2, 4) class indices."""

    pictures: Tensor
    labels: Tensor

    def captions(self, index: Tensor, rng: np.random.Generator) -> list[str]:
        """A freshly drawn caption for each pair in `index`; either object is named first."""
        drawn = []
        for rows in self.labels[index].tolist():
            first, second = (decode_labels(row) for row in rows)
            drawn.append(scenes.pair_caption((first, second) if rng.random() < 0.5 else (second, first), rng))
        return drawn


CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(scenes.OBJECTS), tuple(scenes.BACKGROUNDS), tuple(scenes.SIZES), tuple(scenes.PLACES),
)  # fmt: skip


def encode_labels(labels: scenes.Labels) -> list[int]:
    """Complete labels as four class indices."""
    values = (labels.object, labels.background, labels.size, labels.place)
    return [names.index(str(value)) for names, value in zip(CLASSES, values, strict=True)]


def decode_labels(row: list[int]) -> scenes.Labels:
    """The inverse of `encode_labels`."""
    return scenes.Labels(*(names[i] for names, i in zip(CLASSES, row, strict=True)))


Job = tuple[int, int, int, bool, bool]
"""Seed, first index, last index + 1, from the held-out combinations?, upright?"""


def draw_scene(seed: int, index: int, held_out: bool = False, upright: bool = False) -> scenes.Scene:
    """Scene `index` of the pool of `seed`."""
    combinations = scenes.split()[1 if held_out else 0]
    rng = np.random.default_rng([seed, index])
    scene = scenes.sample_scene(combinations[int(rng.integers(len(combinations)))], rng)
    return scenes.upright(scene) if upright else scene


Draw = Callable[[int, int, bool, bool], scenes.Scene]
"""How the scene of seed, index, held out?, upright? is found."""


def render_chunk(job: Job, draw: Draw = draw_scene) -> tuple[np.ndarray, list[list[int]], list[tuple[float, float]]]:
    """Scenes `start` to `stop` - 1 of the pool of `seed`, from the training or the held-out combinations."""
    seed, start, stop, held_out, upright = job
    pictures, labels, centers = [], [], []
    for index in range(start, stop):
        scene = draw(seed, index, held_out, upright)
        pictures.append(np.asarray(scenes.render(scene)))
        labels.append(encode_labels(scene.labels))
        centers.append((scene.x, scene.y))
    return np.stack(pictures), labels, centers


def load_pool(folder: Path, count: int, seed: int, held_out: bool = False, upright: bool = False) -> Pool:
    """The pool from `folder`, rendered first where it is not there yet; `upright`: with objects as the artist drew them."""
    path = folder / f"{'held-out' if held_out else 'training'}-{count}-{seed}{'-upright' if upright else ''}.pt"
    return load_rendered(path, draw_scene, count, seed, held_out, upright)


def load_rendered(path: Path, draw: Draw, count: int, seed: int, held_out: bool, upright: bool) -> Pool:
    """The pool in `path`, rendered first, in chunks on all cores, where it is not there yet."""
    if not path.exists():
        scenes.load_artwork()
        console.print(f"rendering {count} scenes")
        jobs = [(seed, start, min(start + CHUNK, count), held_out, upright) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor() as workers:
            parts = list(workers.map(partial(render_chunk, draw=draw), jobs))
        state = {
            "pictures": torch.from_numpy(np.concatenate([p[0] for p in parts])).permute(0, 3, 1, 2).contiguous(),
            "labels": torch.tensor([row for p in parts for row in p[1]]),
            "centers": torch.tensor([row for p in parts for row in p[2]]),
        }
        write_atomic(path, lambda p: torch.save(state, p))
    return Pool(**torch.load(path, weights_only=True, mmap=True))


def render_pairs(job: Job) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Pairs `start` to `stop` - 1 of the pairs of `seed`, of training or held-out pairs of objects."""
    seed, start, stop, held_out, upright = job
    pictures, labels = [], []
    for index in range(start, stop):
        rng = np.random.default_rng([seed, index, 2])
        both = scenes.sample_pair(scenes.draw_pair(rng, held_out), rng)
        both = (scenes.upright(both[0]), scenes.upright(both[1])) if upright else both
        pictures.append(np.asarray(scenes.render(*both)))
        labels.append([encode_labels(scene.labels) for scene in both])
    return np.stack(pictures), labels


def load_pairs(folder: Path, count: int, seed: int, upright: bool = False) -> Pairs:
    """The training pairs from `folder`, rendered first where they are not there yet; `upright`: as in `load_pool`."""
    path = folder / f"pairs-{count}-{seed}{'-upright' if upright else ''}.pt"
    if not path.exists():
        scenes.load_artwork()
        console.print(f"rendering {count} pairs")
        jobs = [(seed, start, min(start + CHUNK, count), False, upright) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor() as workers:
            parts = list(workers.map(render_pairs, jobs))
        state = {
            "pictures": torch.from_numpy(np.concatenate([p[0] for p in parts])).permute(0, 3, 1, 2).contiguous(),
            "labels": torch.tensor([row for p in parts for row in p[1]]),
        }
        write_atomic(path, lambda p: torch.save(state, p))
    return Pairs(**torch.load(path, weights_only=True, mmap=True))


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """uint8 (N, 3, H, W) as PIL pictures."""
    return [Image.fromarray(p) for p in pictures.permute(0, 2, 3, 1).numpy()]


def from_images(images: Sequence[Image.Image]) -> Tensor:
    """PIL pictures as uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2)
