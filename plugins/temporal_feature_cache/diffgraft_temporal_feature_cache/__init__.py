"""Temporal features kept in floats, each computed once: the cache of "Temporal Feature Matters" (arXiv 2407.19547).

(Huang, Gong, Liu, Liu, Li, Lu, Tao.) What the blocks of a denoiser get of the timestep does not depend on the latents, and a schedule
has finitely many timesteps. So the time path need not be quantised to be cheap: its outputs are kept, and quantisers find no layers of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import Conflict, DenoiseCall, Effects, ModulesCall, Paper, Plugin, PluginConfig, RunCall, Step, Target, Unsupported, root_of
from diffgraft.methods.quant.layers import QuantLinear
from pydantic import Field
from torch import Tensor, nn

from diffgraft_temporal_feature_cache.cache import NAME, CachedLinear, Serving, Store, checksums
from diffgraft_temporal_feature_cache.method import POOLED, is_temporal

__all__ = ["TemporalFeatureCache"]
__version__ = "0.1.0"

MEGABYTE = 1_000_000


class TemporalFeatureCacheConfig(PluginConfig):
    """Knobs of TemporalFeatureCache."""

    across_runs: bool = Field(
        False,
        description="not in the paper: what a run computed stays for the next ones, until the plugin is taken off; else it goes with it",
    )
    megabytes: float = Field(256, ge=0, description="not in the paper: at most so much is kept, for each denoiser; 0 is off")


@dataclass
class Seen:
    """Of a run (``call.shared``): the call that is served; timesteps by call and digests of pooled inputs, with what they were read from;
    by denoiser what it is served from, None where it is not; whether one of the inputs that were not compared was another; and how
    many outputs of layers were served, and computed."""

    serving: Serving | None = None
    levels: dict[int, tuple[float, tuple[Any, ...]]] = field(default_factory=dict)
    digests: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)
    stores: dict[str, Store | None] = field(default_factory=dict)
    apart: list[Tensor] = field(default_factory=list)
    served: int = 0
    computed: int = 0


class TemporalFeatureCache(Plugin):
    name = NAME
    paper = Paper(
        title="Temporal Feature Matters: A Framework for Diffusion Model Quantization",
        arxiv="2407.19547",
        implemented="cache-based maintenance: the time path's outputs in floats, kept by timestep (and pooled inputs), beside quantisers",
        omitted="a cache of quantised features, and the selection between it and reconstruction (disturbance-aware): floats have no "
        "disturbance; reconstruction (TIB-based maintenance) is TFMQ",
        licence="Apache-2.0 (TFMQ-DM); written from the paper",
    )
    families = ("unets", "dit", "pixart", "wan", "flux", "sd3")
    Config = TemporalFeatureCacheConfig
    State = Seen
    neutral: ClassVar[dict[str, Any]] = {"megabytes": 0}
    effects = Effects()
    config: TemporalFeatureCacheConfig

    def check(self, target: Target) -> None:
        found = [each for denoiser in target.denoisers.values() for each in temporal(denoiser, nn.Linear)]
        for path, layer in found:
            if isinstance(layer, QuantLinear):
                raise Conflict(f"{NAME}: {path} is quantised already; put {NAME} first in the list, so that quantisers leave it out")
            if type(layer) is nn.Linear and path.endswith(".base_layer"):
                raise Unsupported(
                    f"{NAME}: a LoRA lies over {path.removesuffix('.base_layer')}, and its strength may change in mid-run: fuse it "
                    "(pipe.fuse_lora(), then pipe.unload_lora_weights())"
                )
            if layer.weight.element_size() == 1:
                raise Unsupported(
                    f"{NAME}: {path} is kept as {layer.weight.dtype} (layerwise casting), and only its own layer casts it to compute; "
                    "leave the time path out (enable_layerwise_casting(..., skip_modules_pattern=...)), or the plugin"
                )
        if not found:
            raise Unsupported(f"{NAME}: {type(target.pipe).__name__} has no linear layer on a time path that is known by its name")

    def modules(self, call: ModulesCall, next: Any) -> None:
        for denoiser in call.denoisers.values() if self.config.megabytes > 0 else ():
            root, store = root_of(denoiser), Store(int(self.config.megabytes * MEGABYTE))
            for path, layer in temporal(denoiser, nn.Linear):
                if type(layer) is nn.Linear:
                    parent, _, name = path.rpartition(".")
                    call.swap(root.get_submodule(parent), name, CachedLinear(layer, store))
        next(call)

    def run(self, call: RunCall, next: Any) -> Any:
        result = next(call)
        seen: Seen = call.shared
        if seen.served + seen.computed:
            call.note(f"of the time path {seen.served} outputs of layers were served, {seen.computed} computed")
        call.count("served", seen.served)
        call.count("computed", seen.computed)
        if seen.apart and bool(torch.stack([each.cpu() for each in seen.apart]).any()):  # check: allow host_sync because it is once a run
            for store in seen.stores.values():
                if store is not None:
                    store.forget()
            raise Unsupported(
                f"{NAME}: in this run the time path got something else than at the same timestep before, so the picture is wrong: another "
                f"plugin or a callback changes it ({', '.join(each.name for each in call.others) or 'no other plugin is on'}); take one off"
            )
        return result

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        seen: Seen = call.shared
        if call.model_name not in seen.stores:
            seen.stores[call.model_name] = self.begin(call)
        if (store := seen.stores[call.model_name]) is None:
            return next(call)  # type: ignore[no-any-return]
        seen.serving = serving = Serving(store, store.at(key_of(call)))
        try:
            return next(call)  # type: ignore[no-any-return]
        finally:
            seen.serving = None
            seen.served += serving.served
            seen.computed += serving.computed
            if (apart := serving.apart()) is not None:
                seen.apart.append(apart)

    def begin(self, call: DenoiseCall) -> Store | None:
        """Before the first call of a denoiser in a run: what it is served from, without what was computed with other weights; None where
        everything is computed."""
        found = list(temporal(call.model, CachedLinear))
        if not found:
            call.note("inactive: megabytes = 0" if self.config.megabytes == 0 else f"{call.model_name} has no time path that is known")
            return None
        if editors := [each.name for each in call.others if "timestep" in each.effects.edits and not each.is_neutral]:
            call.note(f"inactive: {', '.join(editors)} edits the timestep")
            return None
        if over := next((path for path, _ in found if path.endswith(".base_layer")), None):
            call.note(f"inactive: a LoRA lies over {over.removesuffix('.base_layer')}, on the time path; fused, it would not matter")
            return None
        if any(layer.weight.is_meta for _, layer in found):
            call.note("inactive: the weights are offloaded one by one")
            return None
        kept: Store = found[0][1].store
        store = kept if self.config.across_runs else Store(kept.limit)
        store.begin(checksums([layer for _, layer in found]))
        return store


def temporal(denoiser: nn.Module, kind: type[nn.Linear]) -> Iterator[tuple[str, Any]]:
    """(path, layer) of the layers of a kind on the time path; of one with a LoRA the path ends in "base_layer"."""
    for path, module in list(root_of(denoiser).named_modules()):
        if isinstance(module, kind) and ".lora_" not in path and is_temporal(path.removesuffix(".base_layer")):
            yield path, module


def key_of(call: DenoiseCall) -> Hashable:
    """What the time path's outputs at this call depend on, beside its weights. Nothing waits for the device but the first time in a run."""
    told = {name: call.get(name) for name in POOLED}
    if call.model.config.get("addition_embed_type") == "text":  # type: ignore[union-attr, operator]
        told["encoder_hidden_states"] = call.get("encoder_hidden_states")  # pooled inside
    device = call.sample.device.type
    how = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_inference_mode_enabled()
    return level_of(call), call.timestep.shape, call.sample.shape[0], call.sample.dtype, how, digest(told, call.shared.digests)


def level_of(call: DenoiseCall) -> float:
    """The value of the schedule's timestep at this call; all of the run are read at once, and again only where they were changed since."""
    step, known = call.step, call.shared.levels
    if step.call not in known or known[step.call][1] != source(step.t):
        steps: list[Step] = [call.step_at(ahead) for ahead in range(max(1, step.calls - step.call))]
        times = torch.stack([torch.as_tensor(each.t).float() for each in steps])
        values = times.tolist()  # check: allow host_sync because it is read once a run
        known.update((each.call, (value, source(each.t))) for each, value in zip(steps, values, strict=True))
    return float(known[step.call][0])


def digest(value: Any, known: dict[tuple[Any, ...], tuple[str, Tensor]]) -> Hashable:
    """A hash of all tensors in a value; one of the same place in memory, not written to since, is not read again."""
    if isinstance(value, Mapping):
        return tuple((name, digest(value[name], known)) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(digest(each, known) for each in value)
    if not isinstance(value, Tensor):
        return value if isinstance(value, Hashable) else repr(value)
    place = source(value)
    if place not in known:
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        read = bytes(data.tolist())  # check: allow host_sync because pooled inputs stay in a run
        known[place] = hashlib.blake2b(read, digest_size=16).hexdigest(), value  # held, so that its place stays its own
    return known[place][0]


def source(x: Any) -> tuple[Any, ...]:
    """Where a tensor's numbers lie and how often they were written to, without reading them."""
    if not isinstance(x, Tensor):
        return (x,)
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, 0 if x.is_inference() else x._version
