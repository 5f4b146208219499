"""Scorers: how well pictures show a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ImageColor

CLIP = "openai/clip-vit-base-patch32"
"""The paper's."""


@dataclass(frozen=True, eq=False)
class ClipScore:
    """|logit| of a CLIP model for each picture and its own prompt: 100 times the cosine of the two, with the usual scale."""

    model: Any
    processor: Any

    @classmethod
    def from_pretrained(cls, name: str = CLIP, **options: Any) -> ClipScore:
        """A Hub id or folder; ``options`` of transformers' ``from_pretrained``."""
        from transformers import CLIPModel, CLIPProcessor

        return cls(CLIPModel.from_pretrained(name, **options).eval(), CLIPProcessor.from_pretrained(name))

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor(text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = self.model(**inputs.to(self.model.device)).logits_per_image
        scores: list[float] = logits.diagonal().abs().tolist()
        return scores


@cache
def _paper_clip() -> ClipScore:
    return ClipScore.from_pretrained()


def clip(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The paper's scorer, downloaded at the first use and kept."""
    return _paper_clip()(images, prompts)


def colours(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """How near the pixels are to the colours that the prompt names, 1 to 100: needs no model. 50 where it names none."""
    return [_nearness(np.asarray(image.convert("RGB"), dtype=np.float64), prompt) for image, prompt in zip(images, prompts, strict=True)]


def _nearness(pixels: Any, prompt: str) -> float:
    named = [ImageColor.getrgb(word) for word in re.findall(r"[a-z]+", prompt.lower()) if word in ImageColor.colormap]
    if not named:
        return 50.0
    return float(np.mean([100 - 99 * np.abs(pixels - colour).mean() / 255 for colour in named]))
