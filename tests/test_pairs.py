"""Pairs of installed plugins: each runs, warns, or is refused with a reason. Which pairs: `diffgraft.testing.cover.cover_pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from diffgraft import Effects, Paper, Plugin
from diffgraft.testing import Pair, pair_cases
from sampling import sample_of

ROOT = Path(__file__).resolve().parent.parent
MATRIX = (ROOT / "examples" / "pairs.md").read_text()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", sample_of(metafunc.config).pairs(pair_cases()), ids=str)


def test_installed(pair: Pair, record_property: Any) -> None:
    verdict = pair.run()
    record_property("verdict", verdict)
    if not all(f"\n| {cls.name} |" in MATRIX for cls in (pair.outer, pair.inner)):
        return  # somebody else's plugin, installed beside ours, or one that is new: the release brings it into the matrix
    line = f"| {pair.outer.name} | {pair.inner.name} | {pair.family.name if pair.family else ''} | {verdict} |"
    assert line in MATRIX, "the matrix is out of date: run `python examples/pairs.py`"


NOTHING = Effects()


def probe(plugin_name: str, plugin_effects: Effects = NOTHING, on: str = "*") -> type[Plugin]:
    """A plugin that declares these effects and does nothing."""

    class Probe(Plugin):
        name = plugin_name
        paper = Paper("a probe", "0000.00000", "nothing")
        families: ClassVar[tuple[str, ...]] = (on,)
        neutral: ClassVar[dict[str, Any]] = {}
        effects = plugin_effects

        def denoise(self, call, next):
            return next(call)

    return Probe


SKIPS = Effects(skips=frozenset({"blocks"}))
GRADIENTS = Effects(needs=frozenset({"gradients"}))
TIMESTEP = Effects(edits=frozenset({"timestep"}))
VERDICTS = [
    ("runs", probe("a"), probe("b")),
    ("refused", probe("a", SKIPS), probe("b", SKIPS)),
    ("refused", probe("a", SKIPS), probe("b", GRADIENTS)),
    ("warns", probe("a", TIMESTEP), probe("b", TIMESTEP)),
    ("no common family", probe("a", on="flux"), probe("b", on="sd")),
]


@pytest.mark.parametrize(("verdict", "one", "other"), VERDICTS)
def test_verdicts(verdict: str, one: type[Plugin], other: type[Plugin]) -> None:
    pairs = pair_cases([one, other])
    assert len({(pair.outer, pair.inner) for pair in pairs}) == 2, "both orders"
    for pair in pairs:
        assert pair.run().startswith(verdict)


def test_a_pair_that_disturbs_each_other_is_caught() -> None:
    """The runner can fail: a plugin that counts its runs is not reproducible beside another."""

    class Counter(probe("a")):  # type: ignore[misc]
        runs = 0

        def run(self, call, next):
            self.runs += 1
            return next(call)

        def denoise(self, call, next):
            return next(call) * (1 + 0.01 * self.runs)

    with pytest.raises(AssertionError, match="second run with the same seed"):
        pair_cases([Counter, probe("b")])[0].run()
