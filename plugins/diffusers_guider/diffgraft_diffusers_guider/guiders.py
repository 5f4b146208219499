"""diffusers' guiders by name, with their options held against the class's signature before one is built."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import diffusers
from diffgraft import ConfigError, Unsupported, nearest
from diffusers import guiders
from diffusers.guiders import BaseGuidance
from pydantic import ConfigDict, TypeAdapter, ValidationError

LAYERS = ("skip_layer_config", "auto_guidance_config", "seg_guidance_config")
"""Attributes in which guiders keep which layers they leave out or perturb."""
PERTURBED = {"pred_cond_skip", "pred_cond_seg"}
"""Predictions of the conditional branch with layers perturbed."""
NOT_HERE = {"LTX2Guidance": "it works on clean samples of sound and picture that only the LTX-2 pipeline makes"}

UNREAD = {"seg_blur_threshold_inf": "diffusers 0.42.1 reads it nowhere, the threshold of its blur is fixed at 9999.9"}
"""Options that a class takes and nobody looks at."""
MEAN_UP_TO = 9999.9
"""The sigma of SmoothedEnergyGuidance up to which diffusers 0.42.1 takes the mean of all queries: its two cases are the wrong way round."""
AXES = "adaptive_projected_guidance_norm_dim"

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
        adapter = TypeAdapter(hint, config=None if is_model(hint) else ConfigDict(arbitrary_types_allowed=True))
        said: list[str] = []
        for given in (value, *alike(value)):
            try:
                found[name] = adapter.validate_python(given, strict=True)
                break
            except ValidationError as error:
                said.append(error.errors()[0]["msg"])
        if name not in found:
            raise ValueError(f"{name} = {value!r}: {said[0]}; {cls.__name__} takes {wording(hint)}")
        if name in UNREAD:
            raise ValueError(f"{name} = {value!r}: {UNREAD[name]}; leave it out")
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers_in(found[name])):
            raise ValueError(f"{name} = {value!r} is not finite")
    return found


def alike(value: Any) -> tuple[Any, ...]:
    """The same numbers as a tuple or as a list: JSON and the command line know lists alone, and signatures name either."""
    return (tuple(value),) if isinstance(value, list) else (list(value),) if isinstance(value, tuple) else ()


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
    if getattr(made, "seg_blur_sigma", 1.0) <= 0:
        raise ConfigError(f"plugin 'diffusers_guider': options of {type(made).__name__}: seg_blur_sigma = {made.seg_blur_sigma}: above 0")
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


def ensure_axes(guider: BaseGuidance, ndim: int) -> None:
    """Raises Unsupported where norms are to be taken over axes that predictions of ``ndim`` axes have not, or over that of the samples."""
    axes = getattr(guider, AXES, None)
    if axes is None:
        return
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if not given or len({axis % ndim for axis in given}) < len(given) or not all(-ndim < axis < ndim and axis for axis in given):
        raise Unsupported(
            f"diffusers_guider: {type(guider).__name__}: {AXES} = {axes!r}: predictions here have {ndim} axes, the first that of the "
            f"samples; give one or more of 1 to {ndim - 1} (or -1 to {1 - ndim}), each once, or leave it out for all of them"
        )


def stays_zero(guider: BaseGuidance) -> bool:
    """Whether this is a step of CFG-Zero*'s zero-init: diffusers' rescaling after it would divide zero by zero."""
    return bool(guider._enabled and guider._step < getattr(guider, "zero_init_steps", 0))


def remarks(guider: BaseGuidance) -> list[str]:
    """What a user of these options ought to know of diffusers 0.42.1, for the report."""
    sigma = getattr(guider, "seg_blur_sigma", None)
    if sigma is None or sigma > MEAN_UP_TO:
        return []
    return [f"seg_blur_sigma = {sigma}: diffusers 0.42.1 blurs by the mean of all queries for every sigma up to {MEAN_UP_TO}"]


def may_stop(guider: BaseGuidance) -> bool:
    """Whether there are steps in which it asks for no unconditional prediction though the call's guidance is on."""
    scale = getattr(guider, "guidance_scale", None)
    off = scale is not None and math.isclose(scale, 0.0 if getattr(guider, "use_original_formulation", False) else 1.0)
    return guider._start > 0 or guider._stop < 1 or not guider._enabled or off
