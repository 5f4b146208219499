"""Stacks and reports as tables for a notebook. All text is escaped: some of it is of plugins, knobs and files of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diffgraft.installed.foreign import brief, plain
from diffgraft.installed.plugin import Plugin

CELL = "text-align:left;vertical-align:top;padding:.2em .8em .2em 0"
LONGEST = 120
"""Characters of a knob's value."""


def stack_html(pipeline: str, plugins: Sequence[tuple[Plugin, bool]]) -> str:
    """The plugins of a pipeline, outermost first: knobs that were set, hook points, paper, whether switched on."""
    rows = [
        (number, plugin.name, knobs_html(plugin.own_knobs), ", ".join(plugin.points()), plugin.paper.title, "on" if enabled else "off")
        for number, (plugin, enabled) in enumerate(plugins, 1)
    ]
    return table_html(f"plugins of {pipeline}", ("", "plugin", "knobs", "hook points", "paper", ""), rows, "none")


def report_html(title: str, plugins: Mapping[str, tuple[Sequence[str], Sequence[str]]], disabled: Iterable[str]) -> str:
    """What each plugin did in a run: name -> (what, notes), line by line."""
    rows: list[Sequence[Any]] = [(name, lines(did), lines(notes)) for name, (did, notes) in plugins.items()]
    return table_html(title, ("plugin", "what it did", "notes"), [*rows, *((name, "switched off", "") for name in disabled)], "")


def knobs_html(knobs: Mapping[str, Any]) -> Lines:
    return lines(f"{name} = {brief(value, LONGEST)}" for name, value in knobs.items())


class Lines(str):
    """HTML already, all of it escaped."""

    __slots__ = ()


def lines(texts: Iterable[str]) -> Lines:
    """Texts below each other."""
    return Lines("<br>".join(escape(plain(text)) for text in texts))


def table_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> str:
    """A table with inline style alone: a notebook's own style sheets are its owner's."""
    body = "".join(f"<tr>{''.join(cell_html(value) for value in row)}</tr>" for row in rows)
    head = "".join(f'<th style="{CELL}">{escape(column)}</th>' for column in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else escape(empty)
    return f"<div><div><b>{escape(plain(title))}</b></div>{table}</div>"


def cell_html(value: Any) -> str:
    return f'<td style="{CELL}">{value if isinstance(value, Lines) else escape(plain(value))}</td>'
