"""The contract suite over every installed plugin, and over a do-nothing plugin on every family (which proves the core there)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from diffgraft import Paper, Plugin
from diffgraft.kernel import registry
from diffgraft.testing import Case, contract_cases


class Nothing(Plugin):
    """Does nothing at every hook point that a family without guidance has, on every block and layer."""

    name = "nothing"
    paper = Paper("a probe", "0000.00000", "nothing")
    families: ClassVar[tuple[str, ...]] = ("*",)
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
LIKE_SD = ("sdxl", "animatediff", "svd")
"""Slow U-Nets of the kind that "sd" has: the probe gets on them what depends on a family's layout."""
LAYOUT = (
    "neutral", "same_seed", "no_trace", "in_place", "exception", "steps_change", "another_size", "batch_change",
    "several_a_prompt", "guidance_off_on", "guidance_cut", "strength", "controlnet", "scheduler_replaced",
)  # fmt: skip


EVERYWHERE = ("same_seed",)
SHARE = 5


def spread(cases: list[Case], shift: int, scopes: tuple[str, ...] = ("main", "every")) -> list[Case]:
    """A fifth of what the families repeat: each check on every fifth class of a plugin, each check and each class once at least.

    Plugins and checks take different fifths, so a mistake in the core or in a family meets them all; `--thorough` runs the whole table.
    """
    seen: dict[str, int] = {}
    classes: set[str] = set()
    kept = []
    for case in cases:
        check = case.check
        place = seen[check.name] = seen.get(check.name, shift + len(seen)) + 1
        repeated = check.scope in scopes and check.name not in EVERYWHERE
        if not repeated or place % SHARE == 0 or case.class_name not in classes:
            kept.append(case)
            classes.add(case.class_name)
    lost = {case.check.name: case for case in cases} | {case.check.name: None for case in kept}
    return kept + [case for case in lost.values() if case is not None]


def all_cases(thorough: bool = False) -> list[Case]:
    names = [name for name, info in registry.installed().items() if info.allowed and not info.broken]
    of_plugin = [contract_cases(name) for name in names]
    cases = [case for shift, each in enumerate(of_plugin) for case in (each if thorough else spread(each, shift))]
    guided = [f.name for f in registry.families().values() if f.guidance.layout != "none"]
    unguided = [f.name for f in registry.families().values() if f.guidance.layout == "none"]
    probes = contract_cases(NothingGuided, guided, TWO_DENOISERS, True) + contract_cases(Nothing, unguided, (), True)
    probes = probes if thorough else spread(probes, 0, ("kind", "main", "every"))
    cases += [case for case in probes if case.family.name not in LIKE_SD or case.check.name in LAYOUT]
    return sorted(cases, key=lambda case: case.class_name)  # neighbours share baselines, and a worker gets neighbours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", all_cases(metafunc.config.getoption("--thorough")), ids=str)


def test_every_check_and_every_class_of_a_plugin_is_kept() -> None:
    for shift, name in enumerate(name for name, info in registry.installed().items() if info.allowed and not info.broken):
        everything = contract_cases(name)
        kept = spread(everything, shift)
        for key in (lambda case: case.class_name, lambda case: case.family.name):
            assert {key(case) for case in kept} == {key(case) for case in everything}
        assert {case.check.name for case in kept} == {case.check.name for case in everything}


def test_contract(case: Case, record_property: pytest.FixtureRequest) -> None:
    for remark in case.run():
        record_property("remark", remark)  # type: ignore[operator]
