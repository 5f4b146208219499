"""The knobs of HarmoniCa, the layers that it works on, and what its file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgraft import BlockInfo, Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.schema import Holds, Values
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_harmonica.method import ALWAYS

PAPER = Paper(
    title="HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer Acceleration",
    arxiv="2410.01723",
    implemented="the router, its step-wise denoising training and image error proxy-guided objective, on DiT and PixArt",
    omitted="the guidance of three channels out of four that the official DiT code has from DiT's, and the learned variance in its loss",
    licence="official code Apache-2.0; written from its formulas",
)
LAYERS = (".attn1", ".attn2", ".ff")
"""Ends of the kinds of layers that are routed: attention and feed-forward of each block, before its gate."""


class HarmoniCaConfig(PluginConfig):
    """Knobs of HarmoniCa."""

    router: str | Path | Artefact | None = Field(
        None, description="the learned router: a file that `diffgraft fit harmonica` wrote, owner/name/file.safetensors, or an Artefact"
    )
    threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description="tau: a layer computes where its score is above this; larger reuses more; 0 is off (all scores are above)",
    )


class RouterFitConfig(PluginConfig):
    """Knobs of the fit (``diffgraft fit harmonica --set NAME=VALUE``)."""

    l1: float = Field(7e-8, ge=0, description="weight of the sum of a step's scores in its loss; larger reuses more")
    rate: float = Field(0.01, gt=0, le=1, description="learning rate of AdamW on the logits")
    lambda_every: int = Field(
        50, ge=1, description="trajectories after which lambda is measured anew (C steps of the optimizer in the paper are C / T of these)"
    )


def routed(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """The layers that a router has a column for, in running order."""
    return [block for block in blocks if block.is_layer and block.kind.endswith(LAYERS)]


class Facts(TypedDict):
    """Of a router: the places of its layers on the denoiser, in the order of its columns; the tau that it was learned with."""

    layers: list[str]
    threshold: float


def unlike(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """Why a table and the names of its columns do not go together, or None."""
    layers, columns = facts["layers"], tensors["logits"].shape[1]
    return None if len(layers) == columns else f"it has {columns} columns for {len(layers)} layers"


HOLDS = Holds(
    tensors={"logits": Values(("T", "L"), low=-ALWAYS, high=ALWAYS), "lambdas": Values(("T",), low=0)},
    facts=Facts,
    also=unlike,
)
