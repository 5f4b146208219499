"""Which tests the default suite runs: everything of the core, all of what changed, a sample of what did not (design: 25 minutes, always).

`bash tests/run.sh` passes ``--sample SEED --changed a,b``; without ``--sample`` everything is run. The seed is the commit, so the sample
moves from commit to commit, and one commit always runs the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from diffgraft.testing import Case, Pair
from diffgraft.testing.cover import cover, cover_pairs, shuffled

CASES, OWN_TESTS, LOOKED_AT = 900, 1200, 28
"""Shared by all unchanged plugins: cases of the contract, tests of their own, plugins whose behaviour is looked at."""
LEAST = 6
"""Of an unchanged plugin at least."""
OWN = re.compile(r"^plugins/([^/]+)/tests/")


class Sample:
    """What is kept and how much was left out, by part."""

    def __init__(self, config: pytest.Config) -> None:
        self.seed: str | None = config.getoption("--sample")
        self.changed = frozenset(filter(None, config.getoption("--changed").split(",")))
        self.left_out: dict[str, tuple[int, int]] = {}

    def note(self, part: str, kept: int, total: int) -> None:
        self.left_out[part] = kept, total

    def contract(self, of_plugin: dict[str, list[Case]]) -> list[Case]:
        """Of a changed plugin the covering table, of the others a part of theirs."""
        if self.seed is None:
            return [case for cases in of_plugin.values() for case in cases]
        share = self.share(CASES, of_plugin)
        kept: list[Case] = []
        for name, cases in of_plugin.items():
            table = cover(cases, self.seed)
            kept += table if name in self.changed else shuffled(table, self.seed)[:share]
        self.note("contract cases of plugins", len(kept), sum(map(len, of_plugin.values())))
        return kept

    def share(self, budget: int, plugins: Iterable[str]) -> int:
        """An unchanged plugin's part of a budget."""
        return max(LEAST, budget // max(1, len([name for name in plugins if name not in self.changed])))

    def pairs(self, pairs: list[Pair]) -> list[Pair]:
        if self.seed is None:
            return pairs
        kept = cover_pairs(pairs, self.seed, self.changed)
        self.note("pairs of plugins", len(kept), len(pairs))
        return kept

    def folders(self, part: str, folders: list[Path]) -> list[Path]:
        """Folders of plugins: the changed ones and some others, the same wherever the checkout lies."""
        if self.seed is None:
            return folders
        dropped = set(shuffled((folder.name for folder in folders if folder.name not in self.changed), self.seed)[LOOKED_AT:])
        kept = [folder for folder in folders if folder.name not in dropped]
        self.note(part, len(kept), len(folders))
        return kept

    def beyond(self, items: list[pytest.Item]) -> set[str]:
        """Ids of the tests of unchanged plugins that are more than their share."""
        if self.seed is None:
            return set()
        of_plugin: dict[str, list[pytest.Item]] = {}
        for item in items:
            if match := OWN.match(item.nodeid):
                of_plugin.setdefault(match.group(1), []).append(item)
        share = self.share(OWN_TESTS, of_plugin)
        dropped: set[str] = set()
        for name, own in of_plugin.items():
            if name not in self.changed:
                dropped |= set(shuffled((item.nodeid for item in own), self.seed)[share:])
        self.note("plugins' own tests", sum(map(len, of_plugin.values())) - len(dropped), sum(map(len, of_plugin.values())))
        return dropped


SAMPLE = pytest.StashKey[Sample]()


def sample_of(config: pytest.Config) -> Sample:
    """The sample of this session."""
    if SAMPLE not in config.stash:
        config.stash[SAMPLE] = Sample(config)
    return config.stash[SAMPLE]
