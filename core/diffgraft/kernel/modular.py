"""Modular pipelines (``diffusers.ModularPipeline``), called as standard ones are: what their blocks take are the call's arguments, and so
is the scale of their guider (``guidance_scale``; ``guidance_scale_2`` of ``guider_2``), of which the blocks are shown one of that scale."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter, Signature
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance

from diffgraft.installed.errors import PipelineNotFound, Unsupported
from diffgraft.installed.family import Family, Guidance
from diffgraft.installed.registry import find_family
from diffgraft.kernel.slots import opened, shown_on

PIPELINES = (DiffusionPipeline, ModularPipeline)
TWO = ["pred_cond", "pred_uncond"]


def family_of(pipe: Any) -> Family:
    """The family of a live pipeline; a modular one's guidance is that of its guider. Raises Unsupported as those do that it asks."""
    family = find_family(type(pipe))
    if not isinstance(pipe, ModularPipeline):
        return family
    second = "guidance_scale_2" if "guidance_scale_2" in (scales := guiders_of(pipe)) else None
    guidance = Guidance("sequential", ("cond", "uncond"), second_scale=second) if scales else Guidance("none")
    return replace(family, guidance=guidance)


def guiders_of(pipe: Any) -> dict[str, str]:
    """What a call names the scale of each guider -> the component; nothing of a standard pipeline. Raises Unsupported where a guider does
    not go by one scale from the unconditional prediction to the conditional one."""
    parts = pipe.components if isinstance(pipe, ModularPipeline) else {}
    guiders: dict[str, Any] = {name: part for name, part in parts.items() if isinstance(part, BaseGuidance)}
    for name, guider in guiders.items():
        plain = guider._input_predictions == TWO and type(guider).prepare_models is BaseGuidance.prepare_models  # no hooks on the denoiser
        if not plain or not hasattr(guider, "guidance_scale") or getattr(guider, "use_original_formulation", False):
            raise Unsupported(
                f"{type(pipe).__name__} guides by a {type(guider).__name__}, which asks for more than a conditional and an unconditional "
                "prediction, or does not go by one scale from this to that (use_original_formulation: add 1 to its scale instead): give it "
                f"another {name}; the plugin diffusers_guider brings such guiders"
            )
    return {name.replace("guider", "guidance_scale"): name for name in guiders}


def signature_of(pipe: Any) -> Signature:
    """What a call of this pipeline takes, ``self`` first."""
    if not isinstance(pipe, ModularPipeline):
        return inspect.signature(type(pipe).__call__)
    guiders = {scale: getattr(pipe, name) for scale, name in guiders_of(pipe).items()}
    takes = {each.name: each.default for each in pipe._blocks.inputs if each.name}
    takes |= {scale: guider.guidance_scale if guider._enabled else 1.0 for scale, guider in guiders.items()}
    own = inspect.signature(ModularPipeline.__call__)
    *first, rest = own.parameters.values()
    return own.replace(parameters=[*first, *(Parameter(key, Parameter.KEYWORD_ONLY, default=it) for key, it in takes.items()), rest])


def arguments_of(pipe: Any, signature: Signature, call: Any) -> dict[str, Any]:
    """What a run goes by, by name: what its call says, what the state that a modular one is given says, defaults. Raises Unsupported where
    a plugin gives a modular pipeline what its blocks would leave unread."""
    bound = signature.bind_partial(pipe, *call.args, **call.kwargs)
    given = dict(bound.arguments)
    if isinstance(pipe, ModularPipeline):
        if unread := sorted(given.get("kwargs", {}).keys() - call.said):
            raise Unsupported(f"a plugin asks {type(pipe).__name__} for {', '.join(unread)}, and none of its blocks takes that")
        given = getattr(given.get("state"), "values", {}) | given
    bound.apply_defaults()
    return bound.arguments | given


def call_plain(cls: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.__call__``; that of a modular pipeline takes the scales of its guiders too."""
    shown = []
    for scale, name in guiders_of(pipe).items():
        guider = getattr(pipe, name)
        if scale in kwargs and ((value := kwargs.pop(scale)) != guider.guidance_scale or not guider._enabled):
            shown.append(shown_on(pipe, name, guider.new(guidance_scale=value, enabled=True)))
    with opened(shown):
        return cls.__call__(pipe, *args, **kwargs)


def read_modular(folder: Any, how: Mapping[str, Any]) -> Any:
    """What a modular pipeline's ``save_pretrained`` wrote. Raises PipelineNotFound where parts cannot be read."""
    pipe = ModularPipeline.from_pretrained(folder)
    models = [name for name, spec in pipe._component_specs.items() if hasattr(spec.type_hint, "forward")]
    pipe.load_components(**{"use_safetensors": dict.fromkeys(models, True), **how})
    if missing := [name for name in pipe.null_component_names if pipe._component_specs[name].pretrained_model_name_or_path]:
        raise PipelineNotFound(f"{folder!r} cannot be loaded: its {', '.join(missing)} cannot be read (diffusers' log says why)")
    return pipe
