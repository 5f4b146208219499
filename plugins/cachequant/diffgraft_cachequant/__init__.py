"""CacheQuant: cached U-Net features at the best steps, corrected, on quantised layers (arXiv 2503.01323).

(Liu, Li, Gu.) Most U-Net calls reuse the deep feature of an earlier one, as in DeepCache. Which calls are whole is found by
dynamic programming over measured distances, the feature that is reused is mapped to the one that it stands for by a measured affine map of
each channel, and so is what quantised layers make of it: neither needs training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import (
    ArtefactMismatch,
    BlockCall,
    BlockInfo,
    ConfigError,
    DenoiseCall,
    Effects,
    ModulesCall,
    Need,
    Plugin,
    RunCall,
    Target,
    Unsupported,
    denoisers_of,
)
from diffgraft.methods.artefacts import Artefact, make_again, make_again_with
from diffgraft.methods.quant.kept import as_made, restore
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import ensure_current, put
from diffgraft.methods.quant.told import simulated
from diffgraft.methods.skips import Cache, Caches, bypassed, bypassing, ensure_branch, skipping
from torch import Tensor

from diffgraft_cachequant.calibration import HOLDS, Measure
from diffgraft_cachequant.knobs import CORRECTS_QUANTISATION, PAPER, CacheQuantConfig
from diffgraft_cachequant.layers import OURS, on_grids, splits, wanted, with_correction
from diffgraft_cachequant.method import best_schedule, corrected

__all__ = ["CacheQuant"]
__version__ = "0.1.0"


@dataclass
class Run(Caches):
    """Of a branch: its caches. Of the run (``call.shared``): the number of the U-Net call that is in progress, on the host and on the
    device, which calls are whole, the correction of the cached feature on its device, and the knobs with what the artefact says."""

    knobs: CacheQuantConfig | None = None
    at: tuple[int, Tensor] | None = None
    keys: tuple[int, ...] = ()
    affine: tuple[Tensor, Tensor] | None = None


class CacheQuant(Plugin):
    name = "cachequant"
    paper = PAPER
    families = ("unets",)
    Config = CacheQuantConfig
    State = Run
    neutral: ClassVar[dict[str, Any]] = {"interval": 1, "bits": "w32a32"}
    active: ClassVar[dict[str, Any]] = {"interval": 2, "bits": "w8a8"}
    # scales are fixed; but the last bits of a batch's products differ from those of one row's, and bits decide roundings
    effects = Effects(skips=frozenset({"blocks"}), edits=frozenset({"weights"}), needs=frozenset({"calibrated_run"}), couples_batch=True)
    needs = (Need("artefact", "artefact", holds=HOLDS),)
    calibration = Measure
    tune: ClassVar[dict[str, Any]] = {"interval": (2, 3, 5)}
    config: CacheQuantConfig

    # what is refused -----------------------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        ensure_branch(target.blocks, self.config.branch, self.name)
        ensure_current(target.denoisers, self.name)
        artefact: Artefact | None = target.given.get("artefact")
        knobs = made_with(self.config, artefact)
        layers = wanted(target.denoisers, knobs, OURS)
        if len(target.denoisers) > 1:
            raise Unsupported(
                f"cachequant: {type(target.pipe).__name__} has {len(target.denoisers)} denoisers, and a calibration is of one"
            )
        if artefact is not None:
            self.check_artefact(artefact, knobs, [layer.key for layer in layers])

    def check_artefact(self, artefact: Artefact, knobs: CacheQuantConfig, layers: Sequence[str]) -> None:
        """Raises ArtefactMismatch where it was made for other knobs than those that were said."""
        facts = artefact.facts
        if knobs.caches and knobs.interval > facts["interval"]:
            raise ArtefactMismatch(
                f"cachequant: interval = {knobs.interval}: the artefact was made for up to {facts['interval']}; "
                f"take interval={facts['interval']}, or {self.again('interval')}"
            )
        same = {"branch": knobs.caches or knobs.corrects_quantisation, "bits": knobs.quantises, "inputs": knobs.quantises}
        for knob, matters in same.items():
            if matters and getattr(knobs, knob) != facts[knob]:
                raise ArtefactMismatch(
                    f"cachequant: {knob} = {getattr(knobs, knob)!r}: the artefact was made for {facts[knob]!r}; "
                    f"take {knob}={facts[knob]!r}, or {self.again(knob)}"
                )
        if knobs.corrects_quantisation and facts["correct"] not in CORRECTS_QUANTISATION:
            raise ArtefactMismatch(
                f"cachequant: correct = {knobs.correct!r}: the artefact was made for {facts['correct']!r}, without that; take "
                f"correct={facts['correct']!r}, or {self.again('correct')}"
            )
        if knobs.quantises and (kept := [name for name in facts["keep"] if name not in knobs.keep]):
            raise ArtefactMismatch(
                f"cachequant: keep = {list(knobs.keep)}: the artefact was made with {kept[0]!r} among them, so it has no scales for it; "
                f"take keep={facts['keep']}, or {self.again('keep')}"
            )
        known = {name.partition("/")[0] for name in facts["scales"]}
        if knobs.quantises and (other := next((key for key in known if key not in layers and not is_under(key, knobs.keep)), None)):
            raise ArtefactMismatch(f"cachequant: the artefact holds {other}, and this model has no such layer; {self.again('bits')}")
        if knobs.quantises and not known:
            raise ArtefactMismatch(f"cachequant: the artefact holds no layer; {self.again('bits')}")

    def again(self, knob: str) -> str:
        """How to get an artefact that fits."""
        return make_again_with(self.name, {knob: getattr(self.config, knob)})

    def knobs(self, call: Any) -> CacheQuantConfig:
        """Those of this run: an artefact's where nothing was said."""
        shared: Run = call.shared
        if shared.knobs is None:
            shared.knobs = made_with(self.config, call.given("artefact"))
        return shared.knobs

    def measured(self, call: Any) -> Artefact:
        """The artefact.

        Raises:
            ConfigError: there is none, and something of it was to be measured.
        """
        artefact: Artefact | None = call.given("artefact")
        if artefact is None:
            knobs = self.config
            without = {
                "schedule='uniform'": knobs.caches and knobs.schedule == "dps",
                "correct='off'": knobs.corrects_cache,
                "bits='w32a32'": knobs.quantises,
            }
            raise ConfigError(
                "plugin 'cachequant': artefact = None: best steps, corrections and scales are measured; "
                f"{make_again(self.name)}, or do without: {', '.join(way for way, lacks in without.items() if lacks)}"
            )
        return artefact

    # quantised layers ----------------------------------------------------------------------------------------------------------------

    def modules(self, call: ModulesCall, next: Any) -> None:
        artefact: Artefact | None = call.given("artefact")
        knobs = made_with(self.config, artefact)
        if knobs.quantises and artefact is not None:  # a run without one is refused
            known = {name.partition("/")[0] for name in artefact.facts["scales"]}
            layers = [layer for layer in wanted(call.denoisers, knobs) if layer.key in known]
            cut = splits(layers, call.denoisers) if knobs.weight_bits != FLOAT else {}
            calls = len(artefact.tensors["distance"])
            made = {layer.key: on_grids(layer, knobs, cut.get(layer.key, 0), calls) for layer in layers}
            tensors = {"scales": artefact.tensors["scales"], "up": torch.zeros(0, dtype=torch.bool)}
            restore(made, tensors, {"scales": artefact.facts["scales"], "up": {}}, self.again("bits"))
            for layer in layers:
                new, gain = made[layer.key], artefact.tensors.get(f"gain.{layer.key}")
                if gain is not None and knobs.corrects_quantisation:
                    new = with_correction(layer, new, gain, artefact.tensors[f"offset.{layer.key}"])
                put(call.swap, layer, new)
        next(call)

    def run(self, call: RunCall, next: Any) -> Any:
        knobs = self.knobs(call)
        artefact = self.measured(call) if knobs.is_measured else None
        if artefact is not None and knobs.caches and knobs.schedule == "dps":
            call.shared.keys = best_schedule(artefact.tensors["distance"], knobs.interval)
        if not knobs.quantises:
            if not knobs.caches:
                call.note("inactive: no step skips, and no layer is quantised")
            return next(call)
        call.note(f"quantisation is {simulated(denoisers_of(call.pipe, call.family), self.name, knobs.bits)}")
        return next(call)

    # the cache -----------------------------------------------------------------------------------------------------------------------

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """Only what skip steps leave out: a module that always runs carries no hook."""
        return bypassed(blocks, self.config.branch, self.name) if self.config.caches else []

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        knobs = self.knobs(call)
        if knobs.quantises:
            call.shared.at = call.step.call, torch.full((), call.step.call, device=call.sample.device)
        if not knobs.caches:
            return next(call)  # type: ignore[no-any-return]
        return skipping(call, next, lambda cache: self.is_due(call, cache))

    def is_due(self, call: DenoiseCall, cache: Cache) -> bool:
        """Whether this call is whole, which ``cache.call`` was last."""
        knobs = self.knobs(call)
        if knobs.schedule == "uniform":
            return call.step.index - cache.last >= knobs.interval
        shared: Run = call.shared
        return any(cache.call < key <= call.step.call for key in shared.keys)

    def block(self, call: BlockCall, next: Any) -> Any:
        knobs = self.knobs(call)
        if not knobs.caches:
            return next(call)
        return bypassing(call, next, (lambda F: self.feature(call, F)) if knobs.corrects_cache else None)

    def feature(self, call: BlockCall, F: Tensor) -> Tensor:
        """a F + b, for this call and the age of F."""
        shared: Run = call.shared
        if shared.affine is None:
            tensors = self.measured(call).tensors
            shared.affine = tensors["gain"].to(F.device), tensors["offset"].to(F.device)
        i, k = call.step.call, call.step.call - call.state.now.call
        a, b = shared.affine
        if not 1 <= k <= a.shape[1]:  # asked again in one step, or a whole call was left out: that was not measured
            return F
        return corrected(F, a[i, k - 1], b[i, k - 1])


def made_with(config: CacheQuantConfig, artefact: Artefact | None) -> CacheQuantConfig:
    """The knobs of a run: where nothing was said, those of the artefact. ``branch`` decides which blocks are looked at, so it is said."""
    return as_made(config, artefact, ("bits", "inputs", "keep", "correct", "interval"))


def is_under(key: str, names: Sequence[str]) -> bool:
    """Whether a layer is one of these, or lies under one."""
    return any(f".{name}." in f".{key}." for name in names)
