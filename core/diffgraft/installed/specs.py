"""How people say which plugins they mean: the forms of ``plugins=`` and of ``pipe.plugins.add``, and names of attached ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.installed.plugin import Plugin

Spec = str | tuple[str, Mapping[str, Any]] | tuple[str, str] | tuple[str, str, Mapping[str, Any]] | type[Plugin] | Plugin
Specs = Spec | Iterable[Spec] | Mapping[str, Mapping[str, Any] | str | tuple[str, Mapping[str, Any]] | None]

FORMS = "a name, a stack file, a (name, {knob: value} or preset) pair, a plugin class, an instance, a list of those, or a mapping"


def as_specs(plugins: Any) -> list[Spec]:
    """The accepted forms of ``plugins=`` as one list.

    Raises:
        ConfigError: it is none of them.
    """
    if isinstance(plugins, (str, type, Plugin)) or is_pair(plugins):
        return [plugins]
    if isinstance(plugins, Mapping):
        return [(name, {} if knobs is None else knobs) for name, knobs in plugins.items()]
    if not isinstance(plugins, Iterable):
        raise ConfigError(f"plugins: {plugins!r} is not {FORMS}")
    return list(plugins)


def is_pair(spec: Any) -> TypeGuard[tuple[str, Mapping[str, Any]]]:
    return isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], Mapping)


def build_plugin(spec: Spec) -> Plugin:
    """One plugin from a name, a ``(name, knobs)`` pair, a class or an instance.

    Raises:
        ConfigError: it is none of them, or a knob is wrong.
        PluginNotFound, BrokenPlugin: see `registry.find`.
    """
    if isinstance(spec, Plugin):
        registry.check_class(type(spec), f"plugin {type(spec).__name__}")
        return spec
    if isinstance(spec, type):
        registry.check_class(spec, f"plugin {spec.__name__}")
        return spec()
    if isinstance(spec, str):
        return registry.find(spec)()
    if is_pair(spec):
        name, knobs = spec
        if unnamed := [knob for knob in knobs if not isinstance(knob, str)]:
            raise ConfigError(f"plugin {name!r}: {unnamed[0]!r} is no name of a knob: knobs are a mapping {{'knob': value}}")
        return registry.find(name)(**knobs)
    raise ConfigError(f"plugins: {spec!r} is neither a name, a (name, {{knob: value}}) pair, a plugin class nor an instance")


def names_of(plugins: Iterable[Any]) -> list[str]:
    """Names of attached plugins, from names, classes, instances, and lists of those.

    Raises:
        ConfigError: something that names no plugin.
    """
    names: list[str] = []
    for one in plugins:
        if isinstance(one, str):
            names.append(one)
        elif isinstance(one, Plugin) or (isinstance(one, type) and issubclass(one, Plugin)):
            names.append(one.name)
        elif isinstance(one, Iterable) and not isinstance(one, (bytes, type)):
            names += names_of(one)
        else:
            raise ConfigError(f"{one!r} names no plugin: give a name, a plugin class, an instance, or a list of those")
    return names
