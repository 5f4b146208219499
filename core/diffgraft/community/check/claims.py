"""The quality scale held against what was found: what is computed may not be claimed against."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffgraft.community.check.project import Project
from diffgraft.community.check.rule import Problem
from diffgraft.community.quality import BY_NAME, FILE, SCALE, Card, Claim, Criterion, Quality, as_toml, parse
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError

FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:/\d+|e-?\d+)?")
"""A number as it stands in a text: 2.49, 45/72, 6.0e-6."""


def quality_of(project: Project) -> Quality:
    """What the plugin claims; nothing where there is no file.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = project.package / FILE
    return parse(path.read_text(encoding="utf-8"), project.where(path)) if path.is_file() else Quality({})


def two_families(project: Project) -> bool:
    """Whether the plugin claims two families or more that are known here."""
    return sum(project.cls.claims(family) for family in registry.families().values()) >= 2


def claim_problems(project: Project, found: Mapping[str, list[str]], unknown: frozenset[str]) -> Iterator[Problem]:
    """What ``quality.toml`` says and cannot be held.

    Args:
        found: criterion -> what was found against it.
        unknown: criteria that this check did not look at (no contract was run, no source folder is there).
    """
    file = project.where(project.package / FILE)
    try:
        quality = quality_of(project)
    except ConfigError as error:
        yield Problem(str(error), "correct the row; `diffgraft check --fix` writes the rows that are missing", file)
        return
    missing = [criterion.name for criterion in SCALE if criterion.name not in quality.claims]
    if missing:
        yield Problem(f"says nothing of {', '.join(missing)}", "done, todo, or exempt with the reason (--fix writes them as todo)", file, 1)
    yield from card_problems(project, quality.card, file)
    for name, claim in quality.claims.items():
        criterion, line = BY_NAME[name], project.line_of(file, rf"^{name}\s*=")
        if claim.status != "done":
            continue
        if criterion.computed:
            if name not in unknown and (against := found.get(name)):
                yield Problem(f"claims {name} = 'done', but: {against[0]}", f"repair that, or say {name} = 'todo'", file, line)
        elif name not in unknown:
            yield from evidence_problems(project, criterion, claim.evidence, file, line)


def card_problems(project: Project, card: Card | None, file: str) -> Iterator[Problem]:
    """Whether every figure of the card stands where it says."""
    if card is None or not card.gain or project.root is None:
        return
    line = project.line_of(file, r"^gain_where\s*=")
    if not is_there(project.root, card.gain_where, "file"):
        yield Problem(f"[card] gain_where = {card.gain_where!r} is not there", "name what is, as 'README.md#Measured here'", file, line)
        return
    name, _, part = card.gain_where.partition("#")
    text = (project.root / name).read_text(encoding="utf-8")
    told = re.split(r"^## ", text[text.index(part) :], maxsplit=1, flags=re.MULTILINE)[0]  # to the end of that section
    missing = [figure for figure in FIGURE.findall(card.gain) if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d]|\.\d)", told)]
    if missing:
        reason = f"[card] gain: {', '.join(missing)} {'stands' if len(missing) == 1 else 'stand'} nowhere in {card.gain_where}"
        yield Problem(reason, "quote the figures as they stand there", file, line)


def evidence_problems(project: Project, criterion: Criterion, evidence: tuple[str, ...], file: str, line: int) -> Iterator[Problem]:
    """Whether what is named as evidence is there: a test function, or a file (``#`` and a part of its text may follow)."""
    kind = {"test": "tests/test_x.py::test_name", "file": "README.md#heading"}[criterion.evidence]
    if not evidence:
        yield Problem(
            f"claims {criterion.name} = 'done' without evidence",
            f'{criterion.name} = {{ status = "done", evidence = ["{kind}"] }}',
            file,
            line,
        )
    for item in evidence:
        if project.root is not None and not is_there(project.root, item, criterion.evidence):
            yield Problem(f"{criterion.name}: the evidence {item!r} is not there", f"name what is, as {kind!r}", file, line)


def is_there(root: Path, item: str, kind: str) -> bool:
    """Whether a piece of evidence exists below (or, in a repository of several plugins, beside) the source folder."""
    name, _, part = item.partition("::" if kind == "test" else "#")
    path = root / name
    if not path.is_file():
        return False
    if kind == "file":
        return part in path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
    return any(node.name == part and part.startswith("test") for node in functions)


def with_missing_rows(project: Project, computed: Mapping[str, bool]) -> str:
    """The text of ``quality.toml`` with every row: claims as they are, what is missing as found (or todo)."""
    quality = quality_of(project)
    claims = dict(quality.claims)
    for criterion in SCALE:
        if criterion.name not in claims:
            claims[criterion.name] = Claim("done" if computed.get(criterion.name) else "todo")
    return as_toml(Quality(claims, quality.card))
