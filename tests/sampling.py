"""Which tests the default suite runs: everything of the core, what changed, a sample of what did not (design: 25 minutes, always).

Of a few changed plugins all is run; where many changed in one day, they share the budget.

`bash tests/run.sh` passes ``--sample SEED --changed a,b``; without ``--sample`` everything is run. The seed is the commit, so the sample
moves from commit to commit, and one commit always runs the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import pytest
from diffgraft.installed import registry
from diffgraft.installed.family import Family
from diffgraft.testing import Case, Cell, Pair
from diffgraft.testing.cover import cover_pairs, covering, shuffled

CASES, OWN_TESTS, PAIRS, FACTS, LOOKED_AT = 250, 1300, 200, 300, 24
"""Cases of the contract, tests of plugins' own (a third of them at present: what a core changes shows there first, and they take a quarter
of a second each), pairs, families' facts, plugins whose behaviour is looked at and whose READMEs are run."""
LEAST = 4
"""Of a plugin at least."""
OWN = re.compile(r"^plugins/([^/]+)/tests/")
OWN_CONTRACT = re.compile(r"^plugins/[^/]+/tests/.*::test_contract$")
"""A plugin's own copy of the contract, for who works on it alone: tests/test_contract.py has the same cases."""
FACT = re.compile(r"^pipelines/families/tests/.*::(\w+)\[(.*)\]$")
"""(the fact, the pipeline class)."""


class Sample:
    """What is kept and how much was left out, by part."""

    def __init__(self, config: pytest.Config) -> None:
        self.seed: str | None = config.getoption("--sample")
        self.changed = frozenset(filter(None, config.getoption("--changed").split(",")))
        self.left_out: dict[str, tuple[int, int]] = {}

    def note(self, part: str, kept: int, total: int) -> None:
        self.left_out[part] = kept, total

    def contract(self, of_plugin: dict[str, list[Case]]) -> list[Case]:
        """Of each plugin its part of a covering table; ``of_plugin`` has its candidates."""
        if self.seed is None:
            return [case for cases in of_plugin.values() for case in cases if case.applies]
        sizes = {name: len({case.check.name for case in cases} | {case.family.name for case in cases}) for name, cases in of_plugin.items()}
        most = self.parts(CASES, sizes)
        kept = [case for name, cases in of_plugin.items() for case in islice(covering(cases, self.seed), most[name])]
        self.note("contract cases of plugins (or more than apply)", len(kept), sum(map(len, of_plugin.values())))
        return kept

    def parts(self, budget: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many each plugin may have: changed ones share the budget, the others what these leave of it."""
        most: dict[str, int] = {}
        for group in ({*sizes} & self.changed, {*sizes} - self.changed):
            left = budget - sum(min(sizes[name], most[name]) for name in most)
            found = level([sizes[name] for name in group], left)
            most |= dict.fromkeys(group, found)
        return most

    def pairs(self, pairs: list[Pair]) -> list[Pair]:
        if self.seed is None:
            return pairs
        kept = cover_pairs(pairs, self.seed, self.changed)[:PAIRS]  # where very many changed, not each of their pairs
        self.note("pairs of plugins", len(kept), len(pairs))
        return kept

    def cells(self, cells: list[Cell]) -> list[Cell]:
        """Of each form a few: one of those that are traced, on a transformer, since tracing takes long; two of the others."""
        if self.seed is None:
            return cells
        of_form: dict[str, list[Cell]] = {}
        for cell in shuffled(cells, self.seed):
            if cell.family.kind != "unet" or not cell.form.compiled:
                of_form.setdefault(cell.form.name, []).append(cell)
        kept = [cell for group in of_form.values() for cell in group[: 1 if group[0].form.compiled else 2]]
        self.note("plugins under forms of the denoiser", len(kept), len(cells))
        return kept

    def folders(self, part: str, folders: list[Path]) -> list[Path]:
        """Folders of plugins, those that changed before others, the same wherever the checkout lies."""
        if self.seed is None:
            return folders
        order = sorted(shuffled((folder.name for folder in folders), self.seed), key=lambda name: name not in self.changed)
        chosen = set(order[:LOOKED_AT])
        kept = [folder for folder in folders if folder.name in chosen]
        self.note(part, len(kept), len(folders))
        return kept

    def beyond(self, items: list[pytest.Item]) -> set[str]:
        """Ids of the tests of plugins and families that are more than their part."""
        if self.seed is None:
            return set()
        of_plugin: dict[str, list[pytest.Item]] = {}
        for item in items:
            if match := OWN.match(item.nodeid):
                of_plugin.setdefault(match.group(1), []).append(item)
        most = self.parts(OWN_TESTS, {name: len(own) for name, own in of_plugin.items()})
        beyond: set[str] = set()
        for name, own in of_plugin.items():
            beyond |= set(shuffled((item.nodeid for item in own), self.seed)[most[name] :])
        total = sum(map(len, of_plugin.values()))
        self.note("plugins' own tests", total - len(beyond), total)
        return beyond | self.facts_beyond([item.nodeid for item in items if FACT.match(item.nodeid)])

    def facts_beyond(self, facts: list[str]) -> set[str]:
        """Those of families that changed come first, then each fact and each class once, then others."""
        words = {fact: set(FACT.findall(fact)[0]) for fact in facts}
        changed = {name for family in registry.families().values() if stem(family) in self.changed for name in family.pipelines}
        met: set[str] = set()
        rank: dict[str, int] = {}
        for fact in shuffled(facts, self.seed or ""):
            rank[fact] = 0 if words[fact] & changed else 1 if words[fact] - met else 2
            met |= words[fact]
        kept = sorted(rank, key=rank.__getitem__)[:FACTS]
        self.note("families' facts", len(kept), len(facts))
        return {*facts} - {*kept}


def stem(family: Family) -> str:
    """The file that describes it, as its tiny pipelines' file, without its ending."""
    return (family.tiny or "").partition(":")[0].rpartition(".")[2]


def level(sizes: Iterable[int], budget: int) -> int:
    """The largest n for which parts of at most n each stay within the budget, but at least LEAST."""
    left, n = budget, LEAST
    order = sorted(sizes)
    for i, size in enumerate(order):
        n = left // (len(order) - i)
        if size > n:
            break
        left -= size
    return max(LEAST, n)


SAMPLE = pytest.StashKey[Sample]()


def sample_of(config: pytest.Config) -> Sample:
    """The sample of this session."""
    if SAMPLE not in config.stash:
        config.stash[SAMPLE] = Sample(config)
    return config.stash[SAMPLE]
