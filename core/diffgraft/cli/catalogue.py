"""``diffgraft search``: which published plugins there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffgraft.cli.options import AsJson, Wide
from diffgraft.kernel import registry

Words = Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Part of a name, paper, summary, hook point or family.")]


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
    from diffgraft.community.catalogue import read

    known = read(catalogue)
    found = known.search(words or [])
    here = registry.installed()
    rows = [
        {
            **plugin.model_dump(mode="json"),
            "publisher": plugin.publisher,
            "known_publisher": known.is_known(plugin),
            "installed": plugin.name in here and here[plugin.name].dist == plugin.dist,
        }
        for plugin in found
    ]
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    from rich.padding import Padding
    from rich.table import Table

    from diffgraft.lab.terminal import SPACIOUS, console, escaped

    screen = console(wide)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "tier", "hooks", "what it does", "publisher", "get it"):
        table.add_column(column, no_wrap=column in ("name", "get it"), overflow="fold")
    for row, plugin in zip(rows, found, strict=True):
        publisher = escaped(plugin.publisher) if row["known_publisher"] else f"[yellow]{escaped(plugin.publisher)} (unknown)[/]"
        how = "[green]installed[/]" if row["installed"] else escaped(f"pip install {plugin.dist}")
        if screen.width < SPACIOUS:  # what must be copied stays whole: one plugin in some lines, not in narrow columns
            screen.print(f"[bold]{plugin.name}[/]  {plugin.tier}  {how}", soft_wrap=True)
            screen.print(Padding(f"{escaped(plugin.summary)} ({', '.join(plugin.hook_points)}; {publisher})", (0, 0, 0, 4)))
        table.add_row(plugin.name, plugin.tier, ", ".join(plugin.hook_points), escaped(plugin.summary), publisher, how)
    if screen.width >= SPACIOUS:
        screen.print(table)
    if not all(row["known_publisher"] for row in rows):
        console().print("[yellow]unknown: nobody here has looked at that publisher's code; read it before you install it.[/]")
