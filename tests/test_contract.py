"""The contract suite over every installed plugin, and over a do-nothing plugin on every family (which proves the core there)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from diffgraft import Paper, Plugin, registry
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


def all_cases() -> list[Case]:
    names = [name for name, info in registry.installed().items() if info.allowed and not info.broken]
    cases = [case for name in names for case in contract_cases(name)]
    guided = [f.name for f in registry.families().values() if f.guidance.layout != "none"]
    unguided = [f.name for f in registry.families().values() if f.guidance.layout == "none"]
    probes = contract_cases(NothingGuided, guided, TWO_DENOISERS, True) + contract_cases(Nothing, unguided, (), True)
    cases += [case for case in probes if case.family.name not in LIKE_SD or case.check.name in LAYOUT]
    return sorted(cases, key=lambda case: case.class_name)  # neighbours share baselines, and a worker gets neighbours


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_contract(case: Case, record_property: pytest.FixtureRequest) -> None:
    for remark in case.run():
        record_property("remark", remark)  # type: ignore[operator]
