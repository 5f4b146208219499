"""diffusers' guiders by name, with their options held against the class's signature before one is built."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import diffusers
from diffgraft import ConfigError, nearest
from diffusers import guiders
from diffusers.guiders import BaseGuidance
from pydantic import ConfigDict, TypeAdapter, ValidationError

LAYERS = ("skip_layer_config", "auto_guidance_config", "seg_guidance_config")
"""Attributes in which guiders keep which layers they leave out or perturb."""
PERTURBED = {"pred_cond_skip", "pred_cond_seg"}
"""Predictions of the conditional branch with layers perturbed."""
NOT_HERE = {"LTX2Guidance": "it works on clean samples of sound and picture that only the LTX-2 pipeline makes"}

NAMES = tuple(
    sorted(
        name for name, cls in vars(guiders).items() if inspect.isclass(cls) and issubclass(cls, BaseGuidance) and cls is not BaseGuidance
    )
)


def class_of(name: str) -> type[BaseGuidance]:
    """The guider class called ``name``.

    Raises:
        ValueError: diffusers has none of that name, or it cannot be used here.
    """
    if name in NOT_HERE:
        raise ValueError(f"{name} is no guider for these pipelines: {NOT_HERE[name]}")
    if name not in NAMES:
        known = [known for known in NAMES if known not in NOT_HERE]
        raise ValueError(f"diffusers {diffusers.__version__} has no guider of that name{nearest(name, known)} Guiders: {', '.join(known)}")
    return getattr(guiders, name)  # type: ignore[no-any-return]


def checked_options(cls: type[BaseGuidance], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as the class's signature types them: no "3" or True for a number, nothing infinite, no unknown name.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    parameters = inspect.signature(cls.__init__).parameters
    known = [name for name in parameters if name != "self"]
    hints = get_type_hints(cls.__init__)
    found = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{cls.__name__} has no option {name!r}{nearest(name, known)} Options: {', '.join(known)}")
        hint = hints.get(name, Any)
        hint = hint | None if parameters[name].default is None else hint
        if name.endswith("_config"):
            hint = hint | dict[str, Any] | list[dict[str, Any]]  # of all such options, whatever the signature says of each
        try:
            found[name] = TypeAdapter(hint, config=None if is_model(hint) else ConfigDict(arbitrary_types_allowed=True)).validate_python(
                value, strict=True
            )
        except ValidationError as error:
            raise ValueError(f"{name} = {value!r}: {error.errors()[0]['msg']}; {cls.__name__} takes {wording(hint)}") from None
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers_in(found[name])):
            raise ValueError(f"{name} = {value!r} is not finite")
    return found


def is_model(hint: Any) -> bool:
    """Whether pydantic keeps a config of its own for this type."""
    return inspect.isclass(hint) and hasattr(hint, "__dataclass_fields__")


def numbers_in(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def wording(hint: Any) -> str:
    """A type hint in words."""
    return getattr(hint, "__name__", str(hint)) if inspect.isclass(hint) else str(hint).replace("NoneType", "None")


def build(guider: str | BaseGuidance, options: Mapping[str, Any]) -> BaseGuidance:
    """A guider of one's own: built by name, or copied from a live one.

    diffusers 0.42.1 takes ``layers=[7, 8]`` apart into configs whose ``indices`` is a number, over which its own code then fails; here
    they are lists.

    Raises:
        ConfigError: what diffusers says against the options.
    """
    if isinstance(guider, str):
        cls = class_of(guider)
        try:
            made = cls(**checked_options(cls, options))
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"plugin 'diffusers_guider': options of {guider}: {error}") from error
    else:
        made = copy.deepcopy(guider)
    unknown = set(made._input_predictions) - PERTURBED - {"pred_cond", "pred_uncond"}
    if unknown:
        raise ConfigError(
            f"plugin 'diffusers_guider': guider = {type(made).__name__}: it asks for {', '.join(sorted(unknown))}, which no standard "
            "pipeline makes; use one that asks for pred_cond, pred_uncond, pred_cond_skip or pred_cond_seg"
        )
    if not layers_of(made) and type(made).prepare_models is not BaseGuidance.prepare_models:
        raise ConfigError(
            f"plugin 'diffusers_guider': guider = {type(made).__name__}: it changes the denoiser (prepare_models) without a config of "
            "layers that could be checked before a run; keep one as diffusers' own classes do (skip_layer_config)"
        )
    for layers in layers_of(made):
        layers.indices = [layers.indices] if isinstance(layers.indices, int) else list(layers.indices)
    return made


def layers_of(guider: BaseGuidance) -> list[Any]:
    """The configs of the layers that it perturbs; none of most guiders."""
    return [layers for name in LAYERS for layers in getattr(guider, name, None) or ()]


def perturbs(guider: BaseGuidance) -> str | None:
    """Which prediction it wants with layers perturbed: one of the conditional branch, "pred_uncond", or None."""
    extra = PERTURBED & set(guider._input_predictions)
    return next(iter(extra)) if extra else "pred_uncond" if layers_of(guider) else None


def dropout_of(guider: BaseGuidance) -> bool:
    """Whether it draws noise: layers dropped with a probability between 0 and 1."""
    return any(0 < getattr(layers, "dropout", 1.0) < 1 for layers in layers_of(guider))


def may_stop(guider: BaseGuidance) -> bool:
    """Whether there are steps in which it asks for no unconditional prediction though the call's guidance is on."""
    scale = getattr(guider, "guidance_scale", None)
    off = scale is not None and math.isclose(scale, 0.0 if getattr(guider, "use_original_formulation", False) else 1.0)
    return guider._start > 0 or guider._stop < 1 or not guider._enabled or off
