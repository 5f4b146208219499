"""What `diffgraft doctor` found last, for lists that import nothing: kept in the user's cache, one file an environment."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffgraft.installed.foreign import plain
from diffgraft.installed.offers import Offer
from diffgraft.methods.files import write_json


def place() -> Path:
    """The file for this environment."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "diffgraft" / f"doctor-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}.json"


def stamp(offer: Offer) -> str:
    """What changes when a plugin is upgraded or edited: what was found of another one counts no more."""
    try:
        spec = importlib.util.find_spec(offer.module.partition(".")[0])
        state = os.stat(spec.origin) if spec and spec.origin else None
    except Exception:  # a module that cannot even be looked for
        state = None
    return " ".join(map(str, (offer.dist, offer.version, offer.value, state and state.st_mtime_ns, state and state.st_size)))


def remember(found: Iterable[tuple[Offer, str | None]]) -> str | None:
    """Keep what is wrong with each plugin that was tried (None: nothing); gives the reason when it cannot be kept."""
    try:
        write_json(place(), {str(offer): {"stamp": stamp(offer), "fault": fault} for offer, fault in found})
    except OSError as error:
        return plain(error.strerror or error)
    return None


def recall(offers: Iterable[Offer]) -> Mapping[str, str | None]:
    """What the last doctor found wrong with those that are still what it tried, by ``str(offer)``; None: nothing."""
    try:
        kept = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = {}
    for offer in offers:
        row = kept.get(str(offer)) if isinstance(kept, dict) else None
        if isinstance(row, dict) and row.get("stamp") == stamp(offer):
            fault = row.get("fault")
            found[str(offer)] = None if fault is None else plain(fault)
    return found
