"""Checks and cases: a check is a small function, a case is one check on one plugin and one pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.lab.machine import threads
from diffgraft.testing.subject import Subject

Scope = Literal["plugin", "kind", "main", "every", "foreign"]
Run = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One line of the contract.

    scope  "plugin": once; "kind": on the cheapest claimed U-Net and DiT family, because the core and the plugin's code decide what happens
           there and not the family (the core's own tests put a probe on every family); "main": on the first pipeline class of every
           claimed family; "every": on all its classes (image to image, inpainting, ControlNet); "foreign": on every family that the
           plugin does not claim
    when   whether it applies; it may have to try what plain diffusers can do
    """

    name: str
    run: Run
    scope: Scope
    when: Callable[[Subject], bool]


CHECKS: list[Check] = []
"""All checks, in the order in which they are run."""


def check(scope: Scope = "main", when: Callable[[Subject], bool] = lambda subject: True, name: str | None = None) -> Callable[[Run], Run]:
    """Register a check under its function's name."""

    def register(function: Run) -> Run:
        CHECKS.append(Check(name or function.__name__, function, scope, when))
        return function

    return register


@dataclass(frozen=True)
class Case:
    """One check on one plugin and one pipeline class. ``str(case)`` is its id; ``run()`` raises AssertionError or returns remarks."""

    plugin: type[Plugin]
    family: Family
    class_name: str
    check: Check

    def __str__(self) -> str:
        where = "" if self.check.scope == "plugin" else f"-{self.class_name}"
        return f"{self.plugin.name}{where}-{self.check.name}"

    @cached_property
    def applies(self) -> bool:
        """Whether the check has something to hold here."""
        return self.check.when(Subject(self.plugin, self.family, self.class_name))

    @threads(1)  # tiny tensors: more threads would wait for each other
    def run(self) -> list[str]:
        """Remarks for the record (graphs, "refused: ..."); raises AssertionError when the plugin breaks the contract."""
        subject = Subject(self.plugin, self.family, self.class_name)
        try:
            if self.check.scope in ("kind", "main", "every"):
                subject.baseline()  # before the plugin can touch a class or a global
            self.check.run(subject)
        except Unsupported as error:
            if subject.is_main or len(str(error)) < 20:
                raise AssertionError(f"{self}: {type(error).__name__}: {error}") from error
            return [*subject.notes, f"refused: {error}"]  # image to image, inpainting...: not everything that a family covers
        except AssertionError as error:
            raise AssertionError(f"{self}: {error}") from error
        except Exception as error:  # whatever escapes from a plugin is the check's finding
            raise AssertionError(f"{self}: {type(error).__name__}: {error}") from error
        return subject.notes


def one_of_each_kind(families: Iterable[Family]) -> list[Family]:
    """The family of each kind whose tiny pipeline runs fastest."""
    fast = ("sd", "sdxl", "flux", "sd3", "pixart")
    known = sorted(families, key=lambda family: fast.index(family.name) if family.name in fast else len(fast))
    return list({family.kind: family for family in reversed(known) if family.tiny is not None}.values())


def candidates(
    plugin: type[Plugin], families: Iterable[Family], known: Iterable[Family], classes: Iterable[str] = (), thorough: bool = False
) -> list[Case]:
    """The cases that there may be: on those of ``families`` that the plugin claims; those of the ``known`` ones that it does not claim must
    be refused. ``classes`` are further pipeline classes or variants. Which of them apply is not asked, which takes minutes for all plugins.

    ``thorough``: checks of scope "kind" on every family too.
    """
    claimed = [family for family in families if family.tiny is not None and plugin.claims(family)]
    extra = list(classes)
    cases: list[Case] = []
    for one in CHECKS:
        if one.scope == "plugin":
            places = [(family, family.pipelines[0]) for family in claimed[:1]]
        elif one.scope == "kind" and not thorough:
            places = [(family, family.pipelines[0]) for family in one_of_each_kind(claimed)]
        elif one.scope == "foreign":
            places = [(family, family.pipelines[0]) for family in known if family.tiny is not None and not plugin.claims(family)]
        else:
            places = [(f, name) for f in claimed for name in (f.pipelines if one.scope == "every" else f.pipelines[:1])]
            places += [(f, name) for f in claimed for name in extra if name.partition("@")[0] in f.pipelines]
        cases += [Case(plugin, f, name, one) for f, name in places]
    return cases
