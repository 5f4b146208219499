"""Layers that compute in the place of others, and share what those hold."""

from __future__ import annotations

from torch import nn

from diffgraft.installed.errors import Unsupported


def stand_in(new: nn.Module, old: nn.Module) -> None:
    """Let ``new`` share parameters and hooks with ``old``.

    They are the same dictionaries: hooks that were registered before the exchange go on being called, and a parameter that is assigned or a
    hook that is registered while it lasts (``load_state_dict(assign=True)``) stays when it is undone.
    """
    shared = {name: value for name, value in vars(old).items() if name == "_parameters" or "_hooks" in name}
    vars(new).update(shared)
    new.train(old.training)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether something answers in the place of the layer's class: accelerate, layerwise casting, offloading by layers, a user."""
    return "forward" in vars(layer)


def ensure_exchangeable(layer: nn.Module, path: str) -> None:
    """Raises Unsupported where an exchange would drop what was put on a layer."""
    if has_own_forward(layer):
        raise Unsupported(
            f"{path} has a forward of its own (layerwise casting, offloading by layers, accelerate), which a layer in its place would not "
            "have: put the plugin on before that"
        )
