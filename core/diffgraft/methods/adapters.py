"""LoRA on a denoiser, with no second copy of it: without the user's own, with others, with one that a plugin brings (``Need("adapter")``).

    with weighted(call.model, {call.given("lora").name: 0.5}):     # in a plugin's `denoise`
        return next(call)

What a plugin brings is there while the plugin is on, and acts only where the plugin shows it: ``weighted`` shows it alone, ``beside``
with what the user has active.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from diffgraft.installed.anatomy import Target, root_of
from diffgraft.installed.errors import ArtefactMismatch, ConfigError, Unsupported, choices
from diffgraft.installed.foreign import said
from diffgraft.installed.plugin import Need, Plugin
from diffgraft.kernel.onion import active_run
from diffgraft.kernel.slots import Slot, forget, keep, opened, set_requires_grad, surely
from diffgraft.kernel.surgery import Attached
from diffgraft.methods.extras import imported


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that carry a LoRA (peft's tuner layers)."""
    return [layer for layer in model.modules() if hasattr(layer, "_disable_adapters") and hasattr(layer, "merged_adapters")]


NOTHING: Mapping[str, Any] = {}
"""What peft knows of a denoiser without LoRA."""


@dataclass(frozen=True, eq=False)
class Found:
    """The layers of a denoiser that carry a LoRA, and what peft knew of it when they were looked for (held, so that nothing has its id)."""

    layers: list[Any]
    home: Mapping[str, Any]
    configs: Mapping[str, Any]

    def still(self, home: Mapping[str, Any]) -> bool:
        """Whether the denoiser has the same LoRA: loading and deleting one changes what peft knows, and unloading all makes it forget."""
        same = home is self.home and len(home) == len(self.configs)
        return same and all(home.get(name) is known for name, known in self.configs.items())


def known_layers(model: nn.Module) -> list[Any]:
    """:func:`adapter_layers`, looked for once a run: a denoiser has thousands of modules, and plugins ask at every call.

    Between runs other plugins may exchange modules; in a run only a LoRA that comes or goes makes others of them.
    """
    run = active_run()
    if run is None:
        return adapter_layers(model)
    home: Mapping[str, Any] = getattr(model, "peft_config", NOTHING)
    found: Found | None = run.forms.get((Found, model))
    if found is None or not found.still(home):
        found = run.forms[Found, model] = Found(adapter_layers(model), home, dict(home))
    return found.layers


def unfused_layers(model: nn.Module) -> list[Any]:
    """The same, none where there is no LoRA.

    Raises:
        Unsupported: one is fused into the weights, so that what is beside it cannot be told from it.
    """
    layers = known_layers(model)
    if any(layer.merged_adapters for layer in layers):
        raise Unsupported(f"the LoRA of this {type(model).__name__} is fused into its weights; pipe.unfuse_lora() first, and leave it so")
    return layers


def removable_layers(model: nn.Module) -> list[Any]:
    """The same, at least one.

    Raises:
        Unsupported: there is no LoRA, or one that is fused into the weights.
    """
    if not (layers := unfused_layers(model)):
        raise Unsupported(
            f"this {type(model).__name__} carries no LoRA that could be switched off; load one with pipe.load_lora_weights(...)"
        )
    return layers


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run ``model`` as if it had no LoRA; afterwards (also after an exception) every switch is as it was.

    Raises:
        Unsupported: there is no LoRA, or it is fused into the weights.
    """
    with opened([switch(layer) for layer in removable_layers(model) if not layer.disable_adapters]):
        yield


def weighted(model: nn.Module, weights: Mapping[str, float]) -> AbstractContextManager[None]:
    """Run ``model`` with these adapters alone, each at its own scale times a weight; afterwards (also after an exception) all is as it was.

    Raises:
        ConfigError: it has no adapter of that name.
        Unsupported: a LoRA is fused into the weights.
    """
    return show_adapters(model, weights, lambda layer: [])


def beside(model: nn.Module, weights: Mapping[str, float]) -> AbstractContextManager[None]:
    """The same with those that are active now (the user's own) as they are; what the user has switched off stays off.

    Raises:
        ConfigError: it has no adapter of that name.
        Unsupported: a LoRA is fused into the weights.
    """
    return show_adapters(model, weights, lambda layer: [] if layer.disable_adapters else layer.active_adapters)


@contextmanager
def show_adapters(model: nn.Module, weights: Mapping[str, float], kept: Callable[[Any], list[str]]) -> Iterator[None]:
    """Show these adapters after those of each layer that are ``kept``; only what differs is written."""
    model = root_of(model)
    layers = unfused_layers(model)
    ensure_on(model, weights)
    slots = []
    for layer in layers:
        active = [*(name for name in kept(layer) if name not in weights), *weights]
        if active != layer.active_adapters:
            slots.append(switch(layer, "_active_adapter", active))
        if any(name in layer.scaling for name in weights):  # a copy, so that nothing is left of what diffusers' own scale rounds
            slots.append(switch(layer, "scaling", {name: scale * weights.get(name, 1.0) for name, scale in layer.scaling.items()}))
        if layer.disable_adapters:
            slots.append(switch(layer, "_disable_adapters", False))
    with opened(slots):
        yield


def ensure_on(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ConfigError where an adapter is not on ``model``, such as one that ``pipe.unload_lora_weights()`` took along."""
    known = getattr(model, "peft_config", {})
    if unknown := next((name for name in names if name not in known), None):
        lost = "; pipe.unload_lora_weights() takes those of plugins too: load the plugin again" if unknown.startswith(BROUGHT) else ""
        raise ConfigError(f"no adapter {unknown!r} on this {type(model).__name__}{choices(unknown, known, 'On it')}{lost}")


class Ranked(nn.Module):
    """The second half of a LoRA, with what comes to it times ``factor`` [rank]."""

    def __init__(self, second: Any, factor: Tensor) -> None:
        super().__init__()
        self.second = second
        self.factor = factor.reshape(-1, *[1] * (second.weight.ndim - 2))  # the axis of ranks is the last, of a convolution the first

    def forward(self, h: Tensor) -> Tensor:
        if self.factor.device != h.device or self.factor.dtype != h.dtype:
            self.factor = self.factor.to(h.device, h.dtype)  # once a run
        return self.second(h * self.factor)  # type: ignore[no-any-return]


def ranked(model: nn.Module, name: str, factors: Mapping[str, Tensor]) -> list[Slot]:
    """Slots that show each rank of the adapter ``name`` at a strength of its own, by the layers' paths; for :func:`showing`.

    Raises:
        ConfigError: it is not on the model.
    """
    ensure_on(root_of(model), [name])
    slots = []
    for path, factor in factors.items():
        home: Any = root_of(model).get_submodule(path).lora_B._modules  # type: ignore[union-attr]
        slot = Slot(home, name, partial(home.__getitem__, name))
        slot.put(Ranked(home[name], factor))
        slots.append(slot)
    return slots


showing = opened
"""Slots that are open inside ``with``."""


def switch(layer: Any, name: str = "_disable_adapters", value: Any = True) -> Slot:
    """A slot that shows a layer's adapters as disabled, or others (peft's own setters would also touch ``requires_grad``)."""
    slot = Slot(layer.__dict__, name, lambda: getattr(layer, name))
    slot.value = value
    return slot


BROUGHT = "diffgraft:"
"""What the names of plugins' adapters begin with."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA of one denoiser, as diffusers reads it from a file.

    tensors  by the names that diffusers gives them
    strength  what its file says of its scale: the keywords of ``load_lora_adapter`` for it
    """

    tensors: Mapping[str, Tensor]
    strength: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Adapter(Attached):
    """A LoRA that a plugin brings, read and found to fit.

    name   under which it is on the denoiser, for :func:`weighted`
    loras  by the denoiser's attribute
    """

    name: str
    loras: Mapping[str, Lora]

    @classmethod
    def of(cls, plugin: Plugin, need: Need, value: Any, target: Target, number: int | None = None) -> Adapter:
        """What a knob names; ``number`` of several."""
        return read_adapter(plugin, need, value, target, number)

    def put_on(self, pipe: Any) -> None:
        self.take_off(pipe)  # a deep copy of the pipeline has it already
        for attribute, lora in self.loras.items():
            model: Any = root_of(getattr(pipe, attribute))
            before = [(value, value.requires_grad) for value in model.parameters()]
            layers = {layer: layer.active_adapters for layer in adapter_layers(model)}
            active: list[str] = next(iter(layers.values()), [])
            whole = isinstance(getattr(model, "_hf_hook", None), CpuOffload)  # what moves as one takes its new layers along
            model.load_lora_adapter(
                dict(lora.tensors),
                prefix=attribute.removesuffix("_2"),
                adapter_name=self.name,
                low_cpu_mem_usage=True,  # no weights are drawn that are exchanged at once
                _pipeline=None if whole else pipe,  # other offloading is taken off meanwhile, and put on again for torch's own device
                **lora.strength,
            )
            unrounded(model, self.name, lora.tensors)
            for layer in adapter_layers(model):  # the new one waits, those of the user go on
                keep(layer.__dict__, "_active_adapter", layers.get(layer, active))
            set_requires_grad(model.parameters(), False)
            set_requires_grad([value for value, grad in before if grad], True)

    def take_off(self, pipe: Any) -> None:
        for attribute in self.loras:
            surely(partial(remove_adapter, root_of(getattr(pipe, attribute)), self.name))


def unrounded(model: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Bring the LoRA that was just put on ``model`` to the dtype that it computes in, where peft has given it that of weights that are kept
    in 8 bits and cast layer by layer: nothing casts the new layers, and no kernel computes with such numbers."""
    for key, value in tensors.items():
        if (found := PLACE.fullmatch(key)) is not None:
            half = getattr(model.get_submodule(found["path"]), f"lora_{found['half']}")[name]
            kept = getattr(half, found["part"])
            if kept.dtype.is_floating_point and kept.dtype.itemsize == 1:
                half.to(model.dtype)
                with torch.no_grad():
                    getattr(half, found["part"]).copy_(value)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off, and the layers that nothing is left in; done again, it does what is left to do."""
    for parent in list(model.modules()):
        for key, layer in list(parent._modules.items()):
            if layer is None or not hasattr(layer, "merged_adapters") or not hasattr(layer, "scaling"):
                continue
            if name in layer.scaling or name in layer.lora_A:
                layer.delete_adapter(name)
                if not layer.scaling:
                    keep(parent._modules, key, layer.get_base_layer())  # type: ignore[arg-type]
    config = model.__dict__.get("peft_config", {})
    forget(config, name)
    if not config:
        for key in ("peft_config", "_hf_peft_config_loaded"):
            forget(model.__dict__, key)


def fetch_adapter(plugin: Plugin, need: Need, value: Any, target: Target) -> Adapter | list[Adapter]:
    """An adapter, or a list of them, in memory or made of files; ``need.holds`` may be a kind of adapter that reads more of a file."""
    kind = need.holds or Adapter

    def one(each: Any, number: int | None = None) -> Adapter:
        return each if isinstance(each, kind) else kind.of(plugin, need, each, target, number)

    return [one(each, number) for number, each in enumerate(value, 1)] if isinstance(value, (list, tuple)) else one(value)


def read_adapter(plugin: Plugin, need: Need, value: Any, target: Target, number: int | None = None) -> Adapter:
    """A LoRA file (path or Hub id), or tensors; or a dict of them by denoiser (``{"transformer_2": ...}``), where there are two.

    Raises:
        Unsupported: the pipeline loads no LoRA, or has one that is fused.
        ConfigError: there is no such file, or no such denoiser.
        ArtefactMismatch: it is of another model.
    """
    where = f"plugin {plugin.name!r}: {need.knob}" + (f" number {number}" if number else "")
    pipe = target.pipe
    if not hasattr(pipe, "load_lora_weights"):
        raise Unsupported(f"{where}: {type(pipe).__name__} loads no LoRA")
    imported("peft", f"{where}: a LoRA")
    of_each = isinstance(value, Mapping) and not any(isinstance(each, Tensor) for each in value.values())
    if of_each and not value:
        raise ConfigError(f"{where} = {{}} names no denoiser: give a file, or one for each of {', '.join(target.denoisers)}")
    sources = value if of_each else {next(iter(target.denoisers)): value}
    loras = {}
    for attribute, source in sources.items():
        if attribute not in target.denoisers:
            raise ConfigError(f"{where}: no denoiser {attribute!r}{choices(str(attribute), target.denoisers, 'There are')}")
        model = root_of(target.denoisers[attribute])
        unfused_layers(model)
        loras[attribute] = read_lora(pipe, model, source, where)
    return Adapter(f"{BROUGHT}{plugin.name}:{need.knob}" + (f":{number}" if number else ""), loras)


def read_lora(pipe: Any, model: Any, source: Any, where: str) -> Lora:
    """A LoRA, every tensor of which has its place in ``model``."""
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise ConfigError(f"{where} = {source!r} is no LoRA: give a file, owner/name on the Hub, tensors, or a dict of them by denoiser")
    shown = "(in memory)" if isinstance(source, Mapping) else os.fspath(source)
    given = dict(source) if isinstance(source, Mapping) else shown
    if (shown.startswith((".", "/", "~")) or Path(shown).suffix in FILES) and not Path(shown).expanduser().exists():  # no Hub id
        raise ConfigError(f"{where} = {shown}: there is no such file")
    folder = Path(shown).expanduser()
    if folder.is_dir() and not any((folder / each).exists() for each in NAMES):
        raise ConfigError(f"{where} = {shown} is a folder without {NAMES[0]}: name the file")
    try:
        read = type(pipe).lora_state_dict(given, return_lora_metadata=True, return_alphas=True, unet_config=model.config)
    except OSError as error:
        raise ConfigError(f"{where} = {shown}: {said(error)}") from None
    except Exception as error:  # whatever a wrong file does in diffusers' converters
        raise ArtefactMismatch(f"{where} = {shown} cannot be read as a LoRA: {said(error)}") from error
    state, *alphas, metadata = read  # some classes know no alphas beside the tensors
    state = with_all_biases(convert_unet_state_dict_to_peft(state))  # of older names too
    wrong = [why for name, value in state.items() if (why := misfit(model, name, value)) is not None]
    wrong = wrong or unpaired(state)
    wrong += [f"{name} is a bias without weights" for name in state if name.endswith(".bias") and f"{name[:-4]}weight" not in state]
    if wrong or not state:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        why = "; ".join(wrong[:3]) + more if wrong else "it is empty"
        raise ArtefactMismatch(f"{where} = {shown} is no LoRA of this {type(model).__name__}: {why}")
    return Lora(state, {"metadata": metadata} | ({"network_alphas": alphas[0]} if alphas else {}))


def unpaired(state: Mapping[str, Tensor]) -> list[str]:
    """What is wrong between the tensors of a LoRA: a half without the other, halves of different ranks."""
    wrong = []
    for name, value in state.items():
        half, other = ("A", "B") if name.endswith(".lora_A.weight") else ("B", "A")
        if name.endswith(f".lora_{half}.weight"):
            partner = state.get(name.removesuffix(f"{half}.weight") + f"{other}.weight")
            if partner is None:
                wrong.append(f"{name} has no lora_{other} beside it")
            elif half == "A" and value.shape[0] != (rank := partner.shape[1] if partner.ndim > 1 else 0):
                wrong.append(f"{name} is of rank {value.shape[0]}, its lora_B of rank {rank}")
    return wrong


def with_all_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the biases that a LoRA with some lacks: peft gives every layer one, and diffusers leaves those that no file fills empty."""
    lacks: dict[str, Tensor] = {}
    if any(name.endswith(".lora_B.bias") for name in state):
        wide = {name.removesuffix("weight") + "bias": value for name, value in state.items() if name.endswith(".lora_B.weight")}
        lacks = {name: value.new_zeros(value.shape[0]) for name, value in wide.items() if name not in state}
    return {**state, **lacks}


NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What diffusers looks for in a folder."""
FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
"""What the names of LoRA files end with."""
PLACE = re.compile(r"(?:unet|transformer)\.(?P<path>.+?)\.lora_(?P<half>[AB])\.(?P<part>weight|(?<=B\.)bias)")
"""A tensor of a LoRA, as diffusers names it once a file is read."""


def misfit(model: nn.Module, name: str, value: Tensor) -> str | None:
    """What is wrong with a tensor of a LoRA, or None."""
    found = PLACE.fullmatch(name)
    if found is None:
        return f"{name} is no part of a denoiser's LoRA"
    try:
        layer: Any = model.get_submodule(found["path"])
    except AttributeError:
        return f"{name} has no layer here"
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if weight is None:
        return f"{name} is of a layer without weights"
    axis = 1 if found["half"] == "A" else 0
    if axis >= value.ndim or weight.shape[axis] != value.shape[axis]:
        return f"{name} has shape {tuple(value.shape)}, its layer {tuple(weight.shape)}"
    return None if bool(value.float().isfinite().all()) else f"{name} has numbers that are not finite"
