"""``diffgraft search``: which published plugins there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffgraft.kernel import registry

Words = Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Part of a name, paper, summary, hook point or family.")]


def search(
    words: Words = None,
    catalogue: Annotated[
        str | None,
        typer.Option(envvar="DIFFGRAFT_CATALOGUE", help="A newer plugins.json: a file or an https:// address (default: what came along)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    from diffgraft.lab.terminal import console, escaped

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "tier", "hooks", "what it does", "publisher", "get it"):
        table.add_column(column, overflow="fold")
    for row, plugin in zip(rows, found, strict=True):
        publisher = escaped(plugin.publisher) if row["known_publisher"] else f"[yellow]{escaped(plugin.publisher)} (unknown)[/]"
        how = "[green]installed[/]" if row["installed"] else escaped(f"pip install {plugin.dist}")
        table.add_row(plugin.name, plugin.tier, ", ".join(plugin.hook_points), escaped(plugin.summary), publisher, how)
    console().print(table)
    if not all(row["known_publisher"] for row in rows):
        console().print("[yellow]unknown: nobody here has looked at that publisher's code; read it before you install it.[/]")
