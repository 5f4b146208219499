"""Layouts like those of ELLA and of rCM, that several files of tests share."""

from __future__ import annotations

import torch
from diffgraft.methods.layouts import Layout
from diffgraft.methods.published import spec_of


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


BLOCK = "connector.perceiver_blocks.{i}"
ELLA = Layout(
    {
        **linear("time_embedding.linear_1", "d", "t"),
        **linear("time_embedding.linear_2", "d", "d"),
        "connector.latents": ("n", "d"),
        **linear("connector.time_aware_linear", "d", "d"),
        **linear("connector.proj_in", "d", "text"),
        f"{BLOCK}.attn.in_proj_weight": ("3*d", "d"),
        f"{BLOCK}.attn.in_proj_bias": ("3*d",),
        **linear(f"{BLOCK}.attn.out_proj", "d", "d"),
        **linear(f"{BLOCK}.mlp.c_fc", "4*d", "d"),
        **linear(f"{BLOCK}.mlp.c_proj", "d", "4*d"),
        **linear(f"{BLOCK}.ln_1.linear", "2*d", "d"),
        **linear(f"{BLOCK}.ln_2.linear", "2*d", "d"),
        **linear(f"{BLOCK}.ln_ff.linear", "2*d", "d"),
    },
    counts={"i": 6},
    prefixes=("module.",),
    small={"d": 8, "t": 12, "n": 4, "text": 20},
)
RCM = Layout(
    {
        "patch_embedding.weight": ("dim", 16, 1, 2, 2),
        "patch_embedding.bias": ("dim",),
        "blocks.{i}.q.weight": ("dim", "dim"),
        "blocks.{i}.mod": (1, 6, "dim"),
        "steps": (),
        "table": ("k",),
    },
    prefixes=("net.",),
    renames={".to_q.": ".q."},
    reshapes={"patch_embedding.weight": ("dim", 64)},
    optional=("table", "steps"),
    ignored=("*._extra_state", "logvar.*"),
    dtypes={"table": (torch.int64,)},
    inside=("state_dict",),
    small={"dim": 6, "i": 3, "k": 5},
)


def specs(state):
    return {key: spec_of(value) for key, value in state.items()}
