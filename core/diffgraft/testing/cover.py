"""Samples of the contract that stay small however many plugins there are: every check, every family, another sample for every seed."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from diffgraft.installed.planner import Part, judge
from diffgraft.installed.plugin import Plugin
from diffgraft.testing.case import Case
from diffgraft.testing.pairs import Pair

T = TypeVar("T")

RANDOM_PAIRS = 40
CLASS_PAIRS = 160


def shuffled(items: Iterable[T], seed: str) -> list[T]:
    """The items in an order that depends on their names and the seed only, so that one more item moves no other."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item}".encode()).digest())


def cover(cases: Iterable[Case], seed: str) -> list[Case]:
    """A covering table instead of the product: each check once, and each family once at least; which meets which depends on the seed."""
    return list(covering(cases, seed))


def covering(cases: Iterable[Case], seed: str) -> Iterator[Case]:
    """Its rows one by one. Cases that do not apply are left out, and no more of them are asked whether they do than is needed."""
    order = shuffled(cases, seed)
    by_check: dict[str, list[Case]] = {}
    for case in order:
        by_check.setdefault(case.check.name, []).append(case)
    met: set[str] = set()
    for group in by_check.values():
        found = next((case for case in sorted(group, key=lambda case: case.family.name in met) if case.applies), None)
        if found is not None:
            met.add(found.family.name)
            yield found
    for case in order:
        if case.family.name not in met and case.applies:
            met.add(case.family.name)
            yield case


def effect_class(plugin: type[Plugin]) -> tuple[frozenset[str], ...]:
    """What the planner's rules tell plugins apart by: two plugins of one class meet a third one in the same way."""
    effects = plugin.effects
    return effects.replaces, effects.skips, effects.needs - {"extra_forwards"}, effects.edits & {"timestep", "schedule", "resolution"}


def rule_of(outer: type[Plugin], inner: type[Plugin]) -> Hashable:
    """The planner's texts on a pair without its names: pairs with the same texts met the same rules."""
    return str(judge(Part("outer", outer.effects), Part("inner", inner.effects)))


def cover_pairs(pairs: Sequence[Pair], seed: str, always: frozenset[str] = frozenset()) -> list[Pair]:
    """One pair for each two effect classes (a sample of them where they are very many), one for each set of rules that pairs meet, some
    at random, and those with a plugin named in ``always`` and one of each effect class.
    """
    kept: dict[Hashable, Pair] = {}
    order = shuffled((pair for pair in pairs if pair.family is not None), seed)
    for pair in order:
        kept.setdefault(("classes", frozenset((effect_class(pair.outer), effect_class(pair.inner)))), pair)
    kept = dict(list(kept.items())[:CLASS_PAIRS])
    for pair in order:
        kept.setdefault(("rules", rule_of(pair.outer, pair.inner)), pair)
        for one, other in ((pair.outer, pair.inner), (pair.inner, pair.outer)):
            if one.name in always:
                kept.setdefault((one.name, effect_class(other)), pair)
    chosen = {str(pair): pair for pair in (*kept.values(), *order[:RANDOM_PAIRS])}
    return list(chosen.values())
