"""What diffusers itself has put on a denoiser, in the words the planner reasons with: its caches are a part of the stack like any other.

They are known by the hooks that they leave on modules, so it does not matter whether ``enable_cache`` or an ``apply_...`` function was
called. Offloading, layerwise casting and parallel runs move or convert weights and change nothing that a plugin rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.planner import Part
from diffgraft.installed.plugin import Effects

BLOCKS = Effects(skips=frozenset({"blocks"}))
CACHES = {
    "faster_cache_denoiser": ("FasterCache", Effects(skips=frozenset({"blocks", "branches"}))),
    "faster_cache_block": ("FasterCache", Effects(skips=frozenset({"blocks", "branches"}))),
    "pyramid_attention_broadcast": ("PyramidAttentionBroadcast", BLOCKS),
    "fbc_leader_block_hook": ("FirstBlockCache", BLOCKS),
    "fbc_block_hook": ("FirstBlockCache", BLOCKS),
    "mag_cache_leader_block_hook": ("MagCache", BLOCKS),
    "mag_cache_block_hook": ("MagCache", BLOCKS),
    "sea_cache_root": ("SeaCache", BLOCKS),
    "sea_cache_leader_block": ("SeaCache", BLOCKS),
    "sea_cache_block": ("SeaCache", BLOCKS),
    "taylorseer_cache": ("TaylorSeerCache", BLOCKS),
    "text_kv_cache_transformer": ("TextKVCache", Effects(edits=frozenset({"attention"}))),
    "text_kv_cache_block": ("TextKVCache", Effects(edits=frozenset({"attention"}))),
    "layer_skip_hook": ("LayerSkip", Effects(edits=frozenset({"prediction"}))),
    "smoothed_energy_guidance_hook": ("SmoothedEnergyGuidance", Effects(edits=frozenset({"attention", "prediction"}))),
}
"""Name of a hook -> what it belongs to, and what that does."""
HARMLESS = (
    "layerwise_casting",
    "peft_autocast_disable",
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "sea_cache_post_norm",
    "cp_",
    "tp_",
)
"""How the names of hooks begin that change nothing here."""


def foreign_parts(denoisers: Mapping[str, nn.Module]) -> tuple[Part, ...]:
    """What lies on these denoisers that is not ours; each says how it is taken off."""
    found: dict[str, Part] = {}
    for model, denoiser in denoisers.items():
        for name in _hooks(root_of(denoiser)):
            if name in CACHES:
                title, effects = CACHES[name]
                found[title] = Part(f"diffusers' {title} (pipe.{model}.disable_cache() takes it off)", effects)
            elif not name.startswith(HARMLESS):
                found[name] = Part(f"the hook {name!r} on pipe.{model}", Effects(), unknown=True)
    return tuple(found.values())


def _hooks(root: nn.Module) -> Iterator[str]:
    """Names of all hooks in a model. By hand: ``modules()`` takes several times as long, and this is asked at every run."""
    todo: list[Any] = [root]
    while todo:
        inside = todo.pop().__dict__
        if (registry := inside.get("_diffusers_hook")) is not None:
            yield from registry.hooks
        todo += [module for module in inside["_modules"].values() if module is not None]
