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
    """Name -> preset of each file in a folder.

    Raises:
        ConfigError: one of them is no preset.
    """
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
    """One preset for a model (a Hub id, a folder, a bundled name; "" where it has none); the logger tells what may not fit.

    Raises:
        ConfigError: the plugin has none of that name.
    """
    preset = find_preset(plugin, name)
    short = Path(model).name
    if model and not preset.is_for(model) and not preset.is_for(short):
        _log.warning("%s: the preset %s is for models called %s; its source says nothing of %s", plugin, name, preset.models, short)
    if preset.call:
        told = ", ".join(f"{key}={value!r}" for key, value in preset.call.items())
        _log.warning("%s: with the preset %s belongs a call with %s, which is yours to say", plugin, name, told)
    return preset


def find_preset(plugin: str, name: str) -> Preset:
    """One preset.

    Raises:
        ConfigError: the plugin has none of that name.
    """
    known = presets_of(plugin)
    if name not in known:
        raise ConfigError(f"plugin {plugin!r} has no preset {name!r}{choices(name, known, 'Presets')}")
    return known[name]
