"""The contract suite: what every plugin is held to. Call it from the plugin's own tests.

    from diffgraft.testing import contract_cases, run_contract

    def test_contract():
        run_contract("deepcache")

    @pytest.mark.parametrize("case", contract_cases("deepcache"), ids=str)   # or one test a case
    def test_case(case):
        case.run()

A case is one check on the plugin and one pipeline class. Every claimed family's first pipeline class gets every check that applies
(what the core alone decides is checked on one U-Net and one DiT family); its other classes (image to image, inpainting, ControlNet)
those that concern them, or the plugin refuses them with a reason. Everything runs on tiny seeded random pipelines,
on the CPU, offline. A check that does not apply makes no case: what plain diffusers cannot do is not asked of a plugin.

What a plugin declares changes what is asked of it: ``effects.couples_batch`` and ``effects.stochastic`` lift "sample i alone = sample i
in a batch" (noise must still come from the call's generator: same seed, same picture); ``effects.skips`` adds "computes less"; ``active``
are the settings at which the method shows in four steps; ``neutral`` must hold alone and over ``active``; a note with the word
"inactive" in the report says why a run was left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from diffgraft.installed import registry
from diffgraft.installed.plugin import Plugin
from diffgraft.testing import basics, compiling, crafted, inside, levels, ranks, repeats, sessions, surroundings
from diffgraft.testing.case import CHECKS, Case, candidates
from diffgraft.testing.cover import cover, covering
from diffgraft.testing.forms import Cell, form_cells
from diffgraft.testing.pairs import Pair, pair_cases
from diffgraft.testing.setting import Setting
from diffgraft.testing.subject import Subject

__all__ = [
    "CHECKS",
    "Case",
    "Cell",
    "Pair",
    "Setting",
    "Subject",
    "basics",
    "compiling",
    "contract_candidates",
    "contract_cases",
    "contract_sample",
    "cover",
    "crafted",
    "form_cells",
    "inside",
    "levels",
    "pair_cases",
    "ranks",
    "repeats",
    "run_contract",
    "sessions",
    "surroundings",
]


def contract_cases(
    plugin: str | type[Plugin], families: Iterable[str] | None = None, variants: Iterable[str] = (), thorough: bool = False
) -> list[Case]:
    """All cases of one plugin.

    Args:
        plugin: name of an installed plugin, or a plugin class.
        families: names of families; of these, and by default of all, those that the plugin claims.
        variants: further pipelines of the tiny factories that get the checks of a first class ("WanPipeline@2.2").
        thorough: on every family also what the core alone decides (offload, save, copy, pickle...), for tests of the core.
    """
    return [case for case in contract_candidates(plugin, families, variants, thorough) if case.applies]


def contract_candidates(
    plugin: str | type[Plugin], families: Iterable[str] | None = None, variants: Iterable[str] = (), thorough: bool = False
) -> list[Case]:
    """The same and those that do not apply. Which do is asked of each ``case.applies`` alone: of all plugins it takes minutes."""
    cls = registry.find(plugin) if isinstance(plugin, str) else plugin
    known = registry.families()
    if families is None:
        return candidates(cls, known.values(), known.values(), variants, thorough)
    return candidates(cls, [known[name] for name in families], (), variants, thorough)


def contract_sample(plugin: str | type[Plugin], seed: str) -> Iterator[Case]:
    """Of one plugin's cases a covering table: each check and each family once at least; which meet depends on the seed.

    It is made as it is read: where nobody collects the test that it is for, nothing is asked, which takes seconds.
    """
    yield from covering(contract_candidates(plugin), seed)


def run_contract(plugin: str | type[Plugin], families: Iterable[str] | None = None) -> list[str]:
    """Run every case of one plugin; returns the remarks ("compiled into 3 graphs...").

    Raises:
        AssertionError: with every failure, each under its case's name.
    """
    remarks, failures = [], []
    cases = contract_cases(plugin, families)
    assert cases, f"no case applies to {plugin!r}: does it claim a family that has a tiny pipeline?"
    for case in cases:
        try:
            remarks += [f"{case}: {note}" for note in case.run()]
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} of {len(cases)} cases failed:\n  " + "\n  ".join(failures)
    return remarks
