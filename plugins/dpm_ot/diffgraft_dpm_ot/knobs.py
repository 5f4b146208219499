"""The knobs, the paper, and what the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.schema import Holds, Values
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_dpm_ot.method import Source

PAPER = Paper(
    title="DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport",
    arxiv="2307.11308",
    implemented="the semi-discrete map from white noise to noised training pictures, the run from their level on; class by class for DiT",
    omitted="annealed Langevin steps (NCSN++): the pipeline's own sampler runs; `topk` > 1 with its angle filter, which does not run in "
    "the official code; doubling of the samples when the fit stalls",
    licence="the official repository names none; written from the equations",
)
ANY = -1
"""The label of a target that serves every class."""


class DpmOtConfig(PluginConfig):
    """Knobs of DPM-OT."""

    artefact: str | Path | Artefact | None = Field(
        None, description="targets and heights, as `diffgraft fit dpm_ot` wrote them; they hold noised training pictures"
    )
    start: float | None = Field(
        400.0,
        gt=0,
        description="level m, a timestep of the training (T = 1000 for most): a run begins at the first step that is not above it; none is "
        "off, and so is T without an artefact",
    )
    source: Source = Field(
        "normal", description="mu: the pipeline's white noise as in the paper, or 'uniform' on [0, 1] (its Phi) as in the official code"
    )


class FitConfig(PluginConfig):
    """Knobs of the fit (``diffgraft fit dpm_ot --set NAME=VALUE``)."""

    targets: int = Field(64, ge=1, description="J: how many training pictures are kept, by lot, of all classes together")
    samples: int = Field(1024, ge=1, description="N: samples of mu in each step of the fit (Monte Carlo)")
    rate: float = Field(0.1, gt=0, le=10, description="learning rate of Adam on the heights, in units of the targets' spread")


class Facts(TypedDict):
    """Of a map: the level, in timesteps, as asked for and as the first step of a run of ``steps`` has it; mu; the histogram's distance
    from uniform in the worst class by ``drawn`` fresh samples (total variation; None: not fitted), what chance alone makes of it, cells
    that none met."""

    start: float
    timestep: float
    steps: Annotated[int, Field(ge=1)]
    source: Source
    off: Annotated[float, Field(ge=0, le=1)] | None
    chance: Annotated[float, Field(ge=0)]
    empty: Annotated[int, Field(ge=0)]
    drawn: Annotated[int, Field(ge=0)]


FAR = 0.1
"""Total variation from equal measures, beyond chance, above which a map is not fitted well."""


def poor(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a fitted map, or None."""
    off, empty = facts["off"], facts["empty"]
    if off is None or (off <= facts["chance"] + FAR and not empty):
        return None
    return (
        f"the map is not fitted well: its cells are {off:.2f} from equal measures (total variation, of the worst class; "
        f"{facts['chance']:.2f} by chance alone), and {empty} are empty; fit it with more steps, more samples, or a smaller rate"
    )


def unlike(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """Why targets and facts do not go together, or None."""
    if bool((tensors["labels"] == ANY).any()) and not bool((tensors["labels"] == ANY).all()):
        return f"some of its labels are {ANY} (any class), some are not"
    filled, number = int(tensors["filled"]), len(tensors["heights"])
    return None if filled in (0, number) else f"{filled} of its {number} targets are pictures"


HOLDS = Holds(
    tensors={
        "targets": Values(("J", "C", "height", "width")),
        "heights": Values(("J",)),
        "unit": Values((), low=0),
        "labels": Values(("J",), dtypes=(torch.int64,), low=ANY),
        "pictures": Values(("J",), dtypes=(torch.int64,), low=0),
        "filled": Values((), dtypes=(torch.int64,), low=0),
    },
    facts=Facts,
    also=unlike,
)
