"""The pages that nobody writes by hand: the plugin catalogue, the hook point table and the command line, into docs/generated/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffgraft.community import tables
from diffgraft.kernel import registry
from diffgraft.kernel.errors import BrokenPlugin


def write_all(folder: Path) -> None:
    """Write every generated page; pages that are as they should be are left alone, so that a second build is quick."""
    plugins = installed_plugins()
    pages = {"catalogue.md": catalogue(plugins), "command-line.md": command_line()}
    pages |= {f"plugins/{about['name']}.md": plugin_page(about) for about in plugins}
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def installed_plugins() -> list[dict[str, Any]]:
    """What each installed plugin declares, by name. One that cannot be imported is a fault of the build.

    Raises:
        BrokenPlugin: with what is wrong with it.
    """
    found = []
    for name, info in registry.installed().items():
        if info.broken:
            raise BrokenPlugin(f"{name}: {info.broken}")
        found.append(tables.describe(registry.find(name), info))
    return found


def cell(text: Any) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def paper_link(about: dict[str, Any]) -> str:
    paper = about["paper"]
    return f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" if paper["arxiv"] else ""


def catalogue(plugins: list[dict[str, Any]]) -> str:
    """All plugins on one page."""
    lines = [
        "# Plugin catalogue",
        "",
        "What is installed where this documentation was built, as each plugin declares it: `diffgraft list` shows yours. "
        "`diffgraft show NAME` says the same as a plugin's page here.",
        "",
        "| plugin | tier | what it does | works on | effects |",
        "|---|---|---|---|---|",
    ]
    for about in plugins:
        where = "all families" if "*" in about["families"] else ", ".join(about["families"])
        name = f"[`{about['name']}`](plugins/{about['name']}.md)"
        cells = [name, about["tier"] or "", about["paper"]["implemented"], where, about["effects"]]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    listed = [f"plugins/{about['name']}" for about in plugins]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *listed, "```", ""])


def plugin_page(about: dict[str, Any]) -> str:
    """One plugin."""
    paper = about["paper"]
    facts = {
        "paper": f"{paper['title']} {paper_link(about)}",
        "implemented": paper["implemented"],
        "left out": paper["omitted"],
        "install": f"`pip install {about['dist']}`, here {about['version']}",
        "tier": about["tier"],
        "hook points": ", ".join(f"[`{point}`](../../hooks/{point}.md)" for point in about["hook_points"]),
        "effects": about["effects"],
        "families": "all" if "*" in about["families"] else ", ".join(about["families"]),
        "pipelines": ", ".join(f"`{name}`" for name in about["pipelines"]),
        "off at": ", ".join(f"`{key} = {value!r}`" for key, value in about["neutral"].items()),
        "licence note": paper["licence"],
    }
    lines = [f"# `{about['name']}`", "", about["summary"], "", "| | |", "|---|---|"]
    lines += [f"| {key} | {cell(value)} |" for key, value in facts.items() if value]
    if about["knobs"]:
        lines += ["", "## Knobs", "", "| knob | allowed | default | |", "|---|---|---|---|"]
        for knob in about["knobs"]:
            lines.append(f"| `{knob['name']}` | {cell(knob['allowed'])} | `{cell(knob['default'])}` | {cell(knob['description'])} |")
    return "\n".join([*lines, ""])


def command_line() -> str:
    """Every command's own help text."""
    from diffgraft.cli import app
    from typer.main import get_command

    commands: Any = get_command(app)
    lines = ["# Command line", "", "What each command says with `--help`."]
    for name in [None, *commands.commands]:
        words = ["diffgraft", *([name] if name else [])]
        lines += ["", f"## `{' '.join(words)}`", "", "```none", help_text(name), "```"]
    return "\n".join([*lines, ""])


def help_text(command: str | None) -> str:
    """The help of one command, as a terminal of 100 columns shows it."""
    call = [sys.executable, "-c", "from diffgraft.cli import app; app(prog_name='diffgraft')", *([command] if command else []), "--help"]
    env = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    said = subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
