"""The contract suite over every installed plugin, and over a do-nothing plugin on every family (which proves the core there)."""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar

import pytest
from diffgraft import Paper, Plugin
from diffgraft.installed import registry
from diffgraft.testing import Case, contract_candidates, contract_cases
from diffgraft.testing.cover import cover
from sampling import sample_of


class Nothing(Plugin):
    """Does nothing at every hook point that all families have, on every block and layer."""

    name = "nothing"
    paper = Paper("a probe", "0000.00000", "nothing")
    families: ClassVar[tuple[str, ...]] = ("*", "consistency")
    neutral: ClassVar[dict[str, Any]] = {}

    def run(self, call, next):
        call.note("inactive: a probe that changes nothing")
        return next(call)

    def schedule(self, call, next):
        return next(call)

    def denoise(self, call, next):
        return next(call)

    def block(self, call, next):
        return next(call)

    def attention(self, call, next):
        return next(call)

    def step(self, call, next):
        return next(call)

    def modules(self, call, next):
        return next(call)

    def select_blocks(self, blocks):
        return blocks


class NothingGuided(Nothing):
    """The same with guidance."""

    name = "nothing_guided"

    def guide(self, call, next):
        return next(call)


TWO_DENOISERS = ("WanPipeline@2.2",)
LIKE_SD = ("sdxl", "sd_edit", "sdxl_edit", "animatediff", "animatediff_xl", "svd", "sd_older", "stable_unclip", "gligen", "versatile")
"""Slow U-Nets of the kind that "sd" has: the probe gets on them what depends on a family's layout."""
LAYOUT = (
    "neutral", "same_seed", "no_trace", "in_place", "exception", "steps_change", "another_size", "batch_change",
    "several_a_prompt", "guidance_off_on", "guidance_cut", "strength", "controlnet", "scheduler_replaced",
)  # fmt: skip


EVERYWHERE = ("same_seed",)
SHARE = 12


def spread(cases: list[Case]) -> list[Case]:
    """A part of what the families repeat of a probe: each check on every twelfth class, each check and each class once at least."""
    seen: dict[str, int] = {}
    classes: set[str] = set()
    kept = []
    for case in cases:
        check = case.check
        place = seen[check.name] = seen.get(check.name, len(seen)) + 1
        repeated = check.scope in ("kind", "main", "every") and check.name not in EVERYWHERE
        if (not repeated or place % SHARE == 0 or case.class_name not in classes) and case.applies:
            kept.append(case)
            classes.add(case.class_name)
    met = {case.check.name for case in kept}
    for name in (name for name in seen if name not in met):  # in order: workers must collect alike
        kept += islice((case for case in cases if case.check.name == name and case.applies), 1)
    return kept


def probe_cases(sampled: bool) -> list[Case]:
    """The core's own properties, proved once on every family by a plugin that does nothing."""
    families = registry.families()
    guided = [name for name, family in families.items() if family.guidance.layout != "none" and NothingGuided.claims(family)]
    others = [name for name in families if name not in guided]
    probes = contract_candidates(NothingGuided, guided, TWO_DENOISERS, True) + contract_candidates(Nothing, others, (), True)
    probes = [case for case in probes if case.family.name not in LIKE_SD or case.check.name in LAYOUT]
    return spread(probes) if sampled else [case for case in probes if case.applies]


def all_cases(config: pytest.Config) -> list[Case]:
    names = [name for name, info in registry.installed().items() if info.allowed and not info.broken]
    sample = sample_of(config)
    cases = probe_cases(sample.seed is not None) + sample.contract({name: contract_candidates(name) for name in names})
    return sorted(cases, key=lambda case: case.class_name)  # neighbours share baselines, and a worker gets neighbours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", all_cases(metafunc.config), ids=str)


def test_a_covering_table_keeps_every_check_and_every_family_and_moves() -> None:
    for name in ("deepcache", "time_shift"):
        everything = contract_cases(name, ["sd", "sdxl", "flux", "pixel"])
        tables = [cover(everything, seed) for seed in ("1", "2")]
        for table in tables:
            assert {case.check.name for case in table} == {case.check.name for case in everything}
            assert {case.family.name for case in table} == {case.family.name for case in everything}
            assert len(table) <= len({case.check.name for case in everything}) + len({case.family.name for case in everything})
        assert set(map(str, tables[0])) != set(map(str, tables[1]))
        assert cover(everything[::-1], "1") == tables[0], "the order of the cases does not matter"


def test_contract(case: Case, record_property: pytest.FixtureRequest) -> None:
    for remark in case.run():
        record_property("remark", remark)  # type: ignore[operator]
