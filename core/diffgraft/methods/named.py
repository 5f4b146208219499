"""Things that a setting may name: a callable, an entry point of a group, or "package.module:attribute"; and what plugins declare."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, DiffgraftError, Unsupported, choices
from diffgraft.installed.foreign import said
from diffgraft.installed.plugin import Plugin


def find_callable(
    knob: str, value: Any, group: str, what: str, takes: Sequence[str], words: Sequence[str] = ()
) -> tuple[str, Callable[..., Any]]:
    """(name, callable) that a setting stands for: a callable, the name of an entry point in ``group``, or "package.module:attribute".

    Args:
        what: it is, for errors ("reward").
        takes: the arguments that it will be called with.
        words: that the plugin itself reads, for errors.

    Raises:
        ConfigError: it is none of them, or its signature cannot take these arguments.
        PluginNotFound, BrokenPlugin: an entry point that may not be loaded, or cannot.
    """
    if callable(value):
        return ensure_takes(knob, getattr(value, "__name__", type(value).__name__), value, takes)
    name = str(value)
    found = registry.find_named(group, name)
    if found is None:
        module, colon, attribute = name.partition(":")
        if not colon:
            raise ConfigError(
                f"{knob} = {value!r} is no {what}{choices(name, [*words, *registry.by_name(group)], 'Known' if words else 'Installed')} "
                "Or give a callable or 'package.module:name'."
            )
        try:
            found = getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:  # a foreign module may raise anything on import
            raise ConfigError(f"{knob} = {value!r}: {said(error)}") from error
    if not callable(found):
        raise ConfigError(f"{knob} = {value!r}: {type(found).__name__} is not callable")
    return ensure_takes(knob, name, found, takes)


def ensure_takes(knob: str, name: str, function: Callable[..., Any], takes: Sequence[str]) -> tuple[str, Callable[..., Any]]:
    """(name, callable) as given; raises ConfigError where a call with these arguments would not reach the callable."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, and does not say
        return name, function
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise ConfigError(f"{knob} = {name}{signature}: it is called with ({', '.join(takes)}), and cannot be: {error}") from None
    return name, function


ABLE = {"calibration": "be calibrated", "inversion": "invert pictures", "search": "be searched for settings", "fitting": "be fitted"}
"""What a plugin class may declare -> what it then can."""


def declared(plugin: Plugin | type[Plugin], what: str) -> Any:
    """What a plugin declares under a key of :data:`ABLE`; raises Unsupported where it is None, naming the installed plugins that can."""
    if (found := getattr(plugin, what)) is not None:
        return found
    able = those(lambda cls: getattr(cls, what) is not None)
    raise Unsupported(f"{plugin.name} cannot {ABLE[what]}; installed plugins that can: {', '.join(able) or 'none'}")


def those(can: Callable[[type[Plugin]], bool]) -> list[str]:
    """The installed plugins of which something holds; what cannot be imported is left out: somebody else's fault is not told here."""
    able = []
    for name, offer in registry.installed().items():
        if offer.allowed and not offer.broken:
            with suppress(DiffgraftError):
                able += [name] if can(registry.find(name)) else []
    return able
