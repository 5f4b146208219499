"""The quality scale: tiers, quality files, the badge."""

from __future__ import annotations

import sys

import pytest
from diffgraft.community import quality
from diffgraft.community.badge import badge
from diffgraft.community.quality import SCALE, Card, Claim, Quality, as_toml, parse
from diffgraft.installed.errors import ConfigError

BRONZE, SILVER, GOLD = ([c.name for c in SCALE if c.tier == tier] for tier in quality.TIERS)


def claims(*done, **others):
    return Quality({**dict.fromkeys(done, Claim("done")), **others})


def test_tiers_build_on_each_other():
    assert claims().tier is None
    assert claims(*BRONZE[:-1], *SILVER, *GOLD).tier is None
    assert claims(*BRONZE).tier == "bronze"
    assert claims(*BRONZE, *SILVER[1:], **{SILVER[0]: Claim("exempt", "U-Nets only")}).tier == "silver"
    assert claims(*BRONZE, *SILVER, GOLD[0]).tier == "silver"
    assert claims(*BRONZE, *SILVER, *GOLD).tier == "gold"


def test_a_quality_file_survives_writing():
    rows = {
        "contract": Claim("done"),
        "two_families": Claim("exempt", 'a "reason"'),
        "equation_test": Claim("done", "", ("tests/a.py::test_b",)),
    }
    card = Card("editing", '2.0x as "fast"', "README.md#Measured")
    found = parse(as_toml(Quality(rows, card)), "q")
    assert {name: found.claim(name) for name in rows} == rows
    assert set(found.claims) == {criterion.name for criterion in SCALE}
    assert found.card == card


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[rules]\ncontrakt = 'done'", "did you mean 'contract'"),
        ("[rules]\ncontract = 'yes'", "'done', 'todo', 'exempt'"),
        ("[rules]\ncontract = 1", "contract = 1"),
        ("[rules]\ncontract = { status = 'exempt', reason = 'hard' }", "nobody is exempt"),
        ("[rules]\ntwo_families = 'exempt'", "without a reason"),
        ("[rules]\npair_tests = { status = 'done', evidence = 'x' }", "list of texts"),
        ("rules = 3", "must be a table"),
        ("[rules", "q:"),
        ("card = 3", "must be a table [card]"),
        ("[card]\ngain = '2x'\ngain_where = 'README.md'", "one of faster,"),
        ("[card]\ngoal = 'fast'", "goal = 'fast'"),
        ("[card]\ngoal = 'faster'\ngains = ''", "did you mean 'gain'"),
        ("[card]\ngoal = 'faster'\ngain = 2", "text of one line"),
        ("[card]\ngoal = 'faster'\ngain = '2x'", "go together"),
    ],
)
def test_bad_quality_files(text, word):
    with pytest.raises(ConfigError) as error:
        parse(text, "q")
    assert word in str(error.value)


def test_the_tier_is_read_without_importing(workshop, monkeypatch):
    done = [("toml", f'{name} = "todo"', f'{name} = "done"') for name in BRONZE]
    folder = workshop.make([*done, ("py", "from typing import", "raise RuntimeError\nfrom typing import")], name="chk_tier")
    monkeypatch.syspath_prepend(str(folder))
    assert quality.tier_of("diffgraft_chk_tier") == "bronze"
    assert "diffgraft_chk_tier" not in sys.modules
    (folder / "diffgraft_chk_tier" / "quality.toml").write_text("[rules")
    assert quality.tier_of("diffgraft_chk_tier") is None
    assert quality.tier_of("diffgraft_chk_nowhere") is None


@pytest.mark.parametrize("tier", [None, "bronze", "silver", "gold"])
def test_the_badge_is_a_picture_that_needs_no_network(tier):
    from xml.etree import ElementTree

    text = badge(tier)
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert (tier or "no tier yet") in text
    assert "href" not in text
