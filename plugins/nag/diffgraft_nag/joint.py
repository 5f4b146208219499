"""Joint attention, where text and picture share one attention: the negative text goes through the blocks in rows of its own.

A denoiser call of rows [..., cond, ...] gets as many rows behind it as "cond" has, with the negative text and the same picture. Where a
block holds the two streams apart, the negative rows have no picture of their own: their layers read the conditional rows' picture, and
what that becomes is put into both. Where a block has both in one stream, the picture of the negative rows goes on by itself, as in the
official code; it differs from the conditional one by what a pooled text does to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import AttentionCall, BlockInfo, DenoiseCall, Family, Unsupported
from diffgraft.methods.through import Through
from torch import Tensor, nn

from diffgraft_nag.layer import Combine, as_rows

TEXT, STREAM = "encoder_hidden_states", "hidden_states"


@dataclass
class Beside:
    """The layout of a widened denoiser call.

    parts, at  of the batch's equal parts number ``at`` is the conditional one, the last one the negative text's
    rows       of the whole batch: a plugin further in may ask the denoiser for fewer, which are not guided
    picture    how many tokens the picture has, as the layers that hold the text apart say it
    """

    parts: int
    at: int
    rows: int
    picture: int = 0

    def one_picture(self, stream: Tensor) -> Tensor:
        """``stream`` [rows, tokens, width] with the conditional rows' picture in the negative ones."""
        parts = list(stream.chunk(self.parts))
        parts[-1] = parts[self.at]
        return torch.cat(parts)

    def mixed(self, Z: Tensor, combine: Combine) -> Tensor:
        """Z [rows, tokens, width] with the combined picture in the conditional and the negative rows; text tokens, in front, stay."""
        parts = list(Z.chunk(self.parts))
        text = Z.shape[1] - self.picture
        picture = combine(parts[self.at][:, text:], parts[-1][:, text:])
        for number in (self.at, -1):
            parts[number] = torch.cat([parts[number][:, :text], picture], 1) if text else picture
        return torch.cat(parts)


def is_joint(family: Family) -> bool:
    """Whether the text goes through the blocks beside the picture."""
    return any(TEXT in group.returns for group in family.blocks)


def holds_text_apart(block: BlockInfo) -> bool:
    """Whether a block has a stream for the text, and its attention projections of its own for it."""
    attn = getattr(block.module, "attn", None)
    return not block.is_layer and TEXT in block.returns and getattr(attn, "added_kv_proj_dim", None) is not None


def widened(call: DenoiseCall, branch: str, heard: Mapping[str, Any]) -> DenoiseCall:
    """``call`` with as many rows behind its own as ``branch`` has: that branch's, with the conditioning ``heard`` of the negative text.

    Raises:
        Unsupported: the two texts have other numbers of tokens, and the model has no mask for what would fill the shorter one up.
    """
    own = call.only(branch).arguments()
    rows = call.sample.shape[0]
    each = rows // len(call.branches)
    masks = {name: None for name in call.family.conditioning if name.endswith("mask")}  # a negative text without one has no padding
    behind = {**own, **masks, **{name: as_rows(value, each) for name, value in heard.items()}}
    given = call.arguments() | even(call, behind)
    changes = {name: put_behind(value, behind[name], rows, each) for name, value in given.items() if name not in call.family.common}
    new: DenoiseCall = call.replace(**changes)
    new.branches = (*call.branches, "negative")  # check: allow foreign_writes because `replace` has just made this copy
    return new


def even(call: DenoiseCall, behind: dict[str, Any]) -> dict[str, Tensor]:
    """The call's text and mask, filled up to the longer text, nothing where they fit as they are; ``behind``'s are filled up in place."""
    text, other = call[TEXT], behind[TEXT]
    name = next((name for name in call.family.conditioning if name.endswith("mask")), None)
    mask, negative = (None, None) if name is None else (call.get(name), behind.get(name))
    if text.shape[1] == other.shape[1] and (mask is None) == (negative is None):
        return {}
    tokens = max(text.shape[1], other.shape[1])
    kind = next((x.dtype for x in (mask, negative) if x is not None), torch.bool)
    mask, negative = (t.new_ones(t.shape[:2], dtype=kind) if x is None else x for x, t in ((mask, text), (negative, other)))
    if name is None or mask.shape[1] != text.shape[1]:
        raise Unsupported(
            f"nag: the prompt has {text.shape[1]} tokens and the negative one {other.shape[1]}, and {type(call.model).__name__} takes no "
            "mask of the text alone; give both as text, or embeddings of one length"
        )
    behind.update({TEXT: filled_up(other, tokens), name: filled_up(negative, tokens)})
    return {TEXT: filled_up(text, tokens), name: filled_up(mask, tokens)}


def filled_up(x: Tensor, tokens: int) -> Tensor:
    """x [rows, tokens, ...] with zeros behind up to so many ``tokens``."""
    return torch.cat([x, x.new_zeros(x.shape[0], tokens - x.shape[1], *x.shape[2:])], 1)


def put_behind(value: Any, behind: Any, rows: int, each: int) -> Any:
    """``value`` with ``behind`` as ``each`` further rows, in lists and dicts too; what is no tensor of ``rows`` rows stays, but for a list
    with an entry a row (Qwen-Image's sizes)."""
    if isinstance(value, Tensor):
        for_rows = value.ndim > 0 and value.shape[0] > 0 and value.shape[0] % rows == 0
        return torch.cat([value, behind.to(value)]) if for_rows else value
    if isinstance(value, dict):
        return {key: put_behind(item, behind[key], rows, each) for key, item in value.items()}
    if type(value) is list and len(value) == rows and not any(isinstance(item, Tensor) for item in value):
        return [*value, *behind[-each:]]
    if type(value) in (list, tuple):
        return type(value)(put_behind(item, other, rows, each) for item, other in zip(value, behind, strict=True))
    return value


def ask_beside(call: AttentionCall, next: Any, rows: Beside, combine: Combine) -> Any:
    """The layer's answer with its picture Z+ replaced by ``combine(Z+, Z-)`` in the conditional and the negative rows.

    A layer of the picture alone is asked as it is, and so is one of the text alone before the first block.
    """
    stream, attn, text = call[STREAM], call["attn"], call.get(TEXT)
    if len(stream) != rows.rows or (text is None and not 0 < rows.picture < stream.shape[1]):
        return next(call)
    if text is not None:
        rows.picture = stream.shape[1]
    out: Any = getattr(attn, "to_out", None)
    if out is None:  # the block projects, with more than the attention beside it (Flux)
        Z = next(call)
        return rows.mixed(Z, combine) if isinstance(Z, Tensor) else (rows.mixed(Z[0], combine), *Z[1:])
    if text is not None:
        stream = rows.one_picture(stream)
    many = isinstance(out, nn.ModuleList)

    def project(Z: Tensor, *rest: Any) -> Tensor:
        width = Z.shape[-1] if many else attn.inner_dim  # a projection of its own takes the feed-forward's features behind Z (FLUX.2)
        mixed = torch.cat([rows.mixed(Z[..., :width], combine), Z[..., width:]], -1)
        return (out[0] if many else out)(mixed, *rest)  # type: ignore[no-any-return]

    through = Through(attn, to_out=(project, *out[1:]) if many else project)
    return next(call.replace(attn=through, **{STREAM: stream}))


def with_one_picture(out: Sequence[Any], returns: Sequence[str], rows: Beside) -> tuple[Any, ...]:
    """What a block returned, with the conditional rows' picture in the negative ones."""
    return tuple(rows.one_picture(x) if name == STREAM and len(x) == rows.rows else x for name, x in zip(returns, out, strict=True))
