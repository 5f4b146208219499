"""A checkpoint's own arguments: what a bundled pipeline is called with where nobody says otherwise.

diffusers keeps guidance, steps and frames in code, and for some pipelines (Flux, Wan) the size too, so a checkpoint cannot bring its own as
data. The loaded object therefore gets a class of its own, whose ``__call__`` fills in what is missing and whose signature says with what.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from diffgraft.installed.errors import ConfigError, nearest
from diffgraft.kernel.slots import class_for_one, reduced_as, set_class, wraps_method

_DEFAULTS = "_diffgraft_defaults"


def own_defaults(pipe: Any) -> Mapping[str, Any]:
    """The arguments that this pipeline fills in where a call is silent; empty for a pipeline that is no bundled one."""
    return getattr(type(pipe), _DEFAULTS, MappingProxyType({}))


def give_defaults(pipe: Any, defaults: Mapping[str, Any]) -> None:
    """Have every call of ``pipe`` take ``defaults`` for what it does not name; a path is that of a picture, which is read here.

    Raises:
        ConfigError: the pipeline has no such argument, or a file is no picture.
    """
    base = type(pipe)
    signature = inspect.signature(base.__call__)
    known = signature.parameters
    for name in defaults:
        if name not in known:
            raise ConfigError(f"{name} = {defaults[name]!r}: {base.__name__} takes no {name}{nearest(name, known)}")
    ready = {name: read_picture(value, f"{name} = {value}") if isinstance(value, Path) else value for name, value in defaults.items()}
    set_class(pipe, _class_with(base, signature, MappingProxyType(ready)))


def read_picture(path: Path, where: str) -> Image.Image:
    """The picture in RGB; ``where`` says in the error who named it.

    Raises:
        ConfigError: there is none.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def plain_class(cls: type) -> type:
    """The importable class below the one that carries defaults."""
    return next(each for each in cls.__mro__ if _DEFAULTS not in vars(each))


def filled(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the pipeline's own defaults for what neither ``args`` nor ``kwargs`` name: what a user gives wins, None too."""
    defaults = own_defaults(pipe)
    if not defaults:
        return dict(kwargs)
    names = [*inspect.signature(type(pipe).__call__).parameters][1:]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    missing = {name: value for name, value in defaults.items() if name not in given and given.get(f"{name}_embeds") is None}
    if (rows := rows_of(given)) is not None:  # some pipelines do not spread one text or one picture over a batch
        alone = {name: v for name, v in missing.items() if isinstance(v, Image.Image) or (name == "negative_prompt" and isinstance(v, str))}
        missing |= {name: [value] * rows for name, value in alone.items()}
    return {**missing, **kwargs}


def rows_of(given: Mapping[str, Any]) -> int | None:
    """How many prompts a call names; None for a single text."""
    prompts = given.get("prompt") if given.get("prompt") is not None else given.get("prompt_embeds")
    return None if prompts is None or isinstance(prompts, str) else len(prompts)


def _class_with(base: type, signature: inspect.Signature, defaults: Mapping[str, Any]) -> type:
    """A subclass of the pipeline's class that fills ``defaults`` in."""

    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return base.__call__(pipe, *args, **filled(pipe, args, kwargs))  # type: ignore[operator]

    def __copy__(pipe: Any) -> Any:  # noqa: N807
        new: Any = object.__new__(made)
        new.__dict__.update(pipe.__dict__)
        return new

    def __deepcopy__(pipe: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        new: Any = object.__new__(made)
        memo[id(pipe)] = new
        new.__dict__.update(copy.deepcopy(pipe.__dict__, memo))
        return new

    def __reduce_ex__(pipe: Any, protocol: Any) -> Any:  # noqa: N807
        return reduced_as(pipe, base, protocol)

    call: Any = wraps_method(base, "__call__", __call__)
    parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=parameters)
    body = {
        "__call__": call,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        _DEFAULTS: defaults,
    }
    made = class_for_one(base, body)
    return made
