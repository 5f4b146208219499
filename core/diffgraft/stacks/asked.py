"""What stands after ``plugins=``, as plugins: names and knobs, presets, a stack file, or what was saved with a pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.installed.specs import Specs, as_specs, build_plugin
from diffgraft.stacks.presets import preset_for
from diffgraft.stacks.reading import NAME, Stack, class_at, is_stack, read_stack

Plugins = Specs | os.PathLike[str] | Literal[True]
"""Everything that ``load_pipeline(plugins=...)`` takes."""


@dataclass(frozen=True)
class Asked:
    """Plugins that were built and not attached, and the stack file that they are from."""

    plugins: list[Plugin]
    file: Stack | None = None

    @property
    def disabled(self) -> tuple[str, ...]:
        return self.file.disabled if self.file else ()

    @property
    def enabled(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.name not in self.disabled]

    def ensure_for(self, family: Family, pipeline: str) -> None:
        """Raises Unsupported where the stack file was made for another family than that of this pipeline class."""
        if self.file is not None:
            self.file.ensure_for(family, pipeline)


def build(plugins: Any, pipeline: Any = None) -> Asked:
    """The plugins that are meant, with their knobs.

    Args:
        plugins: every form of ``plugins=``.
        pipeline: what they are for, as it was named.

    Raises:
        PluginNotFound, BrokenPlugin, ConfigError, ArtefactMismatch: what is asked for is not here, or not as it should be.
    """
    if plugins is True:
        plugins = saved_with(pipeline)
    if not is_stack(plugins):
        model = os.fspath(pipeline) if isinstance(pipeline, (str, os.PathLike)) else str(getattr(pipeline, "name_or_path", None) or "")
        specs = as_specs(plugins)
        if files := [spec for spec in specs if is_stack(spec)]:
            raise ConfigError(
                f"plugins: {files[0]} stands in a list; a stack file stands alone, and pipe.plugins.add(...) puts more inside it"
            )
        return Asked([build_plugin(with_preset(spec, model)) for spec in specs])
    file = read_stack(plugins)
    if isinstance(pipeline, (str, os.PathLike)) and (found := registry.family_of(class_at(registry.resolve(pipeline)))):
        file.ensure_for(*found)  # before any weight is read
    named = file.specs()
    try:
        return Asked([build_plugin(spec) for spec in named], file)
    except ConfigError as error:
        raise ConfigError(f"{file.source}: {error}") from None


def build_for(pipe: Any, family: Family, plugins: Iterable[Any]) -> tuple[list[Plugin], list[str]]:
    """(the plugins that several forms of ``plugins=`` mean for a live pipeline, the names of those that are switched off)."""
    asked = [build(each, pipe) for each in plugins]
    for each in asked:
        each.ensure_for(family, type(pipe).__name__)
    return [plugin for each in asked for plugin in each.plugins], [name for each in asked for name in each.disabled]


def saved_with(pipeline: Any) -> str | Path:
    """The stack file that ``save_pretrained(..., plugins=True)`` wrote beside a pipeline's index."""
    if not isinstance(pipeline, (str, os.PathLike)):
        raise ConfigError("plugins=True puts on what was saved in a pipeline's folder; a live pipeline has none: name the stack file")
    folder = registry.resolve(pipeline)
    if not os.path.isdir(folder):
        return os.fspath(folder)
    path = Path(folder) / NAME
    if not path.is_file():
        raise ConfigError(f"plugins=True: no stack was saved with {os.fspath(pipeline)!r}: there is no {NAME} in its folder")
    return path


def with_preset(spec: Any, model: str) -> Any:
    """A spec in which the name of a preset has become its knobs; ``(name, preset, knobs)``, in a mapping ``name: (preset, knobs)``, adds
    knobs to them, which win."""
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], tuple):
        spec = spec[0], *spec[1]
    if not (isinstance(spec, tuple) and len(spec) in (2, 3) and all(isinstance(part, str) for part in spec[:2])):
        return spec
    plugin, name, *more = spec
    return plugin, {**preset_for(plugin, name, model).knobs, **(more[0] if more else {})}
