"""Cross-attention maps while a denoiser runs: of which layers, of which size, and of which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import AttentionCall, ConfigError
from torch import Tensor

NATIVE = 16
"""Side of the paper's maps: those in the middle of Stable Diffusion 1.x at 512 pixels."""


class Enough(Exception):  # ends a denoiser call that is made for its maps; not an error
    pass


@dataclass
class Seen:
    """Maps of one size: the sum over ``layers`` layers [rows, pixels, tokens] with its graph, and the number of the last of them."""

    total: Tensor
    layers: int
    last: int


@dataclass
class Collector:
    """The maps of one denoiser call, by number of pixels.

    wanted  pixels of the maps to keep; None: all
    last    number of the last layer with such maps, where the call may end; None: it runs to its end
    closed  the call is over: what comes now are blocks that are computed again for their gradient
    """

    wanted: int | None = None
    last: int | None = None
    closed: bool = False
    seen: dict[int, Seen] = field(default_factory=dict)

    def look(self, call: AttentionCall) -> None:
        """Take the maps of one layer. Raises Enough after the last one."""
        pixels, order = call["hidden_states"].shape[1], call.info.order
        if self.wanted not in (None, pixels):
            return
        found = probabilities(call)
        if self.closed:
            return
        before = self.seen.get(pixels)
        self.seen[pixels] = Seen(found, 1, order) if before is None else Seen(before.total + found, before.layers + 1, order)
        if order == self.last:
            raise Enough

    def mean(self, pixels: int) -> Tensor:
        """Mean over the layers, [rows, pixels, tokens]."""
        seen = self.seen[pixels]
        return seen.total / seen.layers


def probabilities(call: AttentionCall) -> Tensor:
    """softmax(Q K^T / sqrt(d)) of a cross-attention layer, mean over its heads: [rows, pixels, tokens], float32."""
    attn: Any = call.attn
    image, text, mask = call["hidden_states"], call["encoder_hidden_states"], call.get("attention_mask")
    text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter's picture comes behind it
    text = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
    image = image if attn.group_norm is None else attn.group_norm(image.transpose(1, 2)).transpose(1, 2)
    q, k = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(image), attn.to_k(text)))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    scores = (q.float() @ k.float().transpose(-1, -2)) * attn.scale
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
        scores = scores + mask.view(text.shape[0], attn.heads, -1, mask.shape[-1])
    return scores.softmax(-1).mean(1)


def side_lengths(pixels: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of a map: the latents' ``size`` halved (rounded up) until it has so many pixels; None where it never has."""
    h, w = size
    while h * w > pixels:
        h, w = -(-h // 2), -(-w // 2)
    return (h, w) if h * w == pixels else None


def choose(found: Iterable[int], size: tuple[int, int], resolution: int | None) -> int:
    """Pixels of the maps to use: those whose shorter side is ``resolution``; by default the smallest of at least 16, else the largest.

    Raises:
        ConfigError: there are none of this resolution.
    """
    by_side = {min(sides): pixels for pixels in found if (sides := side_lengths(pixels, size)) is not None}
    if resolution is None:
        wide = [side for side in by_side if side >= NATIVE]
        resolution = min(wide) if wide else max(by_side, default=0)
    if resolution not in by_side:
        there = ", ".join(str(side) for side in sorted(by_side)) or "none"
        raise ConfigError(
            f"plugin 'a_star': resolution = {resolution}: latents of {size[0]} x {size[1]} have no cross-attention maps with this shorter "
            f"side; they have: {there}"
        )
    return by_side[resolution]


def token_weights(concepts: Sequence[Sequence[Sequence[int]]], rows: int, tokens: int) -> Tensor:
    """[rows, M, tokens]: 1/n at the n tokens of each concept, zeros for concepts that a prompt does not have.

    ``concepts``: token indices by prompt and concept; the samples of one prompt follow each other.
    """
    W = torch.zeros(len(concepts), max(map(len, concepts)), tokens)
    for p, prompt in enumerate(concepts):
        for m, indices in enumerate(prompt):
            W[p, m, list(indices)] = 1 / len(indices)
    return W.repeat_interleave(rows // len(concepts), 0)
