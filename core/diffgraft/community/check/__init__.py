"""``diffgraft check``: what a plugin is held to, rule by rule, each finding with its place, the reason and the remedy.

    from diffgraft.community.check import check, open_project
    verdict = check(open_project("plugins/deepcache"), contract=False)
    assert verdict.ok, verdict

The static rules read the source (``packaging``, ``readme``, ``source``) and the class (``declared``, ``presets``); ``effects`` runs the
plugin on tiny pipelines between two neighbours that see what it does (``watch``) and runs the contract suite; ``claims`` holds all that
against what the plugin says of itself in ``quality.toml``.

A line that breaks a rule on purpose carries ``# check: allow RULE because REASON``, which is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from diffgraft.community.check import declared, packaging, presets, readme, source
from diffgraft.community.check.claims import claim_problems, quality_of, two_families
from diffgraft.community.check.effects import contract_problems, effects_problems, families_to_run
from diffgraft.community.check.project import Project, open_project
from diffgraft.community.check.rule import RULES, Problem, Rule, rule
from diffgraft.community.quality import SCALE, TIERS
from diffgraft.installed.errors import BrokenPlugin, ConfigError

__all__ = [
    "RULES",
    "Finding",
    "Problem",
    "Project",
    "Rule",
    "Verdict",
    "check",
    "declared",
    "open_project",
    "packaging",
    "presets",
    "readme",
    "rule",
    "source",
]


@dataclass(frozen=True)
class Finding:
    """A problem under the rule that found it. ``allowed`` is the reason given beside the line, where it is allowed on purpose."""

    rule: str
    problem: Problem
    allowed: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; the keys are stable."""
        return {"rule": self.rule, **asdict(self.problem), "allowed": self.allowed or None}


@dataclass
class Verdict:
    """What a check found.

    findings  what is wrong, and what is allowed on purpose
    open      what is still to be written; it counts only against a plugin that claims to have written it
    skipped   rule -> why it was not looked at
    met       criterion of the quality scale -> whether what was computed speaks for it (criteria that were not looked at are left out)
    tier      what the plugin claims, where nothing was found against the claim
    todo      tier -> criteria that are not claimed
    """

    name: str
    dist: str
    findings: list[Finding] = field(default_factory=list)
    open: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    met: dict[str, bool] = field(default_factory=dict)
    tier: str | None = None
    todo: dict[str, list[str]] = field(default_factory=dict)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.allowed]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; the keys are stable."""
        return {
            "name": self.name,
            "dist": self.dist,
            "ok": self.ok,
            "tier": self.tier,
            "todo": self.todo,
            "problems": [finding.as_dict() for finding in self.problems],
            "allowed": [finding.as_dict() for finding in self.findings if finding.allowed],
            "open": [finding.as_dict() for finding in self.open],
            "skipped": self.skipped,
            "met": self.met,
        }

    def __str__(self) -> str:
        return "\n".join(in_words(finding) for finding in self.problems) or f"{self.name}: nothing found"


def in_words(finding: Finding) -> str:
    """``file:line rule: reason -> remedy``."""
    problem = finding.problem
    place = f"{problem.file}:{problem.line}" if problem.line else problem.file
    return f"{place or '-'}: {finding.rule}: {problem.reason}" + (
        f"\n    allowed because {finding.allowed}" if finding.allowed else f"\n    -> {problem.remedy}"
    )


def check(project: Project, behaviour: bool = True, contract: bool = True, families: Iterable[str] | None = None) -> Verdict:
    """Hold a plugin against every rule.

    Args:
        behaviour: run it on tiny pipelines to see whether it does what it declares.
        contract: run the contract suite.
        families: names of the families to run on (default: a U-Net and a DiT for the effects, all claimed ones for the contract).

    Raises:
        ConfigError: a file of the package is no Python; a family that it does not claim.
    """
    families = None if families is None else list(families)
    verdict = Verdict(project.name, project.dist)
    against: dict[str, list[str]] = {criterion.name: [] for criterion in SCALE}
    unknown: set[str] = set()
    broken = importable(project)
    if broken:
        keep(
            verdict, against, project, "import", Problem(broken, "repair the import; nothing that needs the class was checked"), "installs"
        )
    for one in RULES:
        if one.needs == "class" and broken:
            verdict.skipped[one.name] = "the class cannot be imported"
            continue
        for problem in one.run(project):
            keep(verdict, against, project, one.name, problem, one.criterion, one.soft)
    runs: list[tuple[str, bool, Any]] = [
        ("effects", behaviour, lambda: effects_problems(project, chosen_families(project, families))),
        ("contract", contract, lambda: contract_problems(project, families)),
    ]
    for name, wanted, problems in runs:
        if broken or not wanted:
            verdict.skipped[name] = "the class cannot be imported" if broken else "it was not asked for"
            unknown.add("contract")
            continue
        for rule_name, problem in problems():
            keep(verdict, against, project, rule_name, problem, "contract")
    if not broken and not two_families(project):
        against["two_families"].append("it claims one family alone")
    if broken:
        unknown.add("two_families")
    if project.root is None:
        unknown |= {criterion.name for criterion in SCALE if criterion.evidence}
        verdict.skipped["evidence"] = "the source folder is not there: an installed wheel has no tests"
    for problem in claim_problems(project, against, frozenset(unknown)):
        keep(verdict, against, project, "quality", problem, "static")
    verdict.met = {c.name: not against[c.name] for c in SCALE if c.computed and c.name not in unknown}
    if not any(finding.rule == "quality" for finding in verdict.problems):
        quality = quality_of(project)
        verdict.tier = quality.tier
        verdict.todo = {tier: [c.name for c in SCALE if c.tier == tier and not quality.claim(c.name).met] for tier in TIERS}
    return verdict


def importable(project: Project) -> str | None:
    """Why the class cannot be had, or None."""
    try:
        _ = project.cls
    except BrokenPlugin as error:
        return str(error)
    return None


def chosen_families(project: Project, names: list[str] | None) -> list[Any]:
    chosen = families_to_run(project.cls, names)
    if not chosen:
        raise ConfigError(
            f"{project.name} claims {', '.join(project.cls.families)}; none of {', '.join(names or ['these'])} has a tiny pipeline here "
            "(`pip install diffgraft-families` brings them)"
        )
    return chosen


def keep(
    verdict: Verdict, against: dict[str, list[str]], project: Project, name: str, problem: Problem, criterion: str, soft: bool = False
) -> None:
    """Put a problem into the verdict, unless the line allows it."""
    allowed = next((item.allowed.get(problem.line) for item in project.sources if item.where == problem.file), None)
    finding = Finding(name, problem, allowed[1] if allowed and allowed[0] == name else "")
    if finding in (known := verdict.open if soft else verdict.findings):
        return
    known.append(finding)
    if not finding.allowed:
        against[criterion].append(f"{name}: {problem.reason}")
