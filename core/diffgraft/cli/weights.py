"""``diffgraft weights check``: whether a published file is what a plugin reads."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from diffgraft.cli.mistakes import Command
from diffgraft.cli.options import Wide, plugin_names
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import console, say

weights = typer.Typer(no_args_is_help=True, help="Weights that somebody else published, for plugins that read such files.")


@weights.callback()
def group() -> None:
    """Weights that somebody else published, for plugins that read such files."""


@weights.command("check", cls=Command)
def check_weights(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A plugin that reads published weights.", autocompletion=plugin_names)],
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="A file, or 'owner/name/file' on the Hub; several that belong together.")
    ],
    knob: Annotated[str | None, typer.Option("--knob", help="Which of the plugin's files it is, where it reads more than one.")] = None,
    wide: Wide = False,
) -> None:
    """Say whether a published file is what a plugin reads, without loading its numbers.

    Everything that is missing, unexpected, or of a wrong shape is listed at once (exit code 2).
    """
    plugin = registry.find(name)
    needs = {need.knob: need for need in plugin.needs if need.kind == "weights"}
    if not needs:
        raise ConfigError(f"plugin {name!r} reads no published weights; `diffgraft show {name}` tells what it takes")
    if knob not in needs and (knob is not None or len(needs) > 1):
        raise ConfigError(f"--knob {knob or '(not given)'}: {name} reads {', '.join(needs)}")
    from rich.table import Table

    from diffgraft.methods.needs import layout_of
    from diffgraft.methods.published import compare, in_words

    knob = knob or next(iter(needs))
    layout, source = layout_of(plugin, needs[knob]), files if len(files) > 1 else files[0]
    comparison, found = compare(layout, source, name, knob)
    comparison.ensure(name, in_words(knob, source))
    specs = {key: spec for file in found for key, spec in file.specs.items()}
    groups: dict[tuple[str, str, str], int] = {}
    for key, own in comparison.used.items():
        row = re.sub(r"(?<![^.])\d+(?![^.])", "*", key), str(specs[own]), specs[own].dtype
        groups[row] = groups.get(row, 0) + 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("keys", "shape", "dtype", "number"):
        table.add_column(column, justify="right" if column == "number" else "left", overflow="fold")
    for row, number in groups.items():
        table.add_row(*row, str(number))
    console(wide).print(table)
    sizes = ", ".join(f"{letter} = {size}" for letter, size in comparison.sizes.items())
    say((f"{len(comparison.used)} of {comparison.found} keys fit {name}", "green"), f"; {sizes}" if sizes else "")
    if comparison.ignored:
        say(f"ignored: {', '.join(comparison.ignored)}")
