"""Ranges of activations, measured: each rounder of a block gets the scale that its inputs of a few samples want."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffgraft.methods.quant.affine import Scale, UniformAffine, searched_scale
from diffgraft.methods.quant.layers import QuantLayer, ensure_finite

MOST = 2**16
"""Values that a range is searched on, beside the ends of all."""


class Gathering(nn.Module):
    """Takes a rounder's place, and keeps some of what comes to it: all of few values, of many a random sample; and the ends of all.

    Values at equal distances would be those of one channel, where the distance is a multiple of their number.
    """

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most
        self.generator = torch.Generator().manual_seed(0)
        self.seen: list[Tensor] = []
        self.ends: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1)
        if (count := flat.numel()) > 0:
            few = flat if count <= self.most else flat[torch.randint(count, (self.most,), generator=self.generator).to(flat.device)]
            self.seen.append(few.float())
            ends = flat.float().aminmax()
            low, high = self.ends or ends
            self.ends = [torch.minimum(low, ends[0]), torch.maximum(high, ends[1])]
        return x

    def values(self) -> Tensor:
        """All that is kept; one zero where nothing came."""
        return torch.cat([*self.seen, torch.stack(self.ends)]) if self.seen else torch.zeros(1)


@torch.no_grad()
def measure(
    layers: Mapping[str, QuantLayer],
    call: Callable[[], object],
    plugin: str,
    scale_of: Callable[[Tensor, UniformAffine], Scale] = searched_scale,
    most: int = MOST,
) -> None:
    """Fix the scales of all rounders of these layers, one for a whole tensor, by what ``call()`` brings to them unrounded.

    ``most``: values of each forward that are looked at, beside the ends of all.

    Raises:
        NotFinite: it brings what has no range; names the layer.
    """
    rounders = {(key, name): rounder for key, layer in layers.items() for name, rounder in layer.rounders().items()}
    gathered = {place: Gathering(most) for place in rounders}
    for (key, name), one in gathered.items():
        stand_in(layers[key], name, one)
    try:
        call()
    finally:
        for (key, name), rounder in rounders.items():
            stand_in(layers[key], name, rounder)
    values = {place: one.values() for place, one in gathered.items()}
    ensure_finite({key: x for (key, _), x in values.items()}, plugin)
    for (key, name), rounder in rounders.items():
        scale = scale_of(values[key, name], rounder.grid)
        rounder.fix(Scale(*(part.reshape(1).to(layers[key].weight.device) for part in scale)))


def stand_in(layer: QuantLayer, name: str, new: nn.Module) -> None:
    """Exchange the rounder of this name."""
    kind, _, number = name.partition(".")
    if number:
        layer.inputs[int(number)] = new
    else:
        setattr(layer, kind, new)
