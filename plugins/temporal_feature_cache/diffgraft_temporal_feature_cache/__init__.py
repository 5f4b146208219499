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
from diffgraft.methods.standing_in import has_own_forward
from pydantic import Field
from torch import Tensor, nn

from diffgraft_temporal_feature_cache.cache import NAME, CachedLinear, Serving, Store, checksums
from diffgraft_temporal_feature_cache.method import POOLED, enters, is_temporal

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
class Begun:
    """Of a denoiser in a run: what it is served from, the modules whose parameters enter that, what these were when it began, and how many
    outputs were served since."""

    store: Store
    modules: list[nn.Module]
    weights: tuple[Hashable, ...]
    served: int = 0


@dataclass
class Seen:
    """Of a run (``call.shared``): the call that is served; timesteps by call and digests of pooled inputs, with what they were read from;
    by denoiser what it is served from, None where it is not; whether one of the inputs that were not compared was another; and how
    many outputs of layers were served, and computed."""

    serving: Serving | None = None
    levels: dict[int, tuple[float, tuple[Any, ...]]] = field(default_factory=dict)
    digests: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)
    begun: dict[str, Begun | None] = field(default_factory=dict)
    apart: list[Tensor] = field(default_factory=list)
    served: int = 0
    computed: int = 0

    def forget(self) -> None:
        """Keep nothing of what this run has used."""
        for each in self.begun.values():
            if each is not None:
                each.store.forget()


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
        for denoiser in target.denoisers.values():
            if kept := quantised_on(entering(denoiser)):
                raise Unsupported(f"{NAME}: {kept}; load plain weights, or leave the plugin out")
        found = [each for denoiser in target.denoisers.values() for each in temporal(denoiser, nn.Linear)]
        for path, layer in found:
            ensure_floats(path, layer)
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
                ensure_floats(path, layer)  # also here: a quantiser before it in the list was put on after `check`
                if type(layer) is nn.Linear and not has_own_forward(layer):
                    parent, _, name = path.rpartition(".")
                    call.swap(root.get_submodule(parent), name, CachedLinear(layer, store))
        next(call)

    def run(self, call: RunCall, next: Any) -> Any:
        seen: Seen = call.shared
        try:
            result = next(call)
        except BaseException:
            seen.forget()  # nothing says what the weights were until then
            raise
        if seen.served + seen.computed:
            call.note(f"of the time path {seen.served} outputs of layers were served, {seen.computed} computed")
        call.count("served", seen.served)
        call.count("computed", seen.computed)
        self.ensure_weights(seen)
        if seen.apart and bool(torch.stack([each.cpu() for each in seen.apart]).any()):  # check: allow host_sync because it is once a run
            seen.forget()
            raise Unsupported(
                f"{NAME}: in this run the time path got something else than at the same timestep before, so the picture is wrong: another "
                f"plugin or a callback changes it ({', '.join(each.name for each in call.others) or 'no other plugin is on'}); take one off"
            )
        return result

    def ensure_weights(self, seen: Seen) -> None:
        """At the end of a run: forget what was computed while the weights changed.

        Raises:
            Unsupported: something was served in that run.
        """
        began = [(name, each) for name, each in seen.begun.items() if each is not None and (each.served or self.config.across_runs)]
        changed = [(name, each) for name, each in began if checksums(each.modules) != each.weights]
        for _, begun in changed:
            begun.store.forget()
        if served := [name for name, begun in changed if begun.served]:
            raise Unsupported(
                f"{NAME}: the weights of the time path of {', '.join(served)} were changed in mid-run (a LoRA fused, a state loaded), and "
                "outputs of the ones before may have been served, so the picture may be wrong: change them between runs, or take "
                f"{NAME} off"
            )

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        seen: Seen = call.shared
        if call.model_name not in seen.begun:
            seen.begun[call.model_name] = self.begin(call)
        if (begun := seen.begun[call.model_name]) is None:
            return next(call)  # type: ignore[no-any-return]
        seen.serving = serving = Serving(begun.store, begun.store.at(key_of(call)))
        try:
            return next(call)  # type: ignore[no-any-return]
        finally:
            seen.serving = None
            begun.served += serving.served
            seen.served += serving.served
            seen.computed += serving.computed
            seen.apart += serving.apart()

    def begin(self, call: DenoiseCall) -> Begun | None:
        """Before the first call of a denoiser in a run: what it is served from, without what was computed with other weights; None where
        everything is computed."""
        found = list(temporal(call.model, CachedLinear))
        if not found:
            call.note(f"inactive: {'megabytes = 0' if self.config.megabytes == 0 else why_none(call)}")
            return None
        if editors := [each.name for each in call.others if "timestep" in each.effects.edits and not each.is_neutral]:
            call.note(f"inactive: {', '.join(editors)} edits the timestep")
            return None
        if over := next((path for path, _ in found if path.endswith(".base_layer")), None):
            call.note(
                f"inactive: a LoRA lies over {over.removesuffix('.base_layer')}, on the time path; it would not matter as a part of the "
                "weights (pipe.fuse_lora(), then pipe.unload_lora_weights())"
            )
            return None
        modules = entering(call.model)
        if any(parameter.is_meta for module in modules.values() for parameter in module.parameters()):
            call.note("inactive: the weights are offloaded one by one")
            return None
        if quantised := quantised_on(modules):
            call.note(f"inactive: {quantised}")
            return None
        kept: Store = found[0][1].store
        store = kept if self.config.across_runs else Store(kept.limit)
        begun = Begun(store, [*modules.values()], checksums([*modules.values()]))
        store.begin(begun.weights)
        return begun


def ensure_floats(path: str, layer: nn.Module) -> None:
    """Raises Conflict where a layer of the time path is quantised."""
    if isinstance(layer, QuantLinear):
        raise Conflict(f"{NAME}: {path} is quantised already; put {NAME} first in the list, so that quantisers leave it out")


def entering(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The modules whose parameters enter the time path, by path."""
    return {path: module for path, module in root_of(denoiser).named_modules() if enters(path) and ".lora_" not in path}


def quantised_on(modules: Mapping[str, nn.Module]) -> str | None:
    """In words, the first weight that another library keeps in a class of its own (torchao, bitsandbytes): its bits cannot be summed up."""
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) not in (Tensor, nn.Parameter):
                return f"{path}.{name}, on the time path, is kept as {type(parameter).__name__}, and nobody could tell whether it changes"
    return None


def why_none(call: DenoiseCall) -> str:
    """Why no layer of a denoiser is exchanged."""
    layers = [layer for _, layer in temporal(call.model, nn.Linear)]
    if not layers:
        return f"{call.model_name} has no time path that is known"
    if all(has_own_forward(layer) for layer in layers):
        return (
            f"the layers of the time path of {call.model_name} have forwards of their own (offloading by layers, layerwise casting, "
            "accelerate), and compute themselves"
        )
    return f"the time path of {call.model_name} is not exchanged: it came after {NAME} was put on; take {NAME} off and put it on again"


def temporal(denoiser: nn.Module, kind: type[nn.Linear]) -> Iterator[tuple[str, Any]]:
    """(path, layer) of the layers of a kind on the time path; of one with a LoRA the path ends in "base_layer"."""
    for path, module in list(root_of(denoiser).named_modules()):
        if isinstance(module, kind) and ".lora_" not in path and is_temporal(path.removesuffix(".base_layer")):
            yield path, module


def key_of(call: DenoiseCall) -> Hashable:
    """What the time path's outputs at this call depend on, beside its weights.

    Nothing waits for the device but the first time in a run, and where a pipeline makes a pooled input anew for each step, which then is
    read once a step: FluxControlNet's ``guidance``.
    """
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
        read = bytes(data.tolist())  # check: allow host_sync because most pooled inputs stay in a run, see `key_of`
        known[place] = hashlib.blake2b(read, digest_size=16).hexdigest(), value  # held, so that its place stays its own
    return known[place][0]


def source(x: Any) -> tuple[Any, ...]:
    """Where a tensor's numbers lie and how often they were written to, without reading them."""
    if not isinstance(x, Tensor):
        return (x,)
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, 0 if x.is_inference() else x._version
