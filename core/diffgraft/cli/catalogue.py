"""``diffgraft search``: which published plugins there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffgraft.cli.options import AsJson, Wide
from diffgraft.installed import registry
from diffgraft.lab.terminal import SPACIOUS, coloured, console, say

Words = Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Part of a name, paper, summary, hook point or family.")]

SHOWN = 200
"""Plugins that are printed at once."""


def search(
    words: Words = None,
    catalogue: Annotated[
        str | None,
        typer.Option(envvar="DIFFGRAFT_CATALOGUE", help="A newer plugins.json: a file or an https:// address (default: what came along)."),
    ] = None,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Find published plugins. Nothing is installed, and nothing is fetched unless --catalogue names an address."""
    from diffgraft.community.catalogue import is_known, read

    known = read(catalogue)
    found = known.search(words or [])
    here = registry.installed()
    rows = [
        {
            **plugin.model_dump(mode="json"),
            "publisher": plugin.publisher,
            "known_publisher": is_known(plugin),
            "installed": plugin.name in here and here[plugin.name].dist == plugin.dist,
        }
        for plugin in found
    ]
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    from rich.padding import Padding
    from rich.table import Table

    shown, screen = found[:SHOWN], console(wide)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "tier", "hooks", "what it does", "publisher", "get it"):
        table.add_column(column, no_wrap=column in ("name", "get it"), overflow="fold")
    for row, plugin in zip(rows, shown, strict=False):
        publisher = (plugin.publisher, "") if row["known_publisher"] else (f"{plugin.publisher} (unknown)", "yellow")
        how = ("installed", "green") if row["installed"] else (f"pip install {plugin.dist}", "")
        points = ", ".join(plugin.hook_points)
        if screen.width < SPACIOUS:  # what must be copied stays whole: one plugin in some lines, not in narrow columns
            screen.print(coloured((plugin.name, "bold"), f"  {plugin.tier}  ", how), soft_wrap=True)
            screen.print(Padding(coloured(f"{plugin.summary} ({points}; ", publisher, ")"), (0, 0, 0, 4)))
        table.add_row(plugin.name, plugin.tier, points, plugin.summary, coloured(publisher), coloured(how))
    if screen.width >= SPACIOUS:
        screen.print(table)
    if len(found) > SHOWN:
        say(f"and {len(found) - SHOWN} more: say a word of what you look for")
    if not all(row["known_publisher"] for row in rows):
        say(("unknown: nobody here has looked at that publisher's code; read it before you install it.", "yellow"))
