"""Things that a setting may name: a callable, an entry point of a group, or "package.module:attribute"."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, choices
from diffgraft.installed.foreign import said


def find_callable(knob: str, value: Any, group: str, what: str) -> tuple[str, Callable[..., Any]]:
    """(name, callable) that a setting stands for: a callable, the name of an entry point in ``group``, or "package.module:attribute".

    Args:
        what: it is, for errors ("reward").

    Raises:
        ConfigError: it is none of them.
        PluginNotFound, BrokenPlugin: an entry point that may not be loaded, or cannot.
    """
    if callable(value):
        return getattr(value, "__name__", type(value).__name__), value
    name = str(value)
    found = registry.find_named(group, name)
    if found is None:
        module, colon, attribute = name.partition(":")
        if not colon:
            raise ConfigError(
                f"{knob} = {value!r} is no {what}{choices(name, registry.by_name(group), 'Installed')} "
                "Or give a callable or 'package.module:name'."
            )
        try:
            found = getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:  # a foreign module may raise anything on import
            raise ConfigError(f"{knob} = {value!r}: {said(error)}") from error
    if not callable(found):
        raise ConfigError(f"{knob} = {value!r}: {type(found).__name__} is not callable")
    return name, found
