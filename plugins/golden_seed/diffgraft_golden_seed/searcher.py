"""A pool of seeds for ``diffgraft evolve``: each is one candidate, and the file keeps what all of them were worth."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from diffgraft import ConfigError, PluginConfig
from diffgraft.methods.schema import Holds
from diffgraft.methods.search import Probe, Searcher
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

LARGEST = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Loss = Annotated[float, Field(allow_inf_nan=False)]


class Facts(TypedDict):
    """Of a ranking: [seed, loss] of the whole pool, best first."""

    genome: Seed
    guidance_scale: NotRequired[float | None]
    ranking: Annotated[list[Annotated[list[Any], Field(min_length=2, max_length=2)]], Field(min_length=1)]


def faulty(tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a ranking, or None."""
    ranking = facts["ranking"]
    for seed, loss in ranking:
        if type(seed) is not int or not 0 <= seed <= LARGEST:
            return f"its ranking holds the seed {seed!r}, no whole number from 0 to {LARGEST}"
        if type(loss) not in (int, float) or not abs(loss) < float("inf"):
            return f"its ranking gives the seed {seed} the loss {loss!r}, no finite number"
    seeds, losses = [seed for seed, _ in ranking], [loss for _, loss in ranking]
    if len(set(seeds)) < len(seeds):
        return "its ranking holds a seed twice"
    if losses != sorted(losses):
        return "its ranking is not in the order of its losses"
    return None if seeds[0] == facts["genome"] else f"its best seed is said to be {facts['genome']}, and the ranking begins with {seeds[0]}"


HOLDS = Holds(facts=Facts, also=faulty)


class SeedPool(PluginConfig):
    """Knobs of the search (``--set name=value``)."""

    first: int = Field(0, ge=0, le=2**62, description="the pool is this seed and those that follow; its size is --population x --epochs")


class SeedSearcher(Searcher):
    """Seeds one after the other: nothing is bred, for near seeds have nothing in common."""

    Config = SeedPool
    config: SeedPool
    ranks = True
    breeds = False
    own_noise = True
    not_by: ClassVar[dict[str, str]] = {
        "trajectory": "it compares with what other noise makes, which says nothing of a seed: take --fitness reward --reward NAME, or "
        "--fitness frechet"
    }
    asked = 0
    """Steps of a call."""
    given = 0
    """How many seeds of the pool were given out."""

    def check(self, knobs: Mapping[str, Any]) -> None:
        if given := ", ".join(f"{name} = {value}" for name, value in sorted(knobs.items()) if value is not None):
            raise ConfigError(
                f"search of golden_seed: {given}: a candidate is one seed of the pool, and the plugin's knobs change nothing of that; "
                "leave them out (--set first=N begins the pool at N, --population says its size)"
            )

    def prepare(self, probe: Probe) -> None:
        self.asked, self.given = probe.steps, 0

    def _next(self) -> int:
        self.given += 1
        return self.config.first + self.given - 1

    def first(self, rng: random.Random, number: int, size: int) -> int:
        return self._next()

    def draw(self, rng: random.Random, epoch: int) -> int:
        return self._next()

    def mutate(self, rng: random.Random, parent: int, epoch: int) -> None:
        return None

    def cross(self, rng: random.Random, one: int, other: int) -> None:
        return None

    def steps(self, genome: int) -> int:
        return self.asked

    def knobs(self, genome: int) -> dict[str, Any]:
        return {"seed": genome, "artefact": None, "use": "best"}

    def example(self, rng: random.Random) -> int:
        return rng.randrange(2**32)
