"""The pages that nobody writes by hand, into docs/generated/: the catalogue, the gallery, a page for each plugin and each measurement from
the READMEs that lie beside them, the helpers for methods, the command line."""

from __future__ import annotations

import ast
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffgraft.methods
import diffusers
from diffgraft.community import tables
from diffgraft.community.check import open_project
from diffgraft.installed import registry
from diffgraft.installed.errors import BrokenPlugin
from diffgraft_pipelines.families.refused import REFUSED

ROOT = Path(__file__).resolve().parent.parent
MEASURED = {
    "examples/benchmarks/README.md": "measured/benchmarks.md",
    "examples/benchmarks/speed.md": "measured/speed.md",
    "examples/benchmarks/restore.md": "measured/restore.md",
    "examples/benchmarks/restore-emoji-sd.md": "measured/restore-emoji-sd.md",
    "examples/benchmarks/restore-emoji-wan.md": "measured/restore-emoji-wan.md",
    "examples/benchmarks/quantise.md": "measured/quantise.md",
    "examples/stacks/README.md": "measured/stacks.md",
    "examples/pairs.md": "measured/pairs.md",
    "examples/matrix.md": "measured/matrix.md",
}
"""What was measured, beside the scripts that did it -> its page."""


def write_all(folder: Path) -> None:
    """Write every generated page; pages that are as they should be are left alone, so that a second build is quick."""
    plugins = installed_plugins()
    files: dict[str, bytes] = {}
    readmes = {f"plugins/{about['name']}/README.md": f"plugins/{about['name']}.md" for about in plugins}
    known = {**MEASURED, **readmes, **{f"docs/{path.relative_to(ROOT / 'docs')}": "" for path in (ROOT / "docs").rglob("*.md")}}
    pages = {"catalogue.md": catalogue(plugins), "command-line.md": command_line(), **methods()}
    for about in plugins:
        page = f"plugins/{about['name']}.md"
        project = open_project(about["name"])
        home = project.root or project.package.parent
        pages[page] = plugin_page(about, placed(project.readme, home, page, known, files))
    pages["gallery.md"] = gallery(plugins, pages)
    pages["pipelines.md"] = pipelines()
    for source, page in MEASURED.items():
        pages[page] = placed((ROOT / source).read_text(), (ROOT / source).parent, page, known, files)
    files |= {name: text.encode() for name, text in pages.items()}
    for path in folder.rglob("*.*"):
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?P<target>(?!https?:|#)[^)#]+)(?P<anchor>#[^)]*)?\)")


def placed(text: str, home: Path, page: str, known: dict[str, str], files: dict[str, bytes]) -> str:
    """A text of the repository as it stands on another page: pictures come along (into ``files``), links lead to the pages made from what
    they name, and what has no page is named by its path."""

    def moved(link: re.Match[str]) -> str:
        target = (home / link["target"]).resolve()
        if link["picture"]:
            name = f"{page.removesuffix('.md')}/{target.name}"
            files[name] = target.read_bytes()
            return f"![{link['words']}]({posixpath.relpath(name, posixpath.dirname(page))})"
        path = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else link["target"]
        if path not in known:
            return f"{link['words']} (`{path}`)" if link["words"].strip("`") != path else f"`{path}`"
        to = f"docs/generated/{known[path]}" if known[path] else path
        return f"[{link['words']}]({posixpath.relpath(to, posixpath.dirname(f'docs/generated/{page}'))}{link['anchor'] or ''})"

    return LINK.sub(moved, text)


def led(text: str, home: Path, known: dict[str, str]) -> str:
    """A page of the documentation, whose links lead to what lies in the repository (where it is read too), with those to sources of
    generated pages led to the pages."""

    def moved(link: re.Match[str]) -> str:
        target = (home / link["target"]).resolve()
        path = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if link["picture"] or path not in known:
            return link[0]
        to = os.path.relpath(ROOT / "docs" / "generated" / known[path], home)
        return f"[{link['words']}]({Path(to).as_posix()})"

    return LINK.sub(moved, text)


def sources() -> dict[str, str]:
    """What of the repository has a generated page -> the page, from docs/generated."""
    folder = ROOT / "core" / "diffgraft" / "methods"
    return {
        **MEASURED,
        **{f"plugins/{name}/README.md": f"plugins/{name}.md" for name in registry.installed()},
        **{path.relative_to(ROOT).as_posix(): f"methods/{path.stem}.md" for path in folder.glob("[!_]*.py")},
        "core/diffgraft/methods": "methods/index.md",
        "core/diffgraft/cli/__init__.py": "command-line.md",
        "pipelines/families/README.md": "pipelines.md",
        "README.md": "catalogue.md",
    }


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
    """All plugins on one page: for whom knows what for, and for who knows the name."""
    classes = [registry.find(about["name"]) for about in plugins]
    lines = [
        "# Plugin catalogue",
        "",
        "What is installed where this documentation was built. Every plugin has a page: how to call it, what it does, its knobs, its "
        "limits, and what was measured. `diffgraft list` shows yours, `diffgraft show NAME` a plugin's knobs and facts.",
        "",
        "## By goal",
        "",
        "x: times as fast as the plain pipeline with the same number of steps. dB: PSNR to its pictures, higher is nearer. "
        "A page's section *Measured here* has the figures with the commands that make them, and with what else takes the same time.",
        "",
        tables.goal_tables(classes, lambda name: f"plugins/{name}.md", lambda name, card: f"plugins/{name}.md"),
        "## By name",
        "",
        "What each plugin declares. The words in the last column are those by which [clashes are found](../concepts/declarations.md); the "
        "[tier](../glossary.md) says how much of the quality scale it meets.",
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


def gallery(plugins: list[dict[str, Any]], pages: dict[str, str]) -> str:
    """The pictures of all plugins' pages, on one."""
    lines = [
        "# Gallery",
        "",
        "The pictures of the plugins' pages, where the commands stand that made them and what was measured. All are of the small "
        "checkpoints that ship, so that you can make them on a laptop.",
    ]
    for about in plugins:
        page = f"plugins/{about['name']}.md"
        shown = [link for link in LINK.finditer(pages[page]) if link["picture"]]
        if shown:
            does = about["paper"]["implemented"]
            lines += ["", f"## [{about['name']}]({page})", "", f"{does[0].upper()}{does[1:]}."]
        for link in shown:
            lines += ["", f"![{link['words']}](plugins/{link['target']})", "", f"*{link['words']}*"]
    return "\n".join([*lines, ""])


def pipelines() -> str:
    """Every pipeline class of diffusers: its family, why it has none, or that nobody has looked at it."""
    of_family = {name: family.name for family in registry.families().values() for name in family.pipelines}
    classes = sorted(name for name in diffusers._import_structure["pipelines"] if name.endswith("Pipeline"))
    missing = [name for name in classes if name not in of_family and name not in REFUSED]
    known = [name for name in classes if name in of_family]
    return "\n".join(
        [
            "# Pipelines of diffusers",
            "",
            f"diffusers {diffusers.__version__} has {len(classes)} pipeline classes. {len(known)} have a family, every fact of which is "
            f"held against what a tiny pipeline of the class does; {len(missing)} were not looked at. A class that is missing is "
            "[a record of data](../howto/family.md), and `python -m diffgraft_pipelines.observe` writes its first draft.",
            "",
            "| class | family |",
            "|---|---|",
            *(f"| `{name}` | {of_family[name]} |" for name in known),
            "",
            "## Looked at, without a family",
            "",
            "| class | why |",
            "|---|---|",
            *(f"| `{name}` | {REFUSED[name]} |" for name in classes if name in REFUSED),
            "",
            "## Not looked at",
            "",
            ", ".join(f"`{name}`" for name in missing),
            "",
        ]
    )


def plugin_page(about: dict[str, Any], readme: str) -> str:
    """One plugin: its README, with what it declares before the first section."""
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
    before, heading, after = readme.partition("\n## ")
    lines = [before.rstrip(), "", "## At a glance", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {cell(value)} |" for key, value in facts.items() if value]
    return "\n".join([*lines, heading + after if heading else ""])


def methods() -> dict[str, str]:
    """A page for each room of `diffgraft.methods`, and the list of them."""
    folder = Path(diffgraft.methods.__path__[0])
    rooms = [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py" or path.parent != folder]
    pages, rows = {}, []
    for path in rooms:
        room = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        pages[f"methods/{room}.md"] = f"# `diffgraft.methods.{room}`\n\n```{{eval-rst}}\n.. automodule:: diffgraft.methods.{room}\n```\n"
        rows.append(f"| [`{room}`]({room}.md) | {cell(first)} |")
    listed = [Path(page).stem for page in pages]
    pages["methods/index.md"] = "\n".join(
        [
            "# Helpers for methods",
            "",
            "What a method may use: `from diffgraft.methods.predictions import noise_estimate`. Everything else that a plugin needs is in "
            "`diffgraft` itself.",
            "",
            "| `diffgraft.methods.` | |",
            "|---|---|",
            *rows,
            "",
            "```{toctree}",
            ":hidden:",
            "",
            *listed,
            "```",
            "",
        ]
    )
    return pages


def command_line() -> str:
    """Every command's own help text."""
    from diffgraft.cli import app
    from typer.main import get_command

    commands: Any = get_command(app)
    lines = ["# Command line", "", "What each command says with `--help`."]
    for words in [[], *([name, *within] for name, command in commands.commands.items() for within in parts_of(command))]:
        lines += ["", f"## `{' '.join(['diffgraft', *words])}`", "", "```none", help_text(words), "```"]
    return "\n".join([*lines, ""])


def parts_of(command: Any) -> list[list[str]]:
    """What stands behind the name of a command: nothing, or the names of the commands that it is a group of."""
    return [[name] for name in getattr(command, "commands", ())] or [[]]


def help_text(words: list[str]) -> str:
    """The help of one command, as a terminal of 100 columns shows it."""
    call = [sys.executable, "-c", "from diffgraft.cli import app; app(prog_name='diffgraft')", *words, "--help"]
    env = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    said = subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
