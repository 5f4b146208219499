"""HarmoniCa: a learned router says which layers of a DiT compute at which step; the others give what they gave last (arXiv 2410.01723).

A DiT block adds gate * A(.) of its attention and gate * F(.) of its feed-forward. Between two steps A and F change less at some layers and
steps than at others, and which these are is learned once for a model, a scheduler and a number of steps: a score for each step and layer.
Where it is not above tau the layer does not run, and its last output, not yet gated, takes the place of the new one. Norms, modulation
and gates are always those of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

from diffgraft import ArtefactMismatch, BlockCall, BlockInfo, ConfigError, DenoiseCall, Effects, Need, Plugin, Target, Unsupported
from diffgraft.methods.artefacts import Artefact, make_again
from torch import Tensor

from diffgraft_harmonica.fitter import RouterFitter
from diffgraft_harmonica.knobs import HOLDS, PAPER, HarmoniCaConfig, routed
from diffgraft_harmonica.method import computed

__all__ = ["HarmoniCa"]
__version__ = "0.1.0"


@dataclass
class Cache:
    """Of a branch: the outputs that the next step reuses, by layer, and which step it is in. Of the run (``call.shared``): its plan."""

    plan: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    index: int = -1
    seen: Any = None
    again: bool = False


class HarmoniCa(Plugin):
    name = "harmonica"
    paper = PAPER
    families = ("dit", "pixart")
    Config = HarmoniCaConfig
    State = Cache
    neutral: ClassVar[dict[str, Any]] = {"threshold": 0}
    active: ClassVar[dict[str, Any]] = {"threshold": 0.5}
    effects = Effects(skips=frozenset({"blocks"}), needs=frozenset({"calibrated_run"}))
    needs = (Need("fit", "router", fits=frozenset({"scheduler", "steps", "shape", "guidance"}), holds=HOLDS),)
    fitting = RouterFitter
    config: HarmoniCaConfig

    def check(self, target: Target) -> None:
        layers = [block.path for block in routed(target.blocks)]
        if not layers:
            raise Unsupported(f"harmonica: {type(target.pipe).__name__} names no attention and feed-forward layers in its blocks")
        router: Artefact | None = target.given.get("router")
        if router is not None and (known := router.facts["layers"]) != layers:
            pairs = enumerate(zip_longest(known, layers))
            column, theirs, here = next((k, a, b) for k, (a, b) in pairs if a != b)
            raise ArtefactMismatch(
                f"harmonica: column {column} of the router {router.path or '(in memory)'} is for {str(theirs)[:80]!r}, and layer {column} "
                f"of this denoiser is {here!r}; {make_again('harmonica', 'fit')}"
            )

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        return [] if self.config.threshold == 0 else routed(blocks)

    def plan(self, call: DenoiseCall) -> dict[str, tuple[bool, ...]]:
        """At which of the run's denoiser calls each layer computes; read once a run.

        Raises:
            ConfigError: there is no router.
            ArtefactMismatch: it has another number of steps.
        """
        run: Cache = call.shared
        if not run.plan:
            router: Artefact | None = call.given("router")
            if router is None:
                raise ConfigError(
                    f"plugin 'harmonica': router = None: which layers may be reused is learned; {make_again('harmonica', 'fit')}"
                )
            logits, calls = router.tensors["logits"], call.step.calls
            if len(logits) != calls:
                raise ArtefactMismatch(
                    f"harmonica: the router has {len(logits)} rows, this run {calls} denoiser calls; {make_again('harmonica', 'fit')}"
                )
            if (learned := router.facts["threshold"]) != self.config.threshold:
                call.note(f"threshold = {self.config.threshold}: the router was learned with {learned}, for which its scores are right")
            run.plan = dict(zip(router.facts["layers"], computed(logits, self.config.threshold), strict=True))
        return run.plan

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.threshold == 0:
            return next(call)  # type: ignore[no-any-return]
        cache, i, x = call.state, call.step.call, call.sample
        cache.plan = self.plan(call)
        cache.again = i == cache.index  # by a plugin further out, for inputs of its own: computed, and not kept
        if not cache.again:
            seen = (call.model_name, x.shape, x.dtype, x.device)
            if i < cache.index or seen != cache.seen:  # the schedule began again, or guidance was cut off
                cache.kept.clear()
            cache.index, cache.seen = i, seen
        return next(call)  # type: ignore[no-any-return]

    def block(self, call: BlockCall, next: Any) -> Any:
        cache: Cache = call.state
        if cache.again:
            return next(call)
        path, i = call.info.path, cache.index
        plan, out = cache.plan[path], cache.kept.pop(path, None)
        if out is None or plan[i]:
            out = next(call)
            call.count("computed")
        else:
            call.count("reused")
        if i + 1 < len(plan) and not plan[i + 1]:
            cache.kept[path] = out
        return out
