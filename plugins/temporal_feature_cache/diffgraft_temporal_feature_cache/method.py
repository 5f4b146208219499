"""The time path of a denoiser: what its layers are called, and what of a run they depend on. Free of diffusers.

    emb = MLP(sinusoid(t)) + MLP(pooled)        features_i = W_i silu(emb) + b_i, one for each block

None of it sees the latents; of a text it sees one pooled vector, if any. A schedule has finitely many t, so there are finitely many
features.
"""

from __future__ import annotations

import re

EMBEDDERS = (
    r"(?:time_embedding|timestep_embedder|time_embedder|guidance_embedder|resolution_embedder|aspect_ratio_embedder|add_embedding"
    r"|class_embedding)"
)
"""Names of the modules that embed t, and the pooled inputs that are added to it."""

TIME_PATH = re.compile(
    r"(?:^|\.)(?:"
    rf"{EMBEDDERS}\.(?:linear_1|linear_2|cond_proj|proj|image_proj|text_proj)"  # their MLPs
    r"|add_embedding\.pool\.[qkv]_proj"  # of a whole text to one vector
    r"|time_text_embed\.text_embedder\.linear_[12]"  # SD3, Flux: of the pooled text; PixArt's and Wan's text embedders see tokens
    r"|time_emb_proj"  # U-Nets
    r"|time_proj|adaln_single\.linear"  # Wan, PixArt: one projection for all blocks
    r"|(?:transformer_blocks|single_transformer_blocks)\.\d+\.norm(?:1|1_context)?\.linear"  # DiT, SD3, Flux: one for each
    r"|norm_out\.linear|proj_out_1"
    r")$"
)
"""Paths of linear layers of the time path, as diffusers calls them, without those that a LoRA brings (``.base_layer``)."""

BEFORE = re.compile(rf"(?:^|\.)(?:{EMBEDDERS}|class_embedder|time_proj)(?:\.|$)")
"""Paths of what else lies in these modules: tables of classes, frequencies, norms."""

POOLED = ("class_labels", "timestep_cond", "pooled_projections", "guidance", "added_cond_kwargs", "added_time_ids")
"""Arguments of denoisers that enter the time path beside the timestep."""


def is_temporal(path: str) -> bool:
    """Whether a linear layer with this path lies on the time path."""
    return TIME_PATH.search(path) is not None


def enters(path: str) -> bool:
    """Whether the parameters of a module with this path enter the features."""
    return is_temporal(path) or BEFORE.search(path) is not None
