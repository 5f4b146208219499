"""AutoDiffusion: time steps, and layers left out at each of them, found by an evolution (Li et al., arXiv 2309.10438).

`diffgraft evolve autodiffusion` finds them for one model, scheduler, guidance scale and number of steps; ``artefact=`` runs with what it
found. Time steps and skip lists can also be given directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffgraft import (
    ArtefactMismatch,
    BlockCall,
    BlockInfo,
    Call,
    ConfigError,
    Effects,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    Schedule,
    ScheduleCall,
    Target,
    blocks_of,
    denoisers_of,
    nearest,
)
from diffgraft.methods.artefacts import make_again
from diffgraft.methods.findings import Finding
from pydantic import Field, model_validator
from typing_extensions import Self

from diffgraft_autodiffusion.layers import skippable, skipped
from diffgraft_autodiffusion.method import PRESETS, falls
from diffgraft_autodiffusion.schedule import ensure_in_range, ensure_supported, scheduled
from diffgraft_autodiffusion.searcher import HOLDS, AutoDiffusionSearcher

__all__ = ["AutoDiffusion", "AutoDiffusionConfig", "AutoDiffusionSearcher"]
__version__ = "0.1.0"


class AutoDiffusionConfig(PluginConfig):
    """Knobs of AutoDiffusion."""

    artefact: str | Path | Finding | None = Field(
        None, description="what `diffgraft evolve autodiffusion` found: a path, owner/name/file.json on the Hub, or a Finding"
    )
    parts: Literal["all", "timesteps", "skips", "none"] = Field(
        "all", description="what of it is used: time steps, skipped layers, both; 'none' is off"
    )
    timesteps: tuple[float, ...] | None = Field(
        None, min_length=1, description="t_1 > t_2 > ... > t_K in training timesteps, for calls with K steps; none = the scheduler's own"
    )
    end: float | None = Field(
        None, ge=0, description="level t_{K+1} at which the last step ends, with `timesteps`; none = where the scheduler ends"
    )
    skips: tuple[tuple[int | str, ...], ...] | None = Field(
        None, min_length=1, description="layers left out at each of the K steps: numbers from 0 in running order, or paths in the denoiser"
    )
    preset: Literal["sd14_dpm_4", "adm64_6", "adm64_10"] | None = Field(
        None, description="time steps published by the authors: SD 1.4 with DPM-Solver++(2M) in 4 steps, ADM-G ImageNet 64 in 6 and 10"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("artefact", "preset", "timesteps") if getattr(self, name) is not None]
        if len(given) > 1 or (self.artefact is not None and self.skips is not None):
            raise ValueError(f"{', '.join([*given, *(['skips'] if self.skips is not None else [])])} exclude each other: give one")
        if self.timesteps is not None and not falls(self.timesteps):
            raise ValueError(f"timesteps = {self.timesteps}: each must be smaller than the one before, none twice")
        if self.end is not None and (self.timesteps is None or self.end >= self.timesteps[-1]):
            raise ValueError(f"end = {self.end}: it goes with timesteps, and is smaller than the last of them")
        for names in self.skips or ():
            if len(set(names)) < len(names) or any(isinstance(name, int) and name < 0 for name in names):
                raise ValueError(f"skips: {names}: numbers from 0 or paths, none twice in a step")
        steps = self.timesteps or (PRESETS[self.preset][0] if self.preset else None)
        if steps and self.skips and len(steps) != len(self.skips):
            raise ValueError(f"skips has {len(self.skips)} lists for {len(steps)} timesteps: give one a step")
        return self


@dataclass(frozen=True)
class Found:
    """What is to be run: ``timesteps`` None leaves the scheduler's own, ``skips`` None executes all layers."""

    timesteps: tuple[float, ...] | None = None
    end: float | None = None
    skips: tuple[tuple[int | str, ...], ...] | None = None

    @property
    def steps(self) -> int | None:
        """K, or None where any number goes."""
        lists = self.timesteps if self.timesteps is not None else self.skips
        return None if lists is None else len(lists)


@dataclass
class State:
    """Kept in one run: paths of the layers that are left out, a set for each time step of the schedule."""

    skips: tuple[frozenset[str], ...] = ()


class AutoDiffusion(Plugin):
    """Run the searched time steps, and leave out the searched layers (see :mod:`.method`)."""

    name = "autodiffusion"
    paper = Paper(
        title="AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model Acceleration",
        arxiv="2309.10438",
        implemented="two-stage evolution over time steps and per-step skip lists, under a budget of executed layers; runs with what it "
        "found; published time steps as presets",
        omitted="FID with Inception weights (any features will do); the skip list that goes with the published 10 steps of ADM-G",
        licence="official code without a licence; written from the paper's description",
    )
    families = ("pixel", "sd", "sdxl", "dit", "pixart", "sd3", "flux", "qwen_image", "wan")
    Config = AutoDiffusionConfig
    State = State
    neutral: ClassVar[dict[str, Any]] = {"parts": "none"}
    active: ClassVar[dict[str, Any]] = {"parts": "all"}
    effects = Effects(skips=frozenset({"blocks"}), edits=frozenset({"schedule"}), needs=frozenset({"calibrated_run"}))
    needs = (Need("search", "artefact", fits=frozenset({"scheduler", "guidance"}), holds=HOLDS),)
    search = AutoDiffusionSearcher
    config: AutoDiffusionConfig
    named: frozenset[int | str] = frozenset()
    """Layers that are left out at some step, as they were named: known when the plugin is put on, and the same for every pipeline."""

    def found(self, artefact: Finding | None) -> Found:
        """What the knobs say."""
        knobs = self.config
        if knobs.parts == "none":
            return Found()
        timesteps, end, skips = knobs.timesteps, knobs.end, knobs.skips
        if knobs.preset is not None:
            timesteps, end = PRESETS[knobs.preset]
        if artefact is not None:
            genome = artefact.genome
            timesteps, end, skips = tuple(genome["timesteps"]), genome["end"], tuple(map(tuple, genome["skips"]))
        if knobs.parts == "skips":
            timesteps = end = None
        return Found(timesteps, end, None if knobs.parts == "timesteps" or not any(skips or ()) else skips)

    def check(self, target: Target) -> None:
        artefact = target.given.get("artefact")
        found = self.found(artefact)
        if found.steps is not None:
            ensure_supported(target.pipe.scheduler, target.family)
        if found.timesteps is not None:
            ensure_in_range(found.timesteps, target.pipe.scheduler, target.family)
        paths([name for names in found.skips or () for name in names], target.blocks)
        self.named = frozenset(name for names in found.skips or () for name in names)

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """The layers that some step leaves out."""
        layers = skippable(blocks) if self.named else []
        return [block for i, block in enumerate(layers) if i in self.named or block.path in self.named]

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        found = self.found(call.given("artefact"))
        if found.steps is not None:
            ensure_supported(call.scheduler, call.family)  # again: it may be another one now
        if found.timesteps is not None:
            self._beside_the_callers(call)
        made: Schedule = next(call)
        if found.steps is None:
            call.note("inactive: neither time steps nor skipped layers were given")
            return made
        if found.steps != len(made.timesteps):
            raise self._wrong_number(found.steps, len(made.timesteps), call)
        blocks = blocks_of(call.family, denoisers_of(call.pipe, call.family))
        call.shared.skips = tuple(frozenset(paths(names, blocks)) for names in found.skips or ())
        if found.timesteps is None:
            return made
        ensure_in_range(found.timesteps, call.scheduler, call.family)
        call.acted()  # time steps are its work too, where no layer is left out
        return scheduled(found.timesteps, found.end, made, call.scheduler, call.family)

    def _beside_the_callers(self, call: Call) -> None:
        """What the call itself says about its times; raises ConfigError where both name them."""
        arguments = call.run.arguments
        for name in ("timesteps", "sigmas"):
            if arguments.get(name) is not None:
                raise ConfigError(
                    f"plugin 'autodiffusion': the call gives {name} = {arguments[name]}, and the plugin's time steps would take their "
                    "place: leave one of them out, or set parts='skips'"
                )
        for name in ("denoising_start", "denoising_end"):
            if isinstance(arguments.get(name), float):
                call.note(
                    f"{name} = {arguments[name]:g} cuts the plugin's time steps, not the scheduler's: the pipeline on the other side of "
                    "the cut must run with the same ones"
                )

    def _wrong_number(self, K: int, asked: int, call: Call) -> Exception:
        """Why a call with another number of steps is refused."""
        source = next((name for name in ("artefact", "preset", "timesteps") if getattr(self.config, name) is not None), "skips")
        why = f"plugin 'autodiffusion': {source} is for {K} steps, and this call makes {asked}: call it with num_inference_steps={K}"
        if call.given("artefact") is not None:
            return ArtefactMismatch(f"{why}, or {make_again('autodiffusion', 'search')}")
        return ConfigError(why)

    def block(self, call: BlockCall, next: Any) -> Any:
        step, skips = call.step, call.shared.skips
        if not skips or call.info.path not in skips[step.begin + step.index]:  # image to image runs only the tail of the schedule
            return next(call)
        call.count("skipped")
        return skipped(call)


def paths(names: Sequence[int | str], blocks: Sequence[BlockInfo]) -> list[str]:
    """The paths of layers that are given by number or path.

    Raises:
        ConfigError: the denoiser has no such layer, or it cannot be left out.
    """
    if not names:
        return []
    layers = [block.path for block in skippable(blocks)]
    found = []
    for name in names:
        if isinstance(name, int) and name < len(layers):
            found.append(layers[name])
        elif name in layers:
            found.append(str(name))
        else:
            near = nearest(name, layers) if isinstance(name, str) else "."
            raise ConfigError(
                f"plugin 'autodiffusion': skips: {name!r} is no layer that can be left out{near} There are {len(layers)}: "
                f"{', '.join(layers[:3])}, ..., {layers[-1]}"
            )
    return found
