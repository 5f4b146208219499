"""The one exception tree. Every refusal names what, why and the way out, and is raised before anything is touched.

    DiffgraftError
    ├── PipelineNotFound     no such bundled name, folder or Hub id
    ├── PluginNotFound       no such plugin installed (nearest names, the pip command)
    ├── BrokenPlugin         installed, but cannot be used: import error, wrong contract number, wrong shape
    ├── Unsupported          this pipeline, scheduler or version cannot take it, because...
    ├── Conflict             two plugins (or two uses) that do not fit: both sides, the reason, the way out
    ├── ConfigError          a knob: key, value, what is allowed
    ├── ArtefactMismatch     a calibration file made for something else
    ├── CatalogueError       the list of published plugins cannot be read, or has nothing of the kind
    ├── RewardError          a reward gave something that is no score
    └── NeverFired           a hook that the plan promised was never reached in a run
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


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``word``, or ``""``."""
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
