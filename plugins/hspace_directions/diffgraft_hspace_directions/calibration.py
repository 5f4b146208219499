"""What the mid block returned over samples, and its principal components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from diffgraft import BlockCall, BlockInfo, Calibrator, ConfigError, DenoiseCall, Effects
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.schema import Holds, Values
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_hspace_directions.knobs import PAPER, HSpaceDirectionsConfig
from diffgraft_hspace_directions.method import pca


class Facts(TypedDict):
    """Of an artefact."""

    samples: Annotated[int, Field(ge=1, le=10**9)]
    over: Literal["step", "trajectory"]


AXES = ("T", "R", "C", "H", "W")
HOLDS = Holds(
    {
        "mean": Values(AXES),
        "components": Values(("K", *AXES), low=-1.001, high=1.001),
        "std": Values(("K", "T"), low=0),
        "share": Values(("K", "T"), low=0, high=1.001),
    },
    Facts,
)
"""T denoiser calls of a run, R rows of h for a sample (the frames of a video), K components."""


@dataclass
class Seen:
    """The mid block's outputs of a run's conditional rows, one [B, R, C, H, W] a denoiser call."""

    place: tuple[int, int, int] = (0, 1, 1)
    """Number of the conditional part, parts, rows of the call."""
    h: list[Tensor] = field(default_factory=list)


class Measure(Calibrator):
    """Records "h" [T, B, R, C, H, W] of each run: the conditional branch's."""

    name = "hspace_directions_calibration"
    paper = PAPER
    Config = HSpaceDirectionsConfig
    State = Seen
    effects = Effects()
    config: HSpaceDirectionsConfig

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        return mid_blocks(blocks)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        texts = call.texts
        place = (texts.index("cond"), len(texts), call.sample.shape[0]) if "cond" in texts and not call.extra else (0, 0, 0)
        call.shared.place = place
        return next(call)  # type: ignore[no-any-return]

    def block(self, call: BlockCall, next: Any) -> Any:
        out = next(call)
        number, parts, rows = call.shared.place
        if parts:
            own = out.detach().chunk(parts)[number]
            call.shared.h.append(own.unflatten(0, (rows // parts, -1)).float().cpu())
        return out

    def collect(self, call: Any) -> dict[str, Tensor]:
        return {"h": torch.stack(call.shared.h)}

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        h = torch.cat([record["h"] for record in records], 1)
        if not h.isfinite().all():
            raise ConfigError("plugin 'hspace_directions': the mid block gave numbers that are not finite")
        found = pca(h, self.config.components, together=self.config.over == "trajectory")
        tensors = {"mean": found.mean, "components": found.unit, "std": found.std, "share": found.share}
        return {name: value.float() for name, value in tensors.items()}, {"samples": h.shape[1], "over": self.config.over}


def mid_blocks(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """The mid block of each denoiser."""
    return [block for block in blocks if block.kind == "mid" and not block.is_layer]


def difference(plus: Artefact, minus: Artefact) -> Tensor:
    """n_t = E[h_t of one group] - E[h_t of another] [T, R, C, H, W], of two calibrations: for ``source="given"``.

    Raises:
        ConfigError: they are of other steps or sizes.
    """
    a, b = (made.tensors["mean"] for made in (plus, minus))
    if a.shape != b.shape:
        raise ConfigError(f"plugin 'hspace_directions': one group's mean h has shape {tuple(a.shape)}, the other's {tuple(b.shape)}")
    return a - b


def directions_of(tensors: Mapping[str, Tensor], component: int) -> tuple[Tensor, Tensor]:
    """u_k [T, R, C, H, W], of norm 1 at each step, and std_k(t) |u_k(t)| [T]: what 'own' means."""
    unit, std = tensors["components"][component], tensors["std"][component]
    norm = unit.flatten(1).norm(dim=1)
    return unit / norm.clamp(min=torch.finfo(norm.dtype).tiny).view(-1, 1, 1, 1, 1), std * norm
