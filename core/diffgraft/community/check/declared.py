"""Rules on what the plugin's class declares."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffgraft.community.catalogue import ARXIV
from diffgraft.community.check.project import Project
from diffgraft.community.check.rule import Problem, rule
from diffgraft.community.check.source import classes_of
from diffgraft.community.tables import knobs
from diffgraft.installed.config import build_config
from diffgraft.installed.errors import ConfigError


def line_of_knob(project: Project, knob: str) -> tuple[str, int]:
    """Where the Config class of the plugin declares a knob."""
    for source, node in classes_of(project).values():
        if node.name == project.cls.Config.__name__:
            for item in node.body:
                if getattr(getattr(item, "target", None), "id", None) == knob:
                    return source.where, item.lineno
    return line_of_class(project)


def line_of_class(project: Project) -> tuple[str, int]:
    """Where the plugin's class begins."""
    found = classes_of(project).get(project.class_name)
    return (found[0].where, found[1].lineno) if found else ("", 0)


@rule("class")
def knobs_documented(project: Project) -> Iterator[Problem]:
    """Every knob says what it does, in what range or unit; a number without bounds names its unit or symbol."""
    for knob in knobs(project.cls):
        file, line = line_of_knob(project, knob.name)
        if len(knob.description.split()) < 3:
            yield Problem(
                f"knob {knob.name!r} is described as {knob.description!r}: a reader does not know the paper by heart",
                'description="what it does, in which unit or range; the paper\'s symbol"',
                file,
                line,
            )
        elif re.fullmatch(r"(number|integer)( or none)?", knob.allowed) and not says_range(knob.description):
            yield Problem(
                f"knob {knob.name!r} is any {knob.allowed}, and its description names no range, unit or symbol",
                "bounds (ge=, le=), or say in the description what a large and a small value do, and the paper's symbol",
                file,
                line,
            )
    if project.cls.paper.arxiv and knobs(project.cls) and not any(names_symbol(knob.description) for knob in knobs(project.cls)):
        yield Problem(
            "no knob's description names a symbol, an equation or a setting of the paper: a reader cannot hold the two against each other",
            'begin it with the symbol: description="lambda of eq. 3: ..."; where the paper has none, say "not in the paper"',
            *line_of_class(project),
        )


def says_range(text: str) -> bool:
    """Whether a description bounds a number in words: a figure, a unit, or a symbol before a colon."""
    return bool(re.search(r"\d|\bunits?\b|\bpixels?\b|\bsteps?\b|^[\w^ ]{1,12}:|\blog\b|dB|seconds?\b", text))


def names_symbol(text: str) -> bool:
    """Whether a description refers to the paper: ``x: ...``, "N of the paper", "eq. 3", "table 2", or says that it does not."""
    return bool(re.search(r"^[\w^/()~ -]{1,24}:|\b[Ee]q\.|\bpaper\b|\b[Tt]able \d|\bofficial\b|\bauthors?\b|\w of ", text))


@rule("class")
def neutral_declared(project: Project) -> Iterator[Problem]:
    """The settings that change nothing are declared and valid; the contract suite shows that they are bit-equal."""
    cls = project.cls
    file, line = line_of_class(project)
    if not cls.neutral and knobs(cls):
        yield Problem(
            "neutral is empty: nobody can switch the method off by its knobs", "neutral = {knob: value at which it is off}", file, line
        )
    for what in ("neutral", "active"):
        try:
            build_config(cls.name, cls.Config, getattr(cls, what))
        except ConfigError as error:
            yield Problem(
                f"{what} = {getattr(cls, what)!r} is refused by Config: {error}", f"name knobs and values that exist in {what}", file, line
            )


@rule("class", "installs")
def paper_told(project: Project) -> Iterator[Problem]:
    """The paper's title, its number, what is implemented and the licence note are told."""
    paper = project.cls.paper
    file, line = line_of_class(project)
    for name in ("title", "implemented", "licence"):
        if not getattr(paper, name).strip():
            yield Problem(f"paper.{name} is empty", f"Paper({name}=...)", file, line)
    if paper.arxiv and not re.fullmatch(ARXIV, paper.arxiv):
        yield Problem(
            f"paper.arxiv = {paper.arxiv!r} is no arXiv number", 'like "2312.00858"; "" for a paper that is not there', file, line
        )
