"""The one exception tree. Every refusal names what, why and the way out, and is raised before anything is touched.

DiffgraftError
├── PipelineNotFound     no such bundled name, folder or Hub id, or it cannot be had (offline, gated)
├── PluginNotFound       no such plugin installed (nearest names, where to look)
├── BrokenPlugin         installed, but cannot be used: import error, wrong contract number, wrong shape
├── Unsupported          this pipeline, scheduler or version cannot take it, because...
├── Conflict             two plugins (or two uses) that do not fit: both sides, the reason, the way out
├── ConfigError          a knob: key, value, what is allowed
├── ArtefactMismatch     a calibration file made for something else
├── CatalogueError       the list of published plugins cannot be read, or has nothing of the kind
├── RewardError          a reward gave something that is no score
├── NeverFired           a hook that the plan promised was never reached in a run
├── NotPassed            an argument that a hook asks its call for, and that nobody passed (a KeyError too)
├── NotFinite            values that are not finite, and who made the first of them (``pipe.plugins.check_finite``)
├── OutputError          what was made cannot be written where it was to go; it is kept elsewhere
└── ForeignError         torch, diffusers or another library refused what the command line gave it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DiffgraftError(Exception):
    """Root of every error that diffgraft raises itself."""


class PipelineNotFound(DiffgraftError):
    """The pipeline name is neither bundled, nor a folder, nor a Hub id."""


class PluginNotFound(DiffgraftError):
    """No installed plugin has this name."""


class BrokenPlugin(DiffgraftError):
    """A plugin is installed but cannot be used."""


class Unsupported(DiffgraftError):
    """The plugin or option cannot work on this pipeline, for the reason given."""


class Conflict(DiffgraftError):
    """Two things that do not fit together."""


class ConfigError(DiffgraftError):
    """A knob is unknown or its value is not allowed."""


class ArtefactMismatch(DiffgraftError):
    """A calibration artefact was made for another model, scheduler or shape."""


class CatalogueError(DiffgraftError):
    """A catalogue of plugins cannot be read, is none, or has no plugin of that kind."""


class RewardError(DiffgraftError):
    """A reward gave no finite number, or not one for each picture."""


class NeverFired(DiffgraftError):
    """A promised hook was never reached. ``result`` holds what the run produced, so that nothing is lost."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class NotPassed(DiffgraftError, KeyError):
    """A call has no argument of this name."""

    __str__ = Exception.__str__  # a KeyError shows its text in quotes


class NotFinite(DiffgraftError):
    """Values that are not finite: the text names who made the first of them."""


class OutputError(DiffgraftError):
    """A result cannot be written where it was to go. The text tells where it is kept, or why it is lost."""


class ForeignError(DiffgraftError):
    """Another library refused what the command line gave it, told in one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``word``: ``"; did you mean 'a' or 'b'?"``, or ``"."`` where nothing known is near."""
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else "."


def choices(word: str, known: Iterable[str], title: str) -> str:
    """The same, and all that is known as a sentence of its own: ``". Known: a, b."``"""
    names = list(known)
    return f"{nearest(word, names)} {title}: {', '.join(names) or 'none'}."
