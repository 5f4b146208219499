"""Facts about plugins for people: read from the classes and their packages' metadata, so that no page repeats them by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from diffgraft.community.quality import GOALS, TIERS, Card, read, tier_of
from diffgraft.installed import registry
from diffgraft.installed.config import allowed
from diffgraft.installed.errors import BrokenPlugin
from diffgraft.installed.foreign import plain
from diffgraft.installed.offers import blamed
from diffgraft.installed.plugin import Plugin


@dataclass(frozen=True)
class Knob:
    """One knob: what it may be, what it is when nobody sets it, and what it does."""

    name: str
    allowed: str
    default: Any
    description: str


def knobs(cls: type[Plugin]) -> list[Knob]:
    """The knobs of a plugin class, in their own order."""
    return [
        Knob(
            name,
            allowed(cls.Config, name),
            "required" if field.is_required() else field.get_default(call_default_factory=True),  # type: ignore[call-arg]
            field.description or "",
        )
        for name, field in cls.Config.model_fields.items()
    ]


def knob_table(cls: type[Plugin]) -> str:
    """A Markdown table of a plugin's knobs, for its README."""
    if not knobs(cls):
        return "It has no knobs.\n"
    rows = [table_row(code(k.name), code(k.default), as_markdown(k.allowed), as_markdown(k.description)) for k in knobs(cls)]
    return "\n".join(["| knob | default | allowed | what it is |", "|---|---|---|---|", *rows]) + "\n"


def as_markdown(text: object) -> str:
    """Somebody's text as Markdown: no raw HTML, no link and no picture of its own."""
    safe = re.sub(r"&(?=#?\w+;)", "&amp;", plain(text).replace("\\|", "&#92;|"))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", safe).replace("](", "\\](").replace("][", "\\][")


def code(text: object) -> str:
    """Somebody's text between backticks, which it cannot leave."""
    shown = plain(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return f"{'`' * (longest + 1)} {shown} {'`' * (longest + 1)}" if longest else f"`{shown}`"


def table_row(*cells: str) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def pipelines_of(cls: type[Plugin]) -> list[str]:
    """Pipeline classes whose families a plugin claims, without those that it says it does not work on."""
    return sorted(
        name for family in registry.families().values() if cls.claims(family) for name in family.pipelines if cls.why_not_on(name) is None
    )


def describe(cls: type[Plugin], info: registry.Offer | None = None) -> dict[str, Any]:
    """All that a plugin declares, as plain data."""
    about = {} if info is None else {"dist": info.dist, "version": info.version, "summary": info.summary, "homepage": info.homepage}
    return {
        "name": cls.name,
        **about,
        "paper": asdict(cls.paper),
        "contract": cls.api,
        "tier": tier_of(cls.__module__),
        "hook_points": [*cls.points(), *(["scheduler"] if cls.scheduler is not None else [])],
        "effects": cls.effects.words(),
        "families": list(cls.families),
        "pipelines": pipelines_of(cls),
        "neutral": cls.neutral,
        "knobs": [asdict(knob) for knob in knobs(cls)],
    }


def plugin_table(classes: Iterable[type[Plugin]]) -> str:
    """A Markdown table of plugins: name, paper, what it does, where it works, knobs with their defaults."""
    lines = ["| plugin | tier | paper | what it does | works on | effects | knobs (default) |", "|---|---|---|---|---|---|---|"]
    for cls in classes:
        knob_text = ", ".join(f"{code(k.name)} ({as_markdown(k.default)})" for k in knobs(cls)) or "none"
        where = "all families" if "*" in cls.families else as_markdown(", ".join(cls.families))
        tier = tier_of(cls.__module__) or ""
        what = as_markdown(cls.paper.implemented)
        lines.append(table_row(code(cls.name), tier, paper_link(cls), what, where, as_markdown(cls.effects.words()), knob_text))
    return "\n".join(lines) + "\n"


TAKES = {
    "artefact": "a calibration file",
    "search": "what a search found",
    "inversion": "a picture's latents",
    "fit": "a file that was learned",
    "adapter": "a LoRA",
    "pipeline": "a second pipeline",
    "reward": "a reward function",
    "weights": "published weights",
    "encoder": "a text encoder",
}
KINDS = {"*": "all", "unets": "U-Nets", "dits": "transformers"}


def families_in_words(cls: type[Plugin], most: int = 3) -> str:
    """Where a plugin works, short: the first of many families stand for all of them."""
    names = [KINDS.get(name, name) for name in cls.families]
    return ", ".join(names) if len(names) <= most + 1 else f"{', '.join(names[:most])} and {len(names) - most} more"


def card_of(cls: type[Plugin]) -> Card | None:
    """What the plugin's package says that it is for; None where it says nothing."""
    quality = read(cls.__module__)
    return quality.card if quality else None


def goal_tables(classes: Iterable[type[Plugin]], page: Callable[[str], str], place: Callable[[str, Card], str]) -> str:
    """Which plugin for what: a Markdown table for each goal that somebody serves. Plugins without a card are left out.

    Args:
        page: a plugin's name -> the address of its page.
        place: a plugin's name and card -> the address where its figures stand; linked where that is not its page.
    """
    cards = [(cls, card) for cls in classes if (card := card_of(cls))]
    lines = []
    for goal, words in GOALS.items():
        here = [(cls, card) for cls, card in cards if card.goal == goal]
        if not here:
            continue
        lines += [f"**{words}**", "", "| plugin | families | takes | measured |", "|---|---|---|---|"]
        for cls, card in sorted(here, key=lambda pair: (-tier_number(pair[0]), pair[0].name)):
            figures = as_markdown(card.gain) or "nothing yet"
            if card.gain and place(cls.name, card) != page(cls.name):
                figures = f"[{figures}]({place(cls.name, card)})"
            takes = ", ".join(dict.fromkeys(TAKES.get(need.kind, need.kind) for need in cls.needs))
            lines.append(table_row(f"[`{cls.name}`]({page(cls.name)})", families_in_words(cls), takes, figures))
        lines.append("")
    return "\n".join(lines)


def tier_number(cls: type[Plugin]) -> int:
    """How high the tier is that a plugin claims; 0 is none."""
    tier = tier_of(cls.__module__)
    return TIERS.index(tier) + 1 if tier else 0


def paper_link(cls: type[Plugin]) -> str:
    """The paper's title, linked to arXiv where it has an id."""
    title = as_markdown(cls.paper.title)
    return f"[{title}](https://arxiv.org/abs/{quote(str(cls.paper.arxiv))})" if cls.paper.arxiv else title


def installed_table() -> tuple[str, list[str]]:
    """The Markdown table of all installed, allowed plugins, and what is wrong with those that cannot be in it."""
    classes, faults = [], []
    for name, info in registry.installed().items():
        if not info.allowed:
            continue
        try:
            cls = registry.find(name)
            with blamed(f"{info} does not say what it is"):
                plugin_table([cls])  # what it declares is read here, and may be anything
            classes.append(cls)
        except BrokenPlugin as error:
            faults.append(str(error))
    return plugin_table(classes), faults
