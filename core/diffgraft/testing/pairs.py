"""Every pair of plugins: runs, runs with a warning, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from diffgraft.installed import registry
from diffgraft.installed.errors import ArtefactMismatch, Conflict, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.lab.machine import threads
from diffgraft.testing.case import one_of_each_kind
from diffgraft.testing.runs import artefacts
from diffgraft.testing.setting import USUAL
from diffgraft.testing.subject import Subject
from diffgraft.testing.trace import expect_same_trace, trace


@dataclass(frozen=True)
class Pair:
    """Two plugins in this order (first = outermost) on a family that both claim, or None where there is none."""

    outer: type[Plugin]
    inner: type[Plugin]
    family: Family | None

    def __str__(self) -> str:
        return f"{self.outer.name}+{self.inner.name}-{self.family.name if self.family else 'no common family'}"

    @threads(1)  # tiny tensors: more threads would wait for each other
    def run(self) -> str:
        """The verdict in words ("runs", "warns: ...", "refused: ..."); raises AssertionError when the pair does otherwise."""
        verdict = plan([Part.of(cls(**cls.active)) for cls in (self.outer, self.inner)])
        for text in (*verdict.conflicts, *verdict.warnings):
            for cls in (self.outer, self.inner):
                assert cls.name in text, f"{self}: the planner's text does not name {cls.name}: {text}"
        if self.family is None:
            return "no common family"
        subject = Subject(self.outer, self.family, self.family.pipelines[0])
        if verdict.conflicts:
            self._is_refused(subject, verdict.conflicts)
            return "refused: " + "; ".join(verdict.conflicts)
        refusal = self._runs(subject)
        if refusal:
            return f"refused: {refusal}"
        return "warns: " + "; ".join(verdict.warnings) if verdict.warnings else "runs"

    def _plugins(self, family: Family) -> list[Plugin]:
        """Both at the settings at which they show, with what they need."""
        made = []
        for cls in (self.outer, self.inner):
            subject = Subject(cls, family, family.pipelines[0])
            made.append(subject.instance(**{**cls.active, **artefacts(cls, family, subject.class_name, USUAL)}))
        return made

    def _is_refused(self, subject: Subject, reasons: Iterable[str]) -> None:
        pipe = subject.make()
        base = type(pipe)
        before = trace(pipe, base)
        try:
            load_pipeline(pipe, plugins=self._plugins(subject.family))
        except Conflict as error:
            missing = [reason for reason in reasons if reason not in str(error)]
            assert not missing, f"{self}: the refusal leaves out {missing}"
        else:
            raise AssertionError(f"{self}: the planner finds a conflict, but both were attached")
        assert type(pipe) is base, f"{self}: refused, but the class has changed"
        expect_same_trace(before, trace(pipe, base), f"{self}: after the refusal")

    def _runs(self, subject: Subject) -> str | None:
        """Run the pair: completes, same seed equal, both fire or say why not, no trace after detaching. A refusal must give a reason."""
        pipe = subject.make()
        base = type(pipe)
        subject.run(pipe)
        before = trace(pipe, base)
        refusal = None
        try:
            load_pipeline(pipe, plugins=self._plugins(subject.family))
            first = subject.run(pipe)
            report = pipe.plugins.report()
            assert report.completed, f"{self}: the report says that the run did not complete"
            for cls in (self.outer, self.inner):
                part = report.plugins[cls.name]
                assert part.fired or part.notes or cls.points() == ("modules",), f"{self}: {cls.name} did nothing and does not say why"
            subject.expect(subject.run(pipe), first, f"{self}: the second run with the same seed")
        except (Conflict, Unsupported, ArtefactMismatch) as error:
            refusal = "; ".join(str(error).split("\n  - ")[1:]) or str(error)  # of a planner's list the reasons alone
            assert len(refusal) > 20, f"{self}: refused without a reason: {refusal!r}"
        unload(pipe)
        assert type(pipe) is base, f"{self}: the class stays changed"
        expect_same_trace(before, trace(pipe, base), f"{self}: after detaching")
        subject.expect(subject.run(pipe), subject.baseline(), f"{self}: after detaching, against the baseline")
        return refusal


def pair_cases(plugins: Iterable[str | type[Plugin]] | None = None) -> list[Pair]:
    """All ordered pairs of ``plugins`` (default: all installed, unbroken and allowed ones), each on the cheapest families that both claim.

    One family of each kind: the first U-Net and the first DiT that both claim.
    """
    if plugins is None:
        plugins = [name for name, info in registry.installed().items() if info.allowed and not info.broken]
    classes = [registry.find(item) if isinstance(item, str) else item for item in plugins]
    cases: list[Pair] = []
    for outer, inner in permutations(classes, 2):
        chosen = one_of_each_kind(f for f in registry.families().values() if outer.claims(f) and inner.claims(f))
        cases += [Pair(outer, inner, family) for family in chosen] or [Pair(outer, inner, None)]
    return cases
