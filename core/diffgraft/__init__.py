"""diffgraft: graft paper methods onto standard diffusers pipelines.

    from diffgraft import load_pipeline
    pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
    image = pipe("a red apple on a blue background").images[0]
    print(pipe.plugins.report())

Users need nothing but this package's names; who writes a plugin also imports from ``diffgraft.methods``. Importing it imports
nothing else: each name is loaded when it is first used, and torch with the first that needs it.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffgraft.installed.anatomy import AttentionInfo, BlockInfo, Target, blocks_of, denoisers_of, root_of
    from diffgraft.installed.config import PluginConfig
    from diffgraft.installed.errors import (
        ArtefactMismatch,
        BrokenPlugin,
        CatalogueError,
        ConfigError,
        Conflict,
        DiffgraftError,
        NeverFired,
        NotFinite,
        PipelineNotFound,
        PluginNotFound,
        RewardError,
        Unsupported,
        nearest,
    )
    from diffgraft.installed.family import BlockGroup, Bundled, Family, Guidance, Tiny
    from diffgraft.installed.offers import API
    from diffgraft.installed.plugin import Effects, Need, Paper, Plugin
    from diffgraft.installed.registry import find_family
    from diffgraft.kernel.calls import (
        AttentionCall,
        BlockCall,
        Call,
        ControlCall,
        DenoiseCall,
        GuideCall,
        ModulesCall,
        RunCall,
        Schedule,
        ScheduleCall,
        StepCall,
        StepOutput,
    )
    from diffgraft.kernel.facts import Step
    from diffgraft.kernel.loading import load_pipeline, unload
    from diffgraft.kernel.now import Now, now
    from diffgraft.methods.fitter import Fitter, LoraFitter
    from diffgraft.methods.watching import Calibrator, Inverter, Watcher

logging.getLogger("diffgraft").addHandler(logging.NullHandler())  # silent until its user turns it on

_LAZY = {
    **dict.fromkeys(("ArtefactMismatch", "BrokenPlugin", "CatalogueError", "ConfigError", "Conflict"), "installed.errors"),
    **dict.fromkeys(("DiffgraftError", "NeverFired", "PipelineNotFound", "PluginNotFound", "RewardError"), "installed.errors"),
    **dict.fromkeys(("NotFinite", "Unsupported", "nearest"), "installed.errors"),
    **dict.fromkeys(("BlockGroup", "Bundled", "Family", "Guidance", "Tiny"), "installed.family"),
    "API": "installed.offers",
    **dict.fromkeys(("Effects", "Need", "Paper", "Plugin"), "installed.plugin"),
    "PluginConfig": "installed.config",
    "find_family": "installed.registry",
    **dict.fromkeys(("load_pipeline", "unload"), "kernel.loading"),
    **dict.fromkeys(("Now", "now"), "kernel.now"),
    "Step": "kernel.facts",
    **dict.fromkeys(("AttentionInfo", "BlockInfo", "Target", "blocks_of", "denoisers_of", "root_of"), "installed.anatomy"),
    **dict.fromkeys(("Call", "RunCall", "ScheduleCall", "ControlCall", "DenoiseCall", "BlockCall", "AttentionCall"), "kernel.calls"),
    **dict.fromkeys(("GuideCall", "StepCall", "ModulesCall", "Schedule", "StepOutput"), "kernel.calls"),
    **dict.fromkeys(("Fitter", "LoraFitter"), "methods.fitter"),
    **dict.fromkeys(("Watcher", "Calibrator", "Inverter"), "methods.watching"),
}

__all__ = [
    "API",
    "ArtefactMismatch",
    "AttentionCall",
    "AttentionInfo",
    "BlockCall",
    "BlockGroup",
    "BlockInfo",
    "BrokenPlugin",
    "Bundled",
    "Calibrator",
    "Call",
    "CatalogueError",
    "ConfigError",
    "Conflict",
    "ControlCall",
    "DenoiseCall",
    "DiffgraftError",
    "Effects",
    "Family",
    "Fitter",
    "Guidance",
    "GuideCall",
    "Inverter",
    "LoraFitter",
    "ModulesCall",
    "Need",
    "NeverFired",
    "NotFinite",
    "Now",
    "Paper",
    "PipelineNotFound",
    "Plugin",
    "PluginConfig",
    "PluginNotFound",
    "RewardError",
    "RunCall",
    "Schedule",
    "ScheduleCall",
    "Step",
    "StepCall",
    "StepOutput",
    "Target",
    "Tiny",
    "Unsupported",
    "Watcher",
    "__version__",
    "blocks_of",
    "denoisers_of",
    "find_family",
    "load_pipeline",
    "nearest",
    "now",
    "root_of",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(f"diffgraft.{_LAZY[name]}"), name)
        return value
    raise AttributeError(f"module 'diffgraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
