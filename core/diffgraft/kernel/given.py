"""What a plugin is given beside its knobs, and the pipeline that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from diffgraft.installed.anatomy import Target, blocks_of, denoisers_of
from diffgraft.installed.errors import ArtefactMismatch, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.installed.registry import find_need


def describe(pipe: Any, family: Family) -> Target:
    """What a plugin's ``check`` may look at."""
    denoisers = denoisers_of(pipe, family)
    return Target(pipe, family, denoisers, blocks_of(family, denoisers))


def fetch(plugin: Plugin, target: Target, known: Mapping[str, Any]) -> dict[str, Any]:
    """What ``plugin`` needs beside its knobs, by knob; checked against the pipeline that it will be put on.

    Args:
        known: what was fetched before and is still the one that the knob names.

    Raises:
        ConfigError: a name that leads nowhere.
        ArtefactMismatch, Unsupported: it does not fit this pipeline.
    """
    given: dict[str, Any] = {}
    for need in plugin.needs:
        value = known.get(need.knob, getattr(plugin.config, need.knob))
        try:
            given[need.knob] = None if value is None else find_need(need.kind, plugin.name)(plugin, need, value, target)
        except ArtefactMismatch:
            if known:  # it did fit: what the plugin says of weights that were written to since is nearer to the cause
                with suppress(ArtefactMismatch, KeyError):
                    plugin.check(target)
            raise
    return given


def ensure_family(plugin: Plugin, family: Family, pipeline: type) -> None:
    """Raises Unsupported when the plugin is not made for this class of pipelines."""
    name = pipeline.__name__
    if not family.is_among(plugin.families):
        unless_named = ", and consistency models count only where a plugin names them" if family.prediction == "consistency" else ""
        raise Unsupported(
            f"{plugin.name} does not work on {name} (family {family.name!r}, one of the {family.kind}s): "
            f"it is made for {', '.join(plugin.families)}{unless_named}"
        )
    if why := next(filter(None, (plugin.why_not_on(cls.__name__) for cls in pipeline.__mro__)), None):
        raise Unsupported(f"{plugin.name} does not work on {name}: {why}")
    if plugin.points() == ("guide",) and family.guidance.layout == "none":
        raise Unsupported(f"{plugin.name} changes guidance, but {name} runs none")
    if family.binds(type(plugin).effects.needs, type(plugin).effects.replaces):
        raise Unsupported(
            f"{plugin.name} asks a denoiser by itself, and layers of {name}'s own tell the guidance branches by their places in the "
            "pipeline's batch; use the pipeline without that guidance"
        )
    if lost := family.lost(type(plugin).effects.edits, plugin.points()):
        why = "it makes a copy of its scheduler for each frame, and those step by themselves"
        why = f"{family.companion} is denoised with the sample, and at the schedule's times" if family.companion else why
        raise Unsupported(f"{plugin.name} works on the {', '.join(lost)}, which does not reach the steps of {name}: {why}")
