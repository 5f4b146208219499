"""``diffgraft fit dpm_ot``: training pictures noised to level m become targets, then the heights of their cells are found.

The first steps read pictures: batch by batch, each once, until J are kept, with one noise each. All further ones descend on E(h) by fresh
samples of mu. The denoiser has no part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, Fitter
from diffgraft.methods.predictions import levels_at
from diffgraft.methods.starts import at_level, begins_at
from torch import Tensor, nn

from diffgraft_dpm_ot.knobs import ANY, FitConfig
from diffgraft_dpm_ot.method import chance, energy, histogram, off_by, source_of, unit_of, values

CHUNK = 1024
"""Samples that are sent at a time."""
DRAWN = 2**16
"""Samples at most by which the histogram is measured in the end; 1,000 a target where that is less."""


class Cells(nn.Module):
    """y [J, ...], random after ``filled``; of each its class and its picture's mark; h in units of ``unit`` (:func:`unit_of`)."""

    def __init__(self, number: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.heights = nn.Parameter(torch.zeros(number))
        self.register_buffer("targets", torch.randn(number, *shape))
        self.register_buffer("labels", torch.full((number,), ANY))
        self.register_buffer("pictures", torch.zeros(number, dtype=torch.long))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.targets: Tensor
        self.labels: Tensor
        self.pictures: Tensor
        self.unit: Tensor
        self.filled: Tensor


class MapFitter(Fitter):
    Config = FitConfig
    wants: ClassVar[frozenset[str]] = frozenset({"pictures", "prompts"})
    clip: ClassVar[float | None] = None
    plugin: Any
    trained: Cells
    config: FitConfig

    def build(self, probe: Any) -> nn.Module:
        times, start = probe.timesteps, self.plugin.config.start
        if start is None:
            raise ConfigError("plugin 'dpm_ot': start = None is off, so there is no level to fit a map for: give the start of your runs")
        index = begins_at(probe.scheduler, times.tolist(), start)
        if index is None:
            raise ConfigError(
                f"plugin 'dpm_ot': start = {start:g}: none of the {len(times)} timesteps of a run is that low, the last is {times[-1]:g}; "
                "begin earlier, or take more --inference-steps"
            )
        sigma = None if probe.sigmas is None else probe.sigmas[index]
        self.time = float(times[index])
        self.levels = levels_at(probe.target.family, probe.scheduler, times[index], sigma, torch.device("cpu"))
        self.ready: tuple[Tensor, Tensor, Tensor] | None = None
        return Cells(self.config.targets, shape_of(probe.target))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config.rate)

    def loss(self, session: Any, batch: Any) -> Tensor:
        rows, cells = len(batch.examples), self.trained
        if int(cells.filled) < len(cells.heights):
            self.keep(batch)
            return 0 * cells.heights.sum().expand(rows)
        if self.ready is None:
            self.ready = ready(cells)
            cells.unit.copy_(self.ready[2])
        y, classes, unit = self.ready
        noise = torch.randn(self.config.samples, y.shape[1], generator=batch.generator).to(y)
        h = cells.heights * unit
        u = values(source_of(noise, self.plugin.config.source), y, h)
        return (energy(u, h, classes) / unit).expand(rows)

    @torch.no_grad()
    def keep(self, batch: Any) -> None:
        """Make targets of a batch's pictures, of each picture one.

        Raises:
            ConfigError: there are no more.
        """
        cells, number = self.trained, int(self.trained.filled)
        z0 = self.latents(batch).float()
        if cells.targets.shape[1:] != z0.shape[1:]:
            raise ConfigError(
                f"plugin 'dpm_ot': a picture's latents have shape {tuple(z0.shape[1:])}, those of a run {tuple(cells.targets.shape[1:])}; "
                "leave --height and --width out"
            )
        noise = torch.randn(z0.shape, generator=batch.generator).to(z0)
        y = at_level(z0, noise, type(self.levels)(*(level.to(z0.device) for level in self.levels)))
        known, before = set(cells.pictures[:number].tolist()), number
        for each, pixels, target in zip(batch.examples, batch.pixels, y, strict=True):
            mark = mark_of(pixels)
            if number < len(cells.heights) and mark not in known:
                known.add(mark)
                cells.targets[number] = target
                cells.labels[number] = ANY if each.class_label is None else each.class_label
                cells.pictures[number] = mark
                number += 1
        if number == before:
            raise ConfigError(
                f"plugin 'dpm_ot': targets = {len(cells.heights)}: a whole batch brought no new picture after {number} different ones; "
                f"give more pictures, or --set targets={number}"
            )
        cells.filled.fill_(number)

    def facts(self) -> dict[str, Any]:
        """Raises ConfigError where the steps did not even read all pictures."""
        cells, J = self.trained, len(self.trained.heights)
        about = {
            "start": float(self.plugin.config.start),
            "timestep": self.time,
            "steps": self.probe.steps,
            "source": self.plugin.config.source,
        }
        if 0 < int(cells.filled) < J:
            raise ConfigError(
                f"plugin 'dpm_ot': the steps of the fit read {int(cells.filled)} of {J} pictures, and fitted nothing: take more --steps, "
                f"a larger --batch, or fewer targets (--set targets={int(cells.filled)})"
            )
        if not cells.filled:  # an example, nothing learned
            return {**about, "off": None, "chance": 0.0, "empty": 0, "drawn": 0}
        return {**about, **measured(cells, self.plugin.config.source)}


def mark_of(pixels: Tensor) -> int:
    """Tells one picture [3, height, width] from another."""
    return int.from_bytes(hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).digest()[:7], "big")


def shape_of(target: Any) -> tuple[int, ...]:
    """Of one sample's latents."""
    config = target.denoisers[target.family.denoisers[0]].config
    size = config["sample_size"]
    return (int(config["in_channels"]), *((size, size) if isinstance(size, int) else size))


def classes_of(labels: Tensor) -> Tensor:
    """Labels as numbers 0 ... C - 1."""
    return labels.unique(return_inverse=True)[1]


def ready(cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """(y [J, d], classes [J], the unit of h)."""
    y, classes = cells.targets.flatten(1), classes_of(cells.labels)
    return y, classes, unit_of(y, classes)


@torch.no_grad()
def measured(cells: Cells, source: Any, seed: int = 0) -> dict[str, Any]:
    """How far the cells are from equal measures, by samples that the fit has not seen."""
    y, classes, unit = ready(cells)
    generator, counts, drawn = torch.Generator().manual_seed(seed), torch.zeros(len(y), dtype=torch.long, device=y.device), 0
    while drawn < min(DRAWN, 1000 * len(y)):
        noise = torch.randn(CHUNK, y.shape[1], generator=generator).to(y)
        counts += histogram(values(source_of(noise, source), y, cells.heights * unit), classes)
        drawn += CHUNK
    return {"off": off_by(counts, classes), "chance": chance(drawn, classes), "empty": int((counts == 0).sum()), "drawn": drawn}
