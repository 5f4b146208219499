"""The weights that are published (worstcoder/rcm-Wan): their layout, and their place in diffusers' transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffgraft.methods.axes import Axes
from diffgraft.methods.layouts import Layout
from torch import Tensor, nn

NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    ".self_attn.": ".attn1.",
    ".cross_attn.": ".attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    ".norm3.": ".norm2.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".modulation": ".scale_shift_table",
}
"""Part of a published key -> the same in diffusers; in this order."""


def linear(name: str, out: str, into: str) -> dict[str, Axes]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def keys() -> dict[str, Axes]:
    """Letters: d width, c and o channels in and out, x text, f time's frequencies, h feed-forward; {i} blocks."""
    found: dict[str, Axes] = {"patch_embedding.weight": ("d", "c", 1, 2, 2), "patch_embedding.bias": ("d",)}
    found |= linear("text_embedding.0", "d", "x") | linear("text_embedding.2", "d", "d")
    found |= linear("time_embedding.0", "d", "f") | linear("time_embedding.2", "d", "d") | linear("time_projection.1", "6*d", "d")
    for attention in ("self_attn", "cross_attn"):
        for layer in "qkvo":
            found |= linear(f"blocks.{{i}}.{attention}.{layer}", "d", "d")
        found |= {f"blocks.{{i}}.{attention}.norm_{layer}.weight": ("d",) for layer in "qk"}
    found |= {"blocks.{i}.norm3.weight": ("d",), "blocks.{i}.norm3.bias": ("d",), "blocks.{i}.modulation": (1, 6, "d")}
    found |= linear("blocks.{i}.ffn.0", "h", "d") | linear("blocks.{i}.ffn.2", "d", "h")
    return found | linear("head.head", "4*o", "d") | {"head.modulation": (1, 2, "d")}


LAYOUT = Layout(
    keys(),
    prefixes=("net.",),
    reshapes={"patch_embedding.weight": ("d", "4*c")},  # rCM's own network embeds patches by a linear layer
    small={"d": 12, "c": 16, "o": 16, "x": 16, "f": 256, "h": 32, "i": 2},
)
"""Wan 2.1, text to video, under its original names."""


def as_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors by the names of diffusers' ``WanTransformer3DModel``."""
    found = {}
    for key, value in tensors.items():
        for old, new in NAMES.items():
            key = key.replace(old, new)
        found[key] = value
    return found


def misfits(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """What of published tensors, by diffusers' names, has no place in ``model``, and what of it would be left without."""
    here = {name: tuple(value.shape) for name, value in model.named_parameters()}
    wrong = [f"{name} is {list(state[name].shape)}, here {list(here[name])}" for name in here if name in state and
             tuple(state[name].shape) != here[name]]  # fmt: skip
    wrong += [f"{name} has no place here" for name in state if name not in here]
    return wrong + [f"{name} is missing" for name in here if name not in state]


def filled(model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """A transformer like ``model`` with these weights, in its dtypes and on its device; ``model`` is not touched."""
    with torch.device("meta"):
        new = type(model).from_config(model.config)
    own = dict(model.named_parameters())
    values = {name: value.to(own[name].device, own[name].dtype, copy=True) for name, value in state.items()}
    new.load_state_dict(values, strict=False, assign=True)  # the rotary table is no parameter, and stays the pipeline's
    for name, value in new.named_parameters():
        value.requires_grad_(own[name].requires_grad)
    return new.train(model.training)  # type: ignore[no-any-return]
