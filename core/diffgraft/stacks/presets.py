"""Presets: settings that a plugin's own package ships for certain models, in ``presets/*.yaml`` beside its code. Reading them imports no
plugin."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, choices
from diffgraft.stacks.reading import content_of
from diffgraft.stacks.schema import PRESET, Preset, parse

_log = logging.getLogger(__name__)

FOLDER = "presets"


def folder_of(module: str) -> Path | None:
    """Where an import package keeps its presets; None where it ships none."""
    spec = importlib.util.find_spec(module.partition(".")[0])  # of a top-level package: nothing is imported
    places = [Path(place) / FOLDER for place in (spec.submodule_search_locations or () if spec else ())]
    return next((place for place in places if place.is_dir()), None)


def parsed(path: Path) -> Preset:
    """The preset in a file.

    Raises:
        ConfigError: it is none.
    """
    return parse(content_of(path), f"{FOLDER}/{path.name} of {path.parent.parent.name}", Preset, PRESET)


def read_presets(folder: Path | None) -> dict[str, Preset]:
    """Name -> preset of each file in a folder. Raises ConfigError where one is none."""
    found = sorted(folder.glob("*.yaml")) if folder else []
    return {path.stem: parsed(path) for path in found}


def presets_of(plugin: str) -> dict[str, Preset]:
    """The presets of an installed plugin, by name.

    Raises:
        PluginNotFound: there is no such plugin.
        ConfigError: a file of it is no preset.
    """
    return read_presets(folder_of(registry.named(plugin).module))


def preset_for(plugin: str, name: str, model: str) -> Preset:
    """A preset for a model (a Hub id, a folder, a name; "": unknown); the logger tells what may not fit. Raises as `find_preset`."""
    preset = find_preset(plugin, name)
    if model and not (preset.is_for(model) or preset.is_for(Path(model).name)):
        _log.warning("%s: the preset %s is for models called %s, not for %s", plugin, name, preset.models, Path(model).name)
    if preset.call:
        _log.warning("%s: with the preset %s belongs a call with %s, which is yours to say", plugin, name, preset.call)
    return preset


def find_preset(plugin: str, name: str) -> Preset:
    """One preset. Raises ConfigError where the plugin has none of that name."""
    known = presets_of(plugin)
    if name not in known:
        raise ConfigError(f"plugin {plugin!r} has no preset {name!r}{choices(name, known, 'Presets')}")
    return known[name]
