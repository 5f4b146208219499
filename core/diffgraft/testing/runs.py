"""Runs of tiny pipelines: their arguments, what they give, the plain one to hold a plugin against."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines import PipelineState
from torch import Tensor, nn

from diffgraft.installed import registry
from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.stack import stack_of
from diffgraft.lab.machine import threads
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.decoding import ensure_decodes, to_pixels
from diffgraft.methods.fitting import fit_call
from diffgraft.methods.inputs import calling, pictures_in
from diffgraft.methods.measurements import Mask
from diffgraft.methods.problems import Problem, simulated
from diffgraft.methods.search import search_call
from diffgraft.testing.setting import BATCHED_INPUTS, NEGATIVES, PROMPTS, STEPS, Setting
from diffgraft.testing.tiny import EMBED, Facts, add_lora, facts, prepared, quiet, tiny


def arguments(family: Family, class_name: str, setting: Setting) -> dict[str, Any]:
    """The call's arguments."""
    known = facts(family, class_name)
    kwargs = {**known.kwargs, "num_inference_steps": STEPS, "output_type": "latent" if known.gives_latents else "np"}
    kwargs.update(of_samples(known, setting.samples))
    kwargs.update(dict(setting.changes))
    seeds = [torch.Generator().manual_seed(100 + i) for i in setting.samples]
    kwargs["generator"] = seeds if len(seeds) > 1 else seeds[0]
    if setting.ip_adapter:
        kwargs["ip_adapter_image_embeds"] = [torch.randn(len(family.guidance.order), 1, EMBED, generator=torch.Generator().manual_seed(9))]
    if setting.cut is not None:
        kwargs["callback_on_step_end"] = cutter(family, setting.cut)
        kwargs["callback_on_step_end_tensor_inputs"] = [name for name in known.callback_inputs if name in BATCHED_INPUTS]
    return kwargs


EMBEDS = ("image_embeds", "negative_image_embeds", "hint")
"""Arguments [samples, ...] that say what to make (Kandinsky)."""


def of_samples(known: Facts, samples: tuple[int, ...]) -> dict[str, Any]:
    """Conditions of the samples: a prompt, a class or a picture each."""
    kwargs = known.kwargs

    def each(values: tuple[Any, ...]) -> Any:
        chosen = [values[i % len(values)] for i in samples]
        return chosen if len(chosen) > 1 else chosen[0]

    embeds = {name: torch.cat([kwargs[name] * (-1) ** i for i in samples]) for name in EMBEDS if name in kwargs}
    if "prompt" in kwargs:
        negative = {"negative_prompt": each(NEGATIVES)} if "negative_prompt" in kwargs else {}
        return {"prompt": each(PROMPTS), **negative, **embeds}
    batch = {"batch_size": len(samples)} if "batch_size" in known.arguments else {}
    if "class_labels" in kwargs:
        return {"class_labels": [(207, 3)[i % 2] for i in samples], **batch}
    if embeds:
        return embeds
    if "image" in kwargs:
        return {"image": each((kwargs["image"], kwargs["image"].rotate(180)))}
    return batch


def cutter(family: Family, last: int) -> Callable[..., dict[str, Any]]:
    """Cuts guidance off after step ``last``, as diffusers' ``SDCFGCutoffCallback`` does."""

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            pipe._guidance_scale = 0.0
            if family.guidance.layout == "batched":
                order = family.guidance.order
                return {name: value.chunk(len(order))[order.index("cond")] for name, value in tensors.items()}
        return tensors

    return cut


@threads(1)  # other numbers of threads round otherwise, and what is kept of a run made at collection is compared with later ones
def call(pipe: Any, family: Family, class_name: str, setting: Setting, **extra: Any) -> Tensor:
    """One ``pipe(...)`` call; its first output as a tensor."""
    if not hasattr(pipe, "_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    with quiet():
        output = calling(pipe)(**arguments(family, class_name, setting), **extra)
        output = pictures_in(output) if isinstance(output, PipelineState) else output[0]
    if isinstance(output, Tensor):
        result = output.detach().clone()
    else:
        result = torch.as_tensor(np.asarray(output)).clone()
    assert torch.isfinite(result).all(), "the output has NaN or infinite values"
    return result


@functools.cache
def partner(family: Family, class_name: str) -> Any:
    """The same second pipeline for all cases."""
    return new_partner(family, class_name)


def new_partner(family: Family, class_name: str) -> Any:
    """A second tiny pipeline of the same latent space and text encoders, whose denoisers have other weights."""
    first, second = tiny(family, class_name).pipe, tiny(family, class_name, seed=1).pipe
    for name, part in first.components.items():
        if name not in family.denoisers and name != "controlnet":
            setattr(second, name, part)
    return second


@functools.cache
def stranger(families: tuple[str, ...]) -> Any:
    """A tiny pipeline of the first of these families that has one whose latents become pixels; the same for all cases."""
    for family in registry.families().values():
        if family.tiny is not None and family.is_among(families):
            pipe = tiny(family, family.pipelines[0], seed=1).pipe
            with contextlib.suppress(Unsupported):
                ensure_decodes(pipe, family, float32=True)
                return pipe
    raise AssertionError(f"none of the families {', '.join(families)} has a tiny pipeline whose latents become pixels")


@functools.cache
def adapter(family: Family, class_name: str) -> Any:
    """A LoRA file with random weights, as ``pipe.save_lora_weights`` writes it; where there are two denoisers, one for each, by its
    attribute. The same for all cases.

    Raises:
        Unsupported: a pipeline of this class loads none.
    """
    pipe = tiny(family, class_name).pipe
    if not hasattr(pipe, "save_lora_weights"):
        raise Unsupported(f"{class_name} loads no LoRA: a plugin with Need('adapter') does not claim the family {family.name!r}")
    add_lora(pipe, family, seed=8)
    from peft.utils import get_peft_model_state_dict

    files = {}
    for name in family.denoisers:
        if (model := getattr(pipe, name, None)) is not None:
            files[name] = Path(folder().name) / f"{class_name}-{name}.safetensors"
            layers = {f"{name.removesuffix('_2')}_lora_layers": get_peft_model_state_dict(model)}
            type(pipe).save_lora_weights(files[name].parent, **layers, weight_name=files[name].name)
    return files if len(files) > 1 else next(iter(files.values()))


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where files for plugins lie until the process ends."""
    return tempfile.TemporaryDirectory(prefix="diffgraft-")


def has_plugin(pipe: Any, plugin: type[Plugin]) -> bool:
    """Whether ``plugin`` is on ``pipe`` and enabled."""
    stack = stack_of(pipe)
    return stack is not None and plugin.name in stack and type(stack[plugin.name]) is plugin


MADE_BY = {"artefact": "calibration", "search": "search", "fit": "fitting"}
"""Kinds of needs that are made for a test -> what the plugin declares for it."""
_artefacts: dict[tuple[Any, ...], Artefact] = {}


def artefacts(plugin: type[Plugin], family: Family, class_name: str, setting: Setting) -> dict[str, Any]:
    """The artefacts that the plugin needs under ``setting``, by knob."""
    found = {need.knob: measured(family, class_name, setting) for need in plugin.needs if need.kind == "problem"}
    needs = [need for need in plugin.needs if getattr(plugin, MADE_BY.get(need.kind, ""), None) is not None]
    if not needs:
        return found
    if any(need.fits for need in needs):
        made_under = replace(setting, samples=(0,), cut=None)
    else:  # it is of the model alone, so one serves every run
        made_under = Setting(processors=setting.processors, ip_adapter=setting.ip_adapter, lora=setting.lora)
    key = (plugin, family, class_name, made_under)
    if key not in _artefacts:
        _artefacts[key] = calibrated(*key)
    return found | {need.knob: _artefacts[key] for need in needs}


SIZES = frozenset({"height", "width", "num_frames"})


def measured(family: Family, class_name: str, setting: Setting) -> Problem:
    """The problem of seeing a picture of the pipeline's size whose every second column is not seen; the same for all cases of a size."""
    return _measured(family, class_name, Setting(changes=tuple((name, value) for name, value in setting.changes if name in SIZES)))


@functools.cache
def _measured(family: Family, class_name: str, setting: Setting) -> Problem:
    pipe = tiny(family, class_name).pipe
    output = plain(family, class_name, setting)
    if not facts(family, class_name).gives_latents:
        pixels = output.movedim(-1, 1) * 2 - 1
    else:
        with torch.no_grad():
            pixels = to_pixels(pipe, family, output, arguments(family, class_name, setting))
    seen = torch.ones(pixels.shape[-2:])
    seen[:, ::2] = 0
    return simulated(Mask(seen), pixels.float().clamp(-1, 1))


def calibrated(plugin: type[Plugin], family: Family, class_name: str, setting: Setting, pipe: Any = None) -> Artefact:
    """What the plugin's calibrator makes of one run under ``setting``, or an example of what a search or a fit gives; on a fresh tiny
    pipeline, or on ``pipe``."""
    pipe = prepared(tiny(family, class_name).pipe, family, setting) if pipe is None else pipe
    if plugin.search is not None:
        return search_call(pipe, plugin(**plugin.active), lambda: call(pipe, family, class_name, setting))
    if plugin.fitting is not None:
        return fit_call(pipe, plugin(**plugin.active), lambda it: call(it, family, class_name, setting))
    return calibrate_call(pipe, plugin(**plugin.active), lambda: call(pipe, family, class_name, setting))


@functools.cache
def plain(family: Family, class_name: str, setting: Setting) -> Tensor:
    """The plain pipeline's output."""
    return call(prepared(tiny(family, class_name).pipe, family, setting), family, class_name, setting)


@functools.cache
def works(family: Family, class_name: str, setting: Setting) -> bool:
    """Whether the plain pipeline runs under ``setting``."""
    if setting.scheduler is not None and ("flow" if setting.scheduler.startswith("FlowMatch") else "scheduler") != family.prediction:
        return False  # a flow scheduler builds happily from a diffusion scheduler's config, but the two mean different things
    if setting.scheduler == "FlowMatchHeun" and class_name.endswith("ModularPipeline"):
        return False  # once, but not again: a guider keeps a step beyond its last one, and the next call encodes no negative prompt
    try:
        plain(family, class_name, setting)
    except Exception:  # whatever plain diffusers raises here is its way of saying that it does not do this
        return False
    return True


@dataclass
class Work:
    """What the leaf modules of the denoisers computed: calls, and elements that went in."""

    calls: int = 0
    size: int = 0


@contextlib.contextmanager
def counting(models: list[nn.Module], stop_at: int | None = None, error: BaseException | None = None) -> Iterator[Work]:
    """Count the work of the denoisers; raise ``error`` from inside at the leaf call ``stop_at``."""
    work = Work()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        work.calls += 1
        work.size += sum(x.numel() for x in args if isinstance(x, Tensor))
        if error is not None and work.calls == stop_at:
            raise error

    with on_leaves(models, lambda path, leaf: leaf.register_forward_pre_hook(before)):
        yield work


@contextlib.contextmanager
def on_leaves(models: list[nn.Module], hook: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Put a hook on each leaf module of the denoisers, by ``hook(path, leaf)``, which returns its handle."""
    named = [(f"{i}.{path}", m) for i, model in enumerate(models) for path, m in model.named_modules()]
    handles = [hook(path, leaf) for path, leaf in named if not list(leaf.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
