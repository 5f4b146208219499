"""Golden seeds (Xu, Zhang, Shi, arXiv 2405.14828): noise that was found to make good pictures of any prompt.

`diffgraft evolve golden_seed` lets every seed of a pool draw the same prompts and ranks them by what a scorer says of the pictures. A run
then takes its seeds from the top of that ranking. A seed's noise is drawn on the CPU from a generator of its own for each picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffgraft import ConfigError, Conflict, DenoiseCall, Effects, Need, Paper, Plugin, PluginConfig, RunCall, Target, Unsupported
from diffgraft.methods.conditioning import number_of_pictures
from diffgraft.methods.findings import Finding
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_golden_seed.method import Part, chosen, generators, spread
from diffgraft_golden_seed.searcher import HOLDS, LARGEST, SeedSearcher

__all__ = ["GoldenSeed"]
__version__ = "0.1.0"


class GoldenSeedConfig(PluginConfig):
    """Knobs of the seeds."""

    seed: int | None = Field(
        None, ge=0, le=LARGEST, description="own: one seed s for all pictures of a call, as torch.Generator().manual_seed(s) for each"
    )
    artefact: str | Path | Finding | None = Field(
        None, description="a ranking that `diffgraft evolve golden_seed` made: a path, owner/name/file.json on the Hub, or a Finding"
    )
    use: Part = Field("best", description="which end of the ranking: the best K seeds, or the worst (to study); 'none' is off")
    k: int | None = Field(None, ge=1, description="K, number of seeds that are used; none: a tenth of those ranked, 1 at least")
    order: Literal["rank", "lot"] = Field(
        "rank",
        description="own: which picture of a call gets which seed: picture i the i-th of the K ('rank'), or drawn from the K by the call's "
        "generator ('lot'): none twice in a call, each call for itself",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.seed is not None and self.artefact is not None:
            raise ValueError("seed and artefact exclude each other: one seed for all pictures, or those of a ranking")
        idle = {"use": self.use == "worst", "k": self.k is not None, "order": self.order == "lot"}
        if self.seed is not None and any(idle.values()):
            given = ", ".join(f"{name} = {getattr(self, name)}" for name, is_given in idle.items() if is_given)
            raise ValueError(
                f"{given} beside seed = {self.seed}: they choose among the seeds of a ranking; leave them out, or give artefact"
            )
        return self


@dataclass
class State:
    """Of one run: a generator for each picture, and whether its first denoiser call is over."""

    generators: list[torch.Generator] | None = None
    begun: bool = False


def given_generator(given: Any, pictures: int) -> torch.Generator | None:
    """The call's generator, of a list the first; ConfigError for what is none, or a list of another length than pictures."""
    if given is None or isinstance(given, torch.Generator):
        return given
    is_list = isinstance(given, (list, tuple))
    if is_list and len(given) == pictures and all(isinstance(each, torch.Generator) for each in given):
        return given[0]  # type: ignore[no-any-return]
    found = f"a list of {len(given)}" if is_list else f"{given!r:.60}"
    raise ConfigError(
        f"plugin 'golden_seed': generator = {found} for a call of {pictures} picture(s): give one torch.Generator, a list with one for "
        "each picture, or none"
    )


class GoldenSeed(Plugin):
    name = "golden_seed"
    paper = Paper(
        title="Good Seed Makes a Good Crop: Discovering Secret Seeds in Text-to-Image Diffusion Models",
        arxiv="2405.14828",
        implemented="ranking a pool of seeds by any reward or by Frechet distance, and sampling from the best (or the worst) of them; "
        "scorers for grey pictures and for frames",
        omitted="the classifier that tells seeds by their pictures; seeds chosen for diverse layout or style; seeds against inserted text "
        "in inpainting",
        licence="no official code was found; written from the paper's description",
    )
    families = ("*",)
    not_on: ClassVar[dict[str, str]] = {"*DiffEdit*": "it begins with latents that an inversion made, and draws no noise"}
    Config = GoldenSeedConfig
    State = State
    neutral: ClassVar[dict[str, Any]] = {"use": "none"}
    active: ClassVar[dict[str, Any]] = {"use": "best", "k": 8}
    effects = Effects(replaces=frozenset({"noise"}), couples_batch=True)
    needs = (Need("search", "artefact", fits=frozenset({"scheduler", "shape", "guidance"}), holds=HOLDS),)
    search = SeedSearcher
    config: GoldenSeedConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.use == "none" or (self.config.seed is None and self.config.artefact is None):
            self.effects = Effects()
        elif self.config.seed is not None:
            self.effects = Effects(replaces=frozenset({"noise"}))

    def check(self, target: Target) -> None:
        self.seeds(target.given.get("artefact"))

    def seeds(self, artefact: Finding | None) -> tuple[int, ...]:
        """Those that are used, the first choice first; none: the plugin is off, or has nothing to go by.

        Raises:
            ConfigError: the ranking has fewer than ``k``.
        """
        knobs = self.config
        if artefact is None or knobs.use == "none":
            return () if knobs.seed is None or knobs.use == "none" else (knobs.seed,)
        ranking = [seed for seed, _ in artefact.facts["ranking"]]
        try:
            return chosen(ranking, knobs.use, knobs.k)
        except ValueError as error:
            raise ConfigError(
                f"plugin 'golden_seed': {error}: give a smaller k, or rank a larger pool (`diffgraft evolve golden_seed --population ...`)"
            ) from error

    def run(self, call: RunCall, next: Any) -> Any:
        seeds, kept = self.seeds(call.given("artefact")), call.shared
        if not seeds:
            if self.config.use != "none":
                call.note("inactive: neither a seed nor a ranking is given (`diffgraft evolve golden_seed` makes one)")
            return next(call)
        pictures = number_of_pictures(call.arguments(), call.family)
        lots = before = None
        if kept.generators is None:
            self._ensure_no_latents(call)
            given = given_generator(call.get("generator"), pictures)
            by_lot = self.config.order == "lot"
            if by_lot:
                lots = torch.default_generator if given is None else given
                before = lots.get_state()
            each = self._seed_of_each(seeds, pictures, given)
            kept.generators = generators(each)
            call.record({"seeds": torch.tensor(each)})
            call.count("pictures", pictures)
            how = "; drawn by " + ("torch's own generator" if given is None else "the call's generator") if by_lot else ""
            how = how or ("" if given is None else "; the call's own generator is not used")
            call.note(f"seeds {', '.join(map(str, each[:16]))}{', ...' if pictures > 16 else ''}{how}")
            self._say_what_is_not_known(call)
        elif len(kept.generators) != pictures:
            call.note(f"a plugin further out goes on with {pictures} of {len(kept.generators)} pictures: their noise is its own choice")
            return next(call)
        try:
            return next(call.replace(generator=kept.generators if pictures > 1 else kept.generators[0]))
        except Exception:
            if lots is not None and not kept.begun:  # refused: nothing was drawn, so that the lot is the same in the next try
                lots.set_state(before)
            raise

    def _seed_of_each(self, seeds: tuple[int, ...], pictures: int, generator: torch.Generator | None) -> list[int]:
        """A seed for each picture; raises ConfigError where one would come twice unasked."""
        if self.config.seed is not None:
            return list(seeds) * pictures
        if pictures > len(seeds):
            raise ConfigError(
                f"plugin 'golden_seed': this call makes {pictures} pictures, and k = {len(seeds)} seeds are used, so that some would come "
                f"twice: make no more than {len(seeds)} a call, set k = {pictures}, or give one seed for all of them "
                f"(seed = {seeds[0]})"
            )
        return spread(seeds, pictures, generator, self.config.order == "lot")

    @staticmethod
    def _say_what_is_not_known(call: RunCall) -> None:
        """Notes where the ranking may not hold, though nothing of the run tells: eta, plugins beside, losses that are all alike."""
        ranked = call.given("artefact")
        if ranked is None:
            return
        if eta := call.get("eta"):
            call.note(f"eta = {eta:g}: a ranking does not keep the eta it was made at; with another one its order may not hold")
        if others := sorted({plugin.name for plugin in call.others if not plugin.is_neutral} - set(ranked.facts.get("beside", ()))):
            call.note(f"the seeds were ranked without {', '.join(others)}: beside it their order may not hold")
        if not ranked.tells_apart:
            call.note("all ranked seeds have the same loss: what ranked them does not tell them apart")

    @staticmethod
    def _ensure_no_latents(call: RunCall) -> None:
        """Raises ConfigError, or Conflict, where the noise is given already."""
        if call.get("latents") is None:
            return
        if "latents" in call.said:
            raise ConfigError(
                "plugin 'golden_seed': the call gives its own latents, so that no noise is drawn and a seed decides nothing: leave latents "
                "out, or take the plugin off"
            )
        raise Conflict("golden_seed: a plugin further out gives the run its latents, so that a seed decides nothing; keep one of the two")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        kept = call.shared
        if kept.generators is not None and not kept.begun:
            self._ensure_drawn(call, len(kept.generators))
            kept.begun = True
        return next(call)  # type: ignore[no-any-return]

    def _ensure_drawn(self, call: DenoiseCall, pictures: int) -> None:
        """Whether the run really began with the seeds' noise, and how long the ranking's runs were."""
        if call.run.arguments.get("latents") is not None:
            raise Conflict(
                "golden_seed: a plugin further in gives the run its latents, so that a seed decides nothing; keep one of the two"
            )
        if len(call.latents) != pictures:
            raise Unsupported(
                f"golden_seed: {len(call.latents)} pictures are drawn where the call seemed to ask for {pictures}: "
                f"{type(call.pipe).__name__} counts them in another way; ask for one prompt and one picture a call"
            )
        ranked = call.given("artefact")
        if ranked is not None and ranked.made_for.steps != call.step.total:
            call.note(f"the seeds were ranked in runs of {ranked.made_for.steps} steps, this one makes {call.step.total}")
