"""One cross-attention layer asked twice, by the processor that was there, with its output projection in our hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import AttentionCall, Unsupported
from diffgraft.methods.conditioning import part_of
from diffgraft.methods.through import Through
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]
"""(Z+, Z-) -> what the output projection gets."""


@dataclass(frozen=True)
class Window:
    """Where a layer finds the negative text of a denoiser call.

    parts, at  of the batch's equal parts number ``at`` is the conditional one
    rows       how many rows its layers have: a plugin further in may ask the denoiser for one part alone, which is not guided
    text       the negative text of that part's samples, as the layers of a U-Net take it; None: it comes with the positive one,
    positive, negative  of which so many tokens are, the negative ones behind
    """

    parts: int
    at: int
    rows: int
    text: Tensor | None = None
    positive: int = 0
    negative: int = 0


def ask_twice(call: AttentionCall, next: Any, window: Window, combine: Combine) -> Any:
    """The layer's answer with Z+ replaced by ``combine(Z+, Z-)`` in the conditional rows; the other rows see their own text alone.

    A layer that has no text, or another one than the widened one (another plugin's), is asked as it is; one of other rows than the widened
    call's, with the positive text alone.
    """
    given = call.get("encoder_hidden_states")
    text = given[0] if isinstance(given, tuple) else given  # behind it an IP-Adapter's picture
    both = window.positive + window.negative
    if text is None or text.shape[1] < both:
        return next(call)
    attn: Any = call["attn"]
    if len(text) != window.rows:
        return next(call.replace(**without_negative(call, text, window))) if window.text is None else next(call)
    positive: dict[str, Any] = {} if window.text is not None else without_negative(call, text, window)
    negative = {name: cut(value, text.shape[0], window) for name, value in call.arguments().items() if name != "attn"}
    if window.text is not None:
        behind = as_rows(window.text, len(text) // window.parts)
    else:
        before = text.shape[1] - both  # of the start picture, in Wan
        middle = before + window.positive
        behind = cut(torch.cat([text[:, :before], text[:, middle:]], 1) if before else text[:, middle:], len(text), window)
        if call.get("attention_mask") is not None:
            negative["attention_mask"] = negative["attention_mask"][..., window.positive :]
    tail = negative["encoder_hidden_states"]
    negative["encoder_hidden_states"] = (behind, *tail[1:]) if isinstance(tail, tuple) else behind
    found: list[Tensor] = []

    def keep(Z: Tensor, *_: Any) -> Tensor:
        found.append(Z)
        return Z

    def project(Z: Tensor, *rest: Any) -> Tensor:
        if not found:  # answered by another plugin, without the layer
            return attn.to_out[0](Z, *rest)  # type: ignore[no-any-return]
        parts = list(Z.chunk(window.parts))
        parts[window.at] = combine(parts[window.at], found[-1])
        return attn.to_out[0](parts[0] if len(parts) == 1 else torch.cat(parts), *rest)  # type: ignore[no-any-return]

    next(call.replace(**negative, attn=Through(attn, to_out=(keep, *attn.to_out[1:]), residual_connection=False)))
    return next(call.replace(**positive, attn=Through(attn, to_out=(project, *attn.to_out[1:]))))


def without_negative(call: AttentionCall, text: Tensor, window: Window) -> dict[str, Tensor]:
    """The lengthened text of a layer, and its mask, without the negative tokens."""
    changes = {"encoder_hidden_states": text[:, : text.shape[1] - window.negative]}
    if (mask := call.get("attention_mask")) is not None:
        changes["attention_mask"] = mask[..., : window.positive]
    return changes


def cut(value: Any, rows: int, window: Window) -> Any:
    """The conditional part of an argument of a layer of ``rows`` rows; what is common to all rows stays."""
    return value if window.parts == 1 else part_of(value, rows, window.parts, window.at)


def as_rows(x: Tensor, rows: int) -> Tensor:
    """x [samples, ...] for ``rows`` rows, which are the samples, or several of each (frames), one behind the other.

    Raises:
        Unsupported: they are neither.
    """
    if len(x) == rows:
        return x
    if rows % len(x):
        raise Unsupported(f"nag: the denoiser is asked for {rows} rows, and the negative prompt was encoded for {len(x)}")
    return x.repeat_interleave(rows // len(x), 0)
