"""AutoDiffusion's genomes for ``diffgraft evolve``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any

from diffgraft import ConfigError, PluginConfig
from diffgraft.methods.schema import Holds
from diffgraft.methods.search import Probe, Searcher
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from diffgraft_autodiffusion import method
from diffgraft_autodiffusion.layers import skippable
from diffgraft_autodiffusion.method import Candidate, Space
from diffgraft_autodiffusion.schedule import ensure_supported, points

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Genome(TypedDict):
    """As a file holds it; see :mod:`.method`."""

    timesteps: Annotated[list[Number], Field(min_length=1)]
    end: Number | None
    skips: list[list[str]]


class Facts(TypedDict):
    """Of what a search found."""

    genome: Genome
    guidance_scale: NotRequired[float | None]


def misshapen(tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a genome, or None."""
    genome: Candidate = facts["genome"]
    if len(genome["skips"]) != len(genome["timesteps"]):
        return f"its genome has {len(genome['skips'])} lists of skipped layers for {len(genome['timesteps'])} time steps"
    if not method.falls(method.points_of(genome)):
        return f"its genome's time steps do not fall: {method.points_of(genome)}"
    return None


HOLDS = Holds(facts=Facts, also=misshapen)


class AutoDiffusionSearch(PluginConfig):
    """Knobs of the search (``--set name=value``)."""

    mutation: float = Field(0.25, gt=0, le=1, description="p: probability that a mutation replaces a time step or a skipped layer")
    first_mutation: float = Field(0.1, gt=0, le=1, description="p of the first generation's mutations of the uniform schedule")
    radius: int | None = Field(
        None,
        ge=1,
        description="own: a mutation moves a time step by at most so many training timesteps, and the first generation holds mutations of "
        "the uniform schedule only; none = to anywhere, half of the first generation at random (paper)",
    )
    max_skip: float = Field(
        0.0, ge=0, le=0.9, description="largest share of layers that a step may leave out; 0 searches time steps only (paper: 0.1)"
    )
    begin_skip: int = Field(4, ge=0, description="generation after which layers may be left out; the share then rises over five more")
    max_layers: int | None = Field(
        None, ge=1, description="N_max: layers executed over all steps; none = steps x layers (paper, ADM 10 steps: 580)"
    )
    end: bool = Field(False, description="search the level at which the last step ends too (official code with DPM-Solver)")


class AutoDiffusionSearcher(Searcher):
    """Time steps, and layers left out at each of them."""

    Config = AutoDiffusionSearch
    config: AutoDiffusionSearch
    space: Space

    def prepare(self, probe: Probe) -> None:
        scheduler, family = probe.scheduler, probe.target.family
        ensure_supported(scheduler, family)
        layers = tuple(block.path for block in skippable(probe.target.blocks))
        if self.config.end and probe.sigmas is None:
            raise ConfigError(f"search of autodiffusion: end = True: {type(scheduler).__name__} ends at the clean sample; use DPM++ 2M")
        self.space = Space(
            start=tuple(probe.timesteps.tolist()),
            points=points(scheduler, family),
            layers=layers,
            budget=self.config.max_layers or len(layers) * len(probe.timesteps),
            end=self.config.end,
        )
        if not method.fits(method.uniform(self.space), self.space):
            raise ConfigError(
                f"search of autodiffusion: max_layers = {self.space.budget}: the start itself executes "
                f"{len(layers)} layers in each of {len(probe.timesteps)} steps; use fewer --steps, or a larger max_layers"
            )

    def _ratio(self, epoch: int) -> float:
        return method.skip_ratio(epoch, self.config.max_skip, self.config.begin_skip)

    def first(self, rng: random.Random, number: int, size: int) -> Candidate | None:
        """The uniform schedule; random ones for half of the generation; mutations of the uniform one for the rest."""
        if number == 0:
            return method.uniform(self.space)
        if number <= size // 2 and self.config.radius is None:
            return method.drawn(rng, self.space, 0.0)
        return method.mutated(rng, method.uniform(self.space), self.space, self.config.first_mutation, 0.0, self.config.radius)

    def draw(self, rng: random.Random, epoch: int) -> Candidate | None:
        return method.drawn(rng, self.space, self._ratio(epoch))

    def mutate(self, rng: random.Random, parent: Candidate, epoch: int) -> Candidate | None:
        return method.mutated(rng, parent, self.space, self.config.mutation, self._ratio(epoch), self.config.radius)

    def cross(self, rng: random.Random, one: Candidate, other: Candidate) -> Candidate | None:
        return method.crossed(rng, one, other, self.space)

    def steps(self, genome: Candidate) -> int:
        return len(genome["timesteps"])

    def knobs(self, genome: Candidate) -> dict[str, Any]:
        return {"timesteps": genome["timesteps"], "end": genome["end"], "skips": genome["skips"]}

    def example(self, rng: random.Random) -> Candidate:
        """Random time steps, and one random layer left out at each."""
        genome = method.drawn(rng, self.space, 0.0)
        assert genome is not None
        return {**genome, "skips": [rng.sample(self.space.layers, 1) for _ in genome["timesteps"]]}
