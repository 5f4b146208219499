"""``diffgraft presets``: the settings that plugins ship for certain models, and where they come from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from diffgraft.cli.options import AsJson, Wide, plugin_names
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import coloured, console, say

if TYPE_CHECKING:
    from diffgraft.stacks.schema import Preset

KINDS = {"paper": "paper", "official": "official code", "measured": "measured here"}


def presets(
    plugin: Annotated[str | None, typer.Argument(metavar="[PLUGIN]", help="A plugin (default: all).", autocompletion=plugin_names)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Those for this model only: its Hub id, folder or bundled name.")] = None,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the presets that plugins ship for certain models, each with its source. No plugin is imported.

    Use one by `plugins={"deepcache": "sdxl-fast"}`, or `--plugin deepcache:sdxl-fast`.
    """
    from diffgraft.stacks.presets import presets_of

    found, faults = [], []
    for name in [plugin] if plugin else sorted(registry.installed()):
        try:
            for title, preset in presets_of(name).items():
                if model is None or preset.is_for(model):
                    found.append((name, title, preset))
        except ConfigError as error:  # one package's fault hides no other's presets
            if plugin:
                raise
            faults.append(f"{name}: {error}")
    if as_json:
        say(json.dumps([{"plugin": name, "preset": title, **preset.model_dump(mode="json")} for name, title, preset in found], indent=2))
    else:
        show(found, wide)
        if not found:
            say("no preset" + (f" of {plugin}" if plugin else "") + (f" for {model}" if model else ""))
    for fault in faults:
        say((fault, "red"), err=True)


def show(found: list[tuple[str, str, Preset]], wide: bool) -> None:
    """A block of lines each: what is to be copied stays whole."""
    screen = console(wide)
    for plugin, title, preset in found:
        state = ("tested", "green") if preset.tested else ("untested", "yellow")
        screen.print(coloured((f"{plugin}:{title}", "bold"), "  ", state, f"  {said(preset.knobs)}"), soft_wrap=True)
        screen.print(f"    models   {preset.models}", soft_wrap=True)
        if preset.call:
            screen.print(f"    call     {said(preset.call)}", soft_wrap=True)
        screen.print(f"    source   {KINDS[preset.source.kind]}: {preset.source.where}", soft_wrap=True)
        for name, text in (("command", preset.source.command), ("note", preset.note)):
            if text:
                screen.print(f"    {name:<8} {text}", soft_wrap=True)


def said(values: dict[str, object]) -> str:
    """``interval=3, branch=0``."""
    return ", ".join(f"{name}={json.dumps(value, default=str)}" for name, value in values.items())
