"""``diffgraft list | show | doctor``: what is here."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from diffgraft.cli.options import AsJson, Wide, plugin_names
from diffgraft.community.quality import tier_of
from diffgraft.installed import registry
from diffgraft.installed.offers import PLUGINS, offers
from diffgraft.lab.terminal import ROOMY, SPACIOUS, coloured, console, say

BRINGS = {
    "plugins": "`diffgraft search` shows which there are, `pip install diffgraft-deepcache` brings one",
    "pipelines": f"`pip install {registry.CHECKPOINTS}` brings some that run offline",
}
"""What to say where ``doctor`` finds none, which is no fault."""


def list_plugins(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table (imports the plugins).")] = False,
    wide: Wide = False,
) -> None:
    """List the installed plugins, without importing any.

    "ok" is one against which neither its metadata nor the last `diffgraft doctor`, which imports them, speaks.
    """
    if markdown:
        from diffgraft.community.tables import installed_table

        table, faults = installed_table()
        say(table.rstrip("\n"))
        for fault in faults:
            say((fault, "red"), err=True)
        return
    from diffgraft.lab.checkup import recall

    found = offers(PLUGINS)
    tried = recall(found)
    rows = []
    for info in found:
        wrong = info.broken or tried.get(str(info))
        rows.append(
            {
                "name": info.name,
                "summary": info.summary,
                "version": info.version,
                "dist": info.dist,
                "tier": tier_of(info.module),
                "allowed": info.allowed,
                "status": "broken" if wrong else "ok" if info.allowed else "not allowed",
                "reason": wrong or (None if info.allowed else f"not in {registry.ALLOW}"),
                "tried": str(info) in tried,
            }
        )
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    if not rows:
        say("no plugin is installed; `pip install diffgraft-deepcache` brings one")
        return
    from rich.table import Table

    screen = console(wide)
    columns = ["name"]
    if screen.width >= ROOMY or any(row["reason"] for row in rows):
        columns.append("status")
    columns += ["tier"] if screen.width >= ROOMY else []
    columns += ["version", "dist"] if wide or screen.width >= 150 else []
    out = Table(box=None, pad_edge=False, header_style="bold")
    room = screen.width
    for column in columns:  # what must be copied is never cut; the summary has what is left
        title = {"dist": "package"}.get(column, column)
        out.add_column(title, no_wrap=True)
        room -= max(len(title), *(len(str(row[column] or "")) for row in rows)) + 2
    out.add_column("what it does")
    colours = {"ok": "green", "broken": "red", "not allowed": "yellow"}
    for row in rows:
        cells = [coloured((str(row[c]), colours[str(row[c])])) if c == "status" else str(row[c] or "") for c in columns]
        out.add_row(*cells, str(row["summary"]) if wide else brief(str(row["summary"]), room))
    screen.print(out)
    for row in rows:
        if row["reason"] is not None:
            say((f"{row['name']}: {row['reason']}", colours[str(row["status"])]))


def brief(summary: str, room: int) -> str:
    """A summary in one line of at most ``room`` characters, without what all of them have in common."""
    text = re.sub(r" for diffgraft\b| \(arXiv [^)]*\)", "", summary)
    return textwrap.shorten(text, max(room, 8), placeholder="...")


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A plugin.", autocompletion=plugin_names)],
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show one plugin: its paper, hook points, knobs, families and effects."""
    from diffgraft.community.tables import describe, knobs

    cls = registry.find(name)
    info = registry.installed()[name]
    with registry.blamed(f"{info} does not say what it is"):  # what it declares is read here, and may be anything
        facts, rows = describe(cls, info), knobs(cls)
        lines, written = lines_of(facts), json.dumps(facts, indent=2, default=str)
    if as_json:
        say(written)
        return
    from rich.padding import Padding
    from rich.table import Table

    title = f"{name} - {facts['summary']}"
    about = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    about.add_column(style="cyan", no_wrap=True)
    about.add_column(overflow="fold")
    for key, text in lines.items():
        if text:
            about.add_row(key, text)
    screen = console(wide)
    screen.print(about)
    screen.print()
    if not rows:
        screen.print("it has no knobs")
        return
    if screen.width < SPACIOUS:
        for knob in rows:
            screen.print(coloured((knob.name, "bold"), f": {knob.allowed} (default: {knob.default})"))
            screen.print(Padding(knob.description, (0, 0, 0, 4)))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("knob", "allowed", "default", "what it is"):
        table.add_column(column, no_wrap=column == "knob", overflow="fold")
    for knob in rows:
        table.add_row(knob.name, knob.allowed, str(knob.default), knob.description)
    screen.print(table)


def lines_of(facts: dict[str, Any]) -> dict[str, str]:
    """What a plugin declares, for people: title of a line -> its text."""
    paper = facts["paper"]
    return {
        "package": f"{facts['dist']} {facts['version']}",
        "tier": facts["tier"] or "",
        "paper": f"{paper['title']}, arXiv:{paper['arxiv']}" if paper["arxiv"] else paper["title"],
        "implemented": paper["implemented"],
        "omitted": paper["omitted"],
        "licence": paper["licence"],
        "hook points": ", ".join(facts["hook_points"]),
        "effects": facts["effects"],
        "families": "all" if "*" in facts["families"] else ", ".join(facts["families"]),
        "pipelines": ", ".join(facts["pipelines"]),
        "changes nothing at": ", ".join(f"{k}={json.dumps(v, default=str)}" for k, v in facts["neutral"].items()) or "no setting",
    }


def doctor(as_json: AsJson = False) -> None:
    """Check this installation: versions, devices, and every plugin, family and bundled pipeline.

    Exit code 1 when something is broken, or missing: then it says what to install.
    """
    from diffgraft.lab.doctor import diagnose

    found = diagnose()
    if as_json:
        say(json.dumps({**asdict(found), "missing": found.missing, "ok": found.ok}, indent=2))
        raise typer.Exit(0 if found.ok else 1)
    machine = found.machine
    say("versions    " + ", ".join(f"{name} {number or 'not installed'}" for name, number in found.versions.items()))
    say(f"machine     {machine['system']}, {machine['processor']}, {machine['cpus']} CPUs, {machine['threads']} torch threads")
    say("devices     " + ", ".join(["cpu", *machine["accelerators"]]))
    say("attention   " + ", ".join(found.backends))
    allowed = "all plugins may load" if found.allowed is None else f"only {', '.join(found.allowed) or 'none'}"
    say(f"allow-list  {registry.ALLOW}: {allowed}")
    for title, checks in (("plugins", found.plugins), ("families", found.families), ("pipelines", found.pipelines)):
        for i, check in enumerate(checks):
            colour = {"ok": "green", "broken": "red"}.get(check.status, "yellow")
            say(f"{title if i == 0 else '':<12}", (f"{check.status:<12}", colour), f"{check.name}: {check.detail}")
        if not checks:
            say(f"{title:<12}none" + (f"; {BRINGS[title]}" if title in BRINGS else ""))
    if found.not_kept is not None:
        say((f"`diffgraft list` will not know of this: {found.not_kept}", "yellow"), err=True)
    if found.broken:
        say((f"broken: {', '.join(check.name for check in found.broken)}", "red"), err=True)
    for text in found.missing:
        say((text, "red"), err=True)
    if not found.ok:
        raise typer.Exit(1)
    say(("all is well", "green"), "".join(f"; incomplete: {check.name}" for check in found.families if check.status == "incomplete"))
