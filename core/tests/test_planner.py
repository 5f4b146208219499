"""The planner judges by effects: it never sees a plugin's name in a rule, a pipeline or torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from diffgraft.installed.errors import BrokenPlugin, Conflict
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.plugin import Effects
from hypothesis import given
from hypothesis import strategies as st


def part(name, **effects):
    return Part(name, Effects(**{k: frozenset(v) if isinstance(v, list) else v for k, v in effects.items()}))


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (part("a", skips=["blocks"]), part("b", skips=["blocks"]), "both skip blocks"),
        (part("a", replaces=["scheduler"]), part("b", replaces=["scheduler"]), "both replace the scheduler"),
        (part("a", replaces=["noise"]), part("b", replaces=["noise"]), "both replace the noise: only one can be there"),
        (part("a", skips=["blocks"]), part("b", needs=["gradients"]), "needs gradients"),
        (part("a", skips=["denoiser"]), part("b", needs=["all_blocks"]), "needs every block"),
        (part("a", stochastic=True), part("b", needs=["determinism"]), "deterministic"),
    ],
)
def test_clashes_are_refused_in_either_order_with_both_names(a, b, word):
    for pair in ((a, b), (b, a)):
        verdict = plan(pair)
        assert len(verdict.conflicts) == 1
        assert word in verdict.conflicts[0]
        with pytest.raises(Conflict, match=word) as error:
            verdict.ensure()
        assert "a" in str(error.value)
        assert "b" in str(error.value)


def test_every_reason_is_told_at_once():
    stack = [part(n, skips=["blocks"], replaces=["scheduler"]) for n in "abc"]
    assert len(plan(stack).conflicts) == 6


def test_the_same_plugin_twice_is_refused_once():
    (reason,) = plan([part("a", skips=["blocks"]), part("a", skips=["blocks"])]).conflicts
    assert "2 times" in reason


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (part("a", edits=["resolution"]), part("b", skips=["blocks"])),
        (part("a", edits=["timestep"]), part("b", edits=["timestep"])),
        (part("a", skips=["denoiser"]), part("b", skips=["blocks"])),
        (part("a", replaces=["scheduler"]), part("b", edits=["schedule"])),
    ],
)
def test_legal_but_surprising_pairs_warn(a, b):
    for pair in ((a, b), (b, a)):
        verdict = plan(pair)
        assert not verdict.conflicts
        assert len(verdict.warnings) == 1


def test_orthogonal_plugins_run_without_a_word():
    verdict = plan([part("cache", skips=["blocks"]), part("shift", edits=["timestep"]), part("guide", edits=["prediction"])])
    assert verdict.order == ("cache", "shift", "guide")
    assert not verdict.conflicts
    assert not verdict.warnings


def test_unknown_effect_words_are_a_broken_plugin():
    with pytest.raises(BrokenPlugin, match="skipz"):
        Effects(skips=frozenset({"skipz"}))


subset = {name: st.frozensets(st.sampled_from(sorted(words))) for name, words in Effects.VOCABULARY.items()}
effects = st.builds(Effects, **subset, stochastic=st.booleans())


@given(effects, effects)
def test_the_verdict_does_not_depend_on_the_order(a, b):
    one, two = plan([Part("a", a), Part("b", b)]), plan([Part("b", b), Part("a", a)])
    assert len(one.conflicts) == len(two.conflicts)
    assert len(one.warnings) == len(two.warnings)


def test_what_is_installed_is_known_without_torch():
    code = "import sys; from diffgraft.installed import planner, specs, unread; sys.exit(bool({'torch', 'diffusers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
