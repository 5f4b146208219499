"""A denoiser without its LoRA: what the base model says beside what its distilled or tuned version says, with no second copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.slots import Slot, opened


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that carry a LoRA (peft's tuner layers)."""
    return [layer for layer in model.modules() if hasattr(layer, "_disable_adapters") and hasattr(layer, "merged_adapters")]


def ensure_removable(model: nn.Module) -> None:
    """Raises Unsupported where ``model`` has no LoRA, or one that is fused into its weights."""
    layers = adapter_layers(model)
    name = type(model).__name__
    if not layers:
        raise Unsupported(f"this {name} carries no LoRA that could be switched off; load one with pipe.load_lora_weights(...)")
    if any(layer.merged_adapters for layer in layers):
        raise Unsupported(f"the LoRA of this {name} is fused into its weights; pipe.unfuse_lora() first, so that it can be switched off")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run ``model`` as if it had no LoRA; afterwards (also after an exception) every switch is as it was.

    Raises:
        Unsupported: there is no LoRA, or it is fused into the weights.
    """
    ensure_removable(model)
    with opened([switch(layer) for layer in adapter_layers(model) if not layer.disable_adapters]):
        yield


def switch(layer: Any) -> Slot:
    """A slot that shows a layer's adapters as disabled (peft's own setter would also touch ``requires_grad``)."""
    slot = Slot(layer.__dict__, "_disable_adapters", lambda: layer._disable_adapters)
    slot.value = True
    return slot
