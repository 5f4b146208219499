"""The commands of people who write plugins: ``diffgraft new`` and ``diffgraft check``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import say
from diffgraft.methods.files import check_file, write_atomic

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="The method's short name in snake_case.")]
Hook = Annotated[str | None, typer.Option("--hook", help="Where the method begins: run, schedule, scheduler, guide, denoise, block...")]
Arxiv = Annotated[
    str | None, typer.Option("--arxiv", metavar="NUMBER", help='The paper\'s arXiv number, like 2401.00000; "none" without one.')
]
Title = Annotated[str | None, typer.Option("--title", help="The paper's title.")]
NewOut = Annotated[Path | None, typer.Option("--out", help="Folder to write (default: diffgraft-NAME here).")]


def new(name: Name = None, hook: Hook = None, arxiv: Arxiv = None, title: Title = None, out: NewOut = None) -> None:
    """Write a plugin that installs and passes its own tests, ready for the paper's equation."""
    from diffgraft.community.new import HOOKS, Answers, check_answers, write_plugin

    missing = [what for what, given in (("NAME", name), ("--hook", hook), ("--arxiv", arxiv)) if given is None]
    if missing and not is_terminal():
        raise ConfigError(f"{', '.join(missing)}: not given, and there is no terminal to ask on; hooks: {', '.join(HOOKS)}")
    if missing or (title is None and is_terminal()):
        name = name or typer.prompt("Short name of the method (snake_case)")
        if hook is None:
            say("\n".join(f"  {one.name:<10} {one.what}" for one in HOOKS.values()))
            hook = typer.prompt("Hook point", default="denoise")
        arxiv = arxiv or typer.prompt("arXiv number of the paper (none: no number)")
        title = title or typer.prompt("Title of the paper", default=str(name).replace("_", " ").capitalize())
    answers = Answers(
        str(name), str(hook), "" if arxiv in (None, "none") else str(arxiv), title or str(name).replace("_", " ").capitalize()
    )
    check_answers(answers)
    folder = write_plugin(answers, out or Path(answers.dist))
    say(f"wrote {folder}: an identity method at the {answers.hook} hook. What next:")
    say(f'  pip install -e "{folder}[test]"')
    say(f"  pytest {folder}")
    say(f"  diffgraft check {folder}")


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


Target = Annotated[str, typer.Argument(metavar="PATH|NAME", help="A plugin's source folder, or the name of an installed plugin.")]
Fix = Annotated[bool, typer.Option("--fix", help="Repair first what can be repaired mechanically.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Contract = Annotated[bool, typer.Option("--contract/--no-contract", help="Run the contract suite (minutes).")]
Behaviour = Annotated[bool, typer.Option("--behaviour/--no-behaviour", help="Run the plugin on tiny pipelines to see what it does.")]
OnFamilies = Annotated[list[str] | None, typer.Option("--family", help="Run on this family only; repeat for several.")]
BadgeFile = Annotated[Path | None, typer.Option("--badge", metavar="FILE", help="Write the tier as an SVG badge.")]


def check(
    target: Target,
    fix: Fix = False,
    as_json: AsJson = False,
    contract: Contract = True,
    behaviour: Behaviour = True,
    family: OnFamilies = None,
    badge: BadgeFile = None,
) -> None:
    """Hold a plugin against what every plugin is held to. Imports and runs its code. Exit code 1 when something is found."""
    if badge is not None:
        check_file(badge, [".svg"], "--badge")
    from diffgraft.community.check import check as examine
    from diffgraft.community.check import open_project

    fixed: list[str] = []
    if fix:
        from diffgraft.community.check.fix import fix as repair

        project = open_project(target)
        fixed = repair(project, examine(project, behaviour=False, contract=False).met)
    verdict = examine(open_project(target), behaviour, contract, family)
    if badge is not None:
        from diffgraft.community.badge import badge as drawn

        write_atomic(badge, drawn(verdict.tier if verdict.ok else None).encode())
        fixed.append(f"wrote {badge}")
    if as_json:
        say(json.dumps({**verdict.as_dict(), "written": fixed}, indent=2))
    else:
        tell(verdict, fixed)
    raise typer.Exit(0 if verdict.ok else 1)


def tell(verdict: Any, written: Iterable[str]) -> None:
    """The verdict for people: problems, what is allowed on purpose, what was not looked at, and what the next tier asks."""
    from diffgraft.community.check import in_words
    from diffgraft.community.quality import TIERS

    for line in written:
        say(line)
    for finding in verdict.findings:
        say((in_words(finding), "yellow" if finding.allowed else "red"))
    for finding in verdict.open:
        say(in_words(finding))
    for rule, why in verdict.skipped.items():
        say(f"not checked: {rule}: {why}")
    if not verdict.ok:
        say((f"{verdict.name}: {len(verdict.problems)} to repair", "red"), err=True)
        return
    say((f"{verdict.name}: nothing to repair; tier: {verdict.tier or 'none yet'}", "green"))
    following = TIERS[0] if verdict.tier is None else TIERS[min(TIERS.index(verdict.tier) + 1, len(TIERS) - 1)]
    if verdict.tier != TIERS[-1] and verdict.todo[following]:
        say(f"for {following}: " + ", ".join(verdict.todo[following]))
