"""A model's own configuration, shrunk: what its class takes by default, with sizes that make a forward of milliseconds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from torch import nn

HEADS, HEAD = 2, 16
WIDTH = HEADS * HEAD
"""Of everything that is as wide as the model; also of the texts that come in."""

SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("num_layers", "num_single_layers", "num_hidden_layers", "n_layers", "depth", "num_visual_blocks"), 2),
    **dict.fromkeys(("num_text_blocks", "num_refiner_layers", "n_refiner_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("attention_head_dim", "head_dim"), HEAD),
    **dict.fromkeys(("hidden_size", "dim", "model_dim", "inner_dim", "caption_projection_dim", "cross_attention_dim"), WIDTH),
    **dict.fromkeys(("joint_attention_dim", "text_embed_dim", "text_dim", "caption_channels", "cap_feat_dim", "in_text_dim"), WIDTH),
    **dict.fromkeys(("in_text_dim2", "pooled_projection_dim", "condition_dim", "time_embed_dim", "time_dim", "freq_dim"), WIDTH),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size"), 2 * WIDTH),
}
"""By the names that diffusers' transformers give their sizes."""
ROPE = ("axes_dims_rope", "rope_axes_dim", "axes_dims", "axes_dim_rope", "rope_dim_list")
"""Parts of a head, one for each axis of a position; they add up to it."""


def small(name: str, **config: Any) -> nn.Module:
    """A model of diffusers by its class's name, with the sizes of :data:`SMALL` where its class has them; ``config`` has the last word.

    Raises:
        TypeError: the class has no such setting.
    """
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    sizes = {key: value for key, value in SMALL.items() if key in known and known[key].default is not None}
    sizes |= {key: axes(len(known[key].default), HEAD) for key in ROPE if key in known and known[key].default}
    model: nn.Module = cls(**{**sizes, **config})
    return model


def axes(number: int, total: int) -> tuple[int, ...]:
    """``total`` in so many even parts, the last one the largest."""
    each = total // number // 2 * 2
    return (*[each] * (number - 1), total - each * (number - 1))
