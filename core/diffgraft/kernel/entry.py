"""A plugin in the stack of one pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffgraft.installed.plugin import Plugin


@dataclass(eq=False)
class Entry:
    """``name`` is its key in ``pipe.plugins``."""

    plugin: Plugin
    enabled: bool = True
    given: dict[str, Any] = field(default_factory=dict)
    seen: tuple[Any, ...] = ()
    """What its checks rest on (``Seen``), of each pipeline that they looked at."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.plugin.name
