"""Things that a setting may name: a callable, an entry point of a group, or "package.module:attribute"."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffgraft.kernel.errors import ConfigError, choices


def find_callable(knob: str, value: Any, group: str, what: str) -> tuple[str, Callable[..., Any]]:
    """(name, callable) that a setting stands for: a callable, the name of an entry point in ``group``, or "package.module:attribute".

    Args:
        what: it is, for errors ("reward").

    Raises:
        ConfigError: it is none of them.
    """
    if callable(value):
        return getattr(value, "__name__", type(value).__name__), value
    registered = {entry.name: entry for entry in entry_points(group=group)}
    name = str(value)
    if name in registered:
        return name, registered[name].load()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"{knob} = {value!r} is no {what}{choices(name, sorted(registered), 'Installed')} "
            "Or give a callable or 'package.module:name'."
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{knob} = {value!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{knob} = {value!r}: {type(found).__name__} is not callable")
    return name, found
