"""diffgraft: graft paper methods onto standard diffusers pipelines.

    from diffgraft import load_pipeline
    pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
    image = pipe("a red apple on a blue background").images[0]
    print(pipe.plugins.report())

Importing this package imports no torch; names that need it are loaded when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffgraft.calls import BlockInfo, Schedule, Step, StepOutput
    from diffgraft.loading import load_pipeline, unload

from diffgraft.config import PluginConfig
from diffgraft.errors import (
    ArtefactMismatch,
    BrokenPlugin,
    ConfigError,
    Conflict,
    DiffgraftError,
    NeverFired,
    PipelineNotFound,
    PluginNotFound,
    Unsupported,
)
from diffgraft.family import BlockGroup, Bundled, Family, Guidance, Tiny
from diffgraft.plugin import API, Calibrator, Effects, Need, Paper, Plugin

_LAZY = {
    "load_pipeline": "loading",
    "unload": "loading",
    "Schedule": "calls",
    "Step": "calls",
    "StepOutput": "calls",
    "BlockInfo": "calls",
}

__all__ = [
    "API",
    "ArtefactMismatch",
    "BlockGroup",
    "BlockInfo",
    "BrokenPlugin",
    "Bundled",
    "Calibrator",
    "ConfigError",
    "Conflict",
    "DiffgraftError",
    "Effects",
    "Family",
    "Guidance",
    "Need",
    "NeverFired",
    "Paper",
    "PipelineNotFound",
    "Plugin",
    "PluginConfig",
    "PluginNotFound",
    "Schedule",
    "Step",
    "StepOutput",
    "Tiny",
    "Unsupported",
    "load_pipeline",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"diffgraft.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'diffgraft' has no attribute {name!r}")
