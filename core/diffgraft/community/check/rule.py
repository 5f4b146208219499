"""Rules and what they find. A rule is a small function that yields problems; each says where, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from diffgraft.community.check.project import Project

Needs = Literal["package", "folder", "class", "run"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be: ``reason`` what is wrong and why it matters, ``remedy`` what to do."""

    reason: str
    remedy: str
    file: str = ""
    line: int = 0


Run = Callable[["Project"], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    needs      "package": the text of the import package; "folder": the source folder too (not there for an installed wheel);
               "class": the plugin is imported; "run": and run on tiny pipelines
    criterion  the line of the quality scale that it belongs to
    soft       it counts only against a plugin that claims the criterion: what is still to be written is no defect
    """

    name: str
    run: Run
    needs: Needs
    criterion: str
    soft: bool = False


RULES: list[Rule] = []
"""All rules, in the order in which they are reported."""


def rule(needs: Needs, criterion: str = "static", soft: bool = False) -> Callable[[Run], Run]:
    """Register a rule under its function's name."""

    def register(function: Run) -> Run:
        RULES.append(Rule(function.__name__, function, needs, criterion, soft))
        return function

    return register
