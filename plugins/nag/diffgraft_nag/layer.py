"""One cross-attention layer asked twice, by the processor that was there, with its output projection in our hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import AttentionCall
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]
"""(Z+, Z-) -> what the output projection gets."""


@dataclass(frozen=True)
class Window:
    """How the text of a denoiser call is laid out: ``positive`` tokens, behind them ``negative`` ones; of the batch's ``parts`` equal
    parts number ``at`` is the conditional one."""

    positive: int
    negative: int
    parts: int
    at: int


class Through:
    """An attention module whose output projection begins with ``first``; everything else is the module's own."""

    def __init__(self, attn: Any, first: Callable[..., Tensor], **changed: Any) -> None:
        self.attn = attn
        self.to_out = (first, *attn.to_out[1:])
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["attn"], name)


def ask_twice(call: AttentionCall, next: Any, window: Window, combine: Combine) -> Any:
    """The layer's answer with Z+ replaced by ``combine(Z+, Z-)`` in the conditional rows; the other rows see their own text alone.

    A layer whose text is not the widened one (another plugin has given it its own, or it has none) is asked as it is.
    """
    given = call.get("encoder_hidden_states")
    text = given[0] if isinstance(given, tuple) else given
    both = window.positive + window.negative
    if text is None or text.shape[1] < both:
        return next(call)
    attn: Any = call["attn"]
    rows, before = text.shape[0], text.shape[1] - both  # before the text: the start picture's tokens of Wan
    middle = before + window.positive
    mask = call.get("attention_mask")
    masked = mask is not None and mask.shape[-1] == both

    def with_text(tokens: Tensor, part: slice) -> dict[str, Any]:
        changes: dict[str, Any] = {"encoder_hidden_states": (tokens, *given[1:]) if isinstance(given, tuple) else tokens}
        return changes | ({"attention_mask": mask[..., part]} if masked else {})

    positive = with_text(text[:, :middle], slice(window.positive))
    behind = torch.cat([text[:, :before], text[:, middle:]], 1) if before else text[:, middle:]
    asked = {**call.arguments(), **with_text(behind, slice(window.positive, None))}
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

    negative = {name: cut(value, rows, window) for name, value in asked.items() if name != "attn"}
    next(call.replace(**negative, attn=Through(attn, keep, residual_connection=False)))
    return next(call.replace(**positive, attn=Through(attn, project)))


def cut(value: Any, rows: int, window: Window) -> Any:
    """The conditional part of an argument of a layer of ``rows`` rows, in tuples and lists too; what is common to all rows stays."""
    if window.parts == 1:
        return value
    if isinstance(value, Tensor):
        for_rows = value.ndim > 0 and value.shape[0] > 0 and value.shape[0] % rows == 0
        return value.chunk(window.parts)[window.at] if for_rows else value
    if type(value) in (list, tuple):
        return type(value)(cut(each, rows, window) for each in value)
    return value
