"""``diffgraft fit dpm_ot``: training pictures noised to level m become targets, then the heights of their cells are found.

The first steps read pictures: batch by batch, each once, until J are kept, with one noise each. All further ones descend on E(h) by fresh
samples of mu. The denoiser has no part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, Fitter, Unsupported
from diffgraft.methods.examples import Example, pixels_of
from diffgraft.methods.predictions import levels_at
from diffgraft.methods.starts import at_level, begins_at, follows
from diffgraft.methods.variants import own_size
from torch import Tensor, nn

from diffgraft_dpm_ot.knobs import ANY, FitConfig, poor
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
        ensure_level(probe.scheduler, start)
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

    def ensure_enough(self, pipe: Any, examples: Sequence[Example], rows: Iterable[Sequence[int]]) -> None:
        """Raises ConfigError where there are not J different pictures, or the steps do not read so many and go on."""
        J, size = self.config.targets, own_size(pipe) or (64, 64)
        marks: dict[int, int] = {}
        met: set[int] = set()
        for batch in rows:
            if len(met) == J:
                return
            for row in batch:
                if row not in marks:
                    pixels = pixels_of([examples[row]], *size)
                    assert pixels is not None
                    marks[row] = mark_of(pixels[0])
                met.add(marks[row])
                if len(met) == J:
                    break
            if len(marks) == len(examples) and len(met) < J:
                raise ConfigError(
                    f"plugin 'dpm_ot': targets = {J}, and only {len(met)} of the pictures are different; give more pictures, or --set "
                    f"targets={len(met)}"
                )
        raise ConfigError(
            f"plugin 'dpm_ot': the steps of the fit would read {len(met)} of {J} pictures, and fit nothing: take more --steps, a larger "
            "--batch, or fewer targets"
        )

    @classmethod
    def told(cls, facts: Mapping[str, Any]) -> str | None:
        off, chance = facts["off"], facts["chance"]
        return poor(facts) or f"cells are {off:.3f} from equal measures ({chance:.3f} by chance alone), none is empty"

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
        """Make targets of a batch's pictures, of each different picture one."""
        cells, number = self.trained, int(self.trained.filled)
        z0 = self.latents(batch).float()
        if cells.targets.shape[1:] != z0.shape[1:]:
            raise ConfigError(
                f"plugin 'dpm_ot': a picture's latents have shape {tuple(z0.shape[1:])}, those of a run {tuple(cells.targets.shape[1:])}; "
                "leave --height and --width out"
            )
        noise = torch.randn(z0.shape, generator=batch.generator).to(z0)
        y = at_level(z0, noise, type(self.levels)(*(level.to(z0.device) for level in self.levels)))
        known = set(cells.pictures[:number].tolist())
        for each, pixels, target in zip(batch.examples, batch.pixels, y, strict=True):
            mark = mark_of(pixels)
            if number < len(cells.heights) and mark not in known:
                known.add(mark)
                cells.targets[number] = target
                cells.labels[number] = ANY if each.class_label is None else each.class_label
                cells.pictures[number] = mark
                number += 1
        cells.filled.fill_(number)

    def facts(self) -> dict[str, Any]:
        cells = self.trained
        about = {
            "start": float(self.plugin.config.start),
            "timestep": self.time,
            "steps": self.probe.steps,
            "source": self.plugin.config.source,
        }
        if not cells.filled:  # an example, nothing learned
            return {**about, "off": None, "chance": 0.0, "empty": 0, "drawn": 0}
        return {**about, **measured(cells, self.plugin.config.source)}


def ensure_level(scheduler: Any, start: float) -> None:
    """Raises ConfigError where the model has no timestep ``start``, Unsupported where the scheduler cannot begin at one."""
    name, config = type(scheduler).__name__, scheduler.config
    if start > (T := int(config.get("num_train_timesteps", 1000))):
        raise ConfigError(f"plugin 'dpm_ot': start = {start:g}: this model was trained with {T} timesteps; take at most that")
    others = "use DDIM, DDPM, DPM++ or UniPC, or start = None, which is off"
    if not follows(scheduler):
        raise Unsupported(f"dpm_ot: {name} follows no schedule but its own, so it cannot begin late: {others}")
    if hasattr(scheduler, "precondition_outputs") or config.get("timestep_type") == "continuous":
        raise Unsupported(f"dpm_ot: {name} counts levels by sigma, where start = {start:g}, a timestep, means nothing: {others}")


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
