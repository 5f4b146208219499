"""The quality scale: what a plugin must show for bronze, silver and gold, and what it claims in its ``quality.toml``.

``quality.toml`` lies in the plugin's import package, so it ships in the wheel and is read without importing anything:

    [rules]
    contract = "done"
    equation_test = { status = "done", evidence = ["tests/test_my_method.py::test_equation_4"] }
    gpu_timing = "todo"
    two_families = { status = "exempt", reason = "the paper's blocks exist in U-Nets only" }

    [card]                                       # its row in tables by goal
    goal = "faster"
    gain = "2.0x as fast on emoji-wan"
    gain_where = "README.md#Measured here"       # where these figures stand: a file, and a part of it

What a machine can find out is found out by ``diffgraft check`` and may not be claimed against it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffgraft.installed.errors import ConfigError, choices

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tier = Literal["bronze", "silver", "gold"]
TIERS: tuple[Tier, ...] = ("bronze", "silver", "gold")
STATUSES = ("done", "todo", "exempt")
FILE = "quality.toml"
GOALS = {
    "faster": "Faster, with nothing to prepare",
    "calibrated": "Faster, after a calibration or a search on your model",
    "prompt": "Closer to the prompt, or to two prompts at once",
    "editing": "Edit a picture that is there",
    "research": "Research on sampling",
}
"""What a plugin may be for, as people choose; the words stand in the tables by goal."""


@dataclass(frozen=True)
class Criterion:
    """One line of the scale.

    computed  ``check`` finds out itself whether it holds; otherwise the author says so
    evidence  what the author names as evidence: "test" (``tests/test_x.py::test_name``), "file", or "" (none is asked for)
    """

    name: str
    tier: Tier
    what: str
    computed: bool = False
    evidence: Literal["", "test", "file"] = ""


SCALE = (
    Criterion("installs", "bronze", "installs alone: names, versions, licence and declared imports are in order", computed=True),
    Criterion("static", "bronze", "the static rules of `diffgraft check` hold", computed=True),
    Criterion("contract", "bronze", "the contract suite is green, and the declared effects are what can be observed", computed=True),
    Criterion("readme", "bronze", "a README with every section, the limits among them, and nothing left to be written", computed=True),
    Criterion("equation_test", "bronze", "a test holds the code against the paper's equations", evidence="test"),
    Criterion("two_families", "silver", "works on two families or more", computed=True),
    Criterion("pair_tests", "silver", "tested beside other plugins, in both orders", evidence="test"),
    Criterion("reference_values", "silver", "tested against values of the official code or of a closed form", evidence="test"),
    Criterion("gpu_timing", "gold", "timed on a GPU against the plain pipeline", evidence="file"),
    Criterion("paper_claim", "gold", "quality held against the paper's claim on its own model, deviations explained", evidence="file"),
)
BY_NAME = {criterion.name: criterion for criterion in SCALE}


@dataclass(frozen=True)
class Claim:
    """What a plugin says about one criterion; ``reason`` of an exemption, ``evidence`` as :class:`Criterion` says."""

    status: str
    reason: str = ""
    evidence: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        return self.status in ("done", "exempt")


@dataclass(frozen=True)
class Card:
    """What a plugin is for, and what it was measured to gain.

    goal        one of :data:`GOALS`
    gain        figures in a few words; empty where nothing is measured yet
    gain_where  the file in which every one of these figures stands, with ``#`` and a part of its text, as evidence is named
    """

    goal: str
    gain: str = ""
    gain_where: str = ""


@dataclass(frozen=True)
class Quality:
    """A ``quality.toml``: claims by criterion, and the card. Criteria that are not named are todo."""

    claims: Mapping[str, Claim]
    card: Card | None = None

    @cached_property
    def tier(self) -> Tier | None:
        """The highest tier all of whose criteria, and all of the lower ones', are met."""
        reached: Tier | None = None
        for tier in TIERS:
            if not all(self.claim(criterion.name).met for criterion in SCALE if criterion.tier == tier):
                return reached
            reached = tier
        return reached

    def claim(self, name: str) -> Claim:
        return self.claims.get(name, Claim("todo"))


def parse(text: str, where: str) -> Quality:
    """Read the text of a ``quality.toml``.

    Raises:
        ConfigError: it is no TOML, or names a criterion, a status or a goal that does not exist, or an exemption that may not be or has no
            reason, or figures without a place.
    """
    data = toml(text, where)
    for name in ("rules", "card"):
        if not isinstance(data.get(name, {}), dict):
            raise ConfigError(f"{where}: {name} = {data[name]!r}: it must be a table [{name}]")
    claims = {name: parse_claim(name, value, where) for name, value in data.get("rules", {}).items()}
    return Quality(claims, parse_card(data["card"], where) if "card" in data else None)


def parse_card(row: dict[str, Any], where: str) -> Card:
    """The table [card]."""
    known = [field.name for field in fields(Card)]
    for key, value in row.items():
        if key not in known:
            raise ConfigError(f"{where}: [card] has no {key!r}{choices(key, known, 'Known')}")
        if not isinstance(value, str) or not value.isprintable():
            raise ConfigError(f"{where}: [card] {key} = {value!r}: it must be a text of one line")
    card = Card(**{"goal": "", **row})
    if card.goal not in GOALS:
        raise ConfigError(f"{where}: [card] goal = {card.goal!r}: it must be one of {', '.join(GOALS)}")
    if bool(card.gain) != bool(card.gain_where):
        raise ConfigError(f"{where}: [card] gain and gain_where go together: figures, and the file in which they stand")
    return card


def parse_claim(name: str, value: Any, where: str) -> Claim:
    """One row."""
    if name not in BY_NAME:
        raise ConfigError(f"{where}: there is no criterion {name!r}{choices(name, BY_NAME, 'Known')}")
    row = {"status": value} if isinstance(value, str) else value
    if not isinstance(row, dict) or row.get("status") not in STATUSES or set(row) - {"status", "reason", "evidence"}:
        raise ConfigError(f"{where}: {name} = {value!r}: say {', '.join(map(repr, STATUSES))}, or {{ status, reason, evidence }}")
    evidence = row.get("evidence", [])
    if not isinstance(evidence, list) or not all(isinstance(item, str) for item in evidence):
        raise ConfigError(f"{where}: {name}: evidence = {evidence!r}: it must be a list of texts")
    claim = Claim(row["status"], str(row.get("reason", "")), tuple(evidence))
    if claim.status == "exempt" and BY_NAME[name].tier == "bronze":
        raise ConfigError(f"{where}: {name} is bronze, and nobody is exempt from that")
    if claim.status == "exempt" and not claim.reason.strip():
        raise ConfigError(f"{where}: {name} is exempt without a reason; say why")
    return claim


def toml(text: str, where: str) -> dict[str, Any]:
    """TOML as plain data; raises ConfigError that names ``where``."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return data


def read(package: str) -> Quality | None:
    """The quality file of an installed import package, without importing it; None where there is none.

    Raises:
        ConfigError: as :func:`parse`.
    """
    spec = importlib.util.find_spec(package.partition(".")[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return parse(path.read_text(encoding="utf-8"), f"{package}/{FILE}")
    return None


def tier_of(package: str) -> Tier | None:
    """The tier that an installed package claims, for lists: None where it claims none or its file cannot be read."""
    try:
        quality = read(package)
    except Exception:  # a list names what can be named; `check` says what is wrong
        return None
    return quality.tier if quality else None


def as_toml(quality: Quality) -> str:
    """A whole ``quality.toml``: the claims tier by tier, what each criterion asks beside it, and the card."""
    lines = [
        "# Where this plugin stands on diffgraft's quality scale: done, todo, or exempt with the reason.",
        "# `diffgraft check` verifies it.",
        "",
        "[rules]",
    ]
    for tier in TIERS:
        lines.append(f"# {tier}")
        for criterion in SCALE:
            if criterion.tier == tier:
                lines += [f"# {criterion.what}", row_as_toml(criterion.name, quality.claim(criterion.name))]
    return "\n".join([*lines, *(card_as_toml(quality.card) if quality.card else [])]) + "\n"


def card_as_toml(card: Card) -> list[str]:
    """The lines of the table [card]."""
    says = (
        f"what it is for, in the tables that help people choose: {', '.join(GOALS)}",
        "what it was measured to gain, in a few words with figures; empty: nothing yet",
        "the file in which these figures stand, and a part of its text: README.md#Measured here",
    )
    rows = zip(fields(Card), astuple(card), says, strict=True)
    return ["", "[card]", *(line for field, value, what in rows for line in (f"# {what}", f"{field.name} = {json.dumps(value)}"))]


def row_as_toml(name: str, claim: Claim) -> str:
    """One row of it."""
    quoted = json.dumps
    if not claim.reason and not claim.evidence:
        return f"{name} = {quoted(claim.status)}"
    parts = [f"status = {quoted(claim.status)}"]
    parts += [f"reason = {quoted(claim.reason)}"] if claim.reason else []
    parts += [f"evidence = [{', '.join(quoted(item) for item in claim.evidence)}]"] if claim.evidence else []
    return f"{name} = {{ {', '.join(parts)} }}"
