"""For plugins that run distilled models: a fixed number of steps, without guidance, and the LoRA that makes the model what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.errors import ConfigError
from diffgraft.methods.adapters import adapter_layers, weighted
from diffgraft.methods.inputs import parameters

if TYPE_CHECKING:
    from diffgraft.kernel.calls import RunCall


def unguided(call: RunCall, otherwise: str) -> RunCall:
    """The call without guidance: a distilled model has its teacher's in it, and more of it oversaturates at twice the cost.

    A scale that is only the pipeline's or a checkpoint's own is switched off, with a note.

    Args:
        otherwise: what to say to have guidance all the same ("guidance='keep'").

    Raises:
        ConfigError: the caller says a scale above 1.
    """
    guidance, takes = call.family.guidance, parameters(call.pipe)
    names = [name for name in (guidance.scale, guidance.second_scale) if name is not None and name in takes]
    if guidance.layout == "none":
        return call
    for name in names:
        scale = call.get(name)
        if name in call.said and isinstance(scale, (int, float)) and scale > 1:
            raise ConfigError(
                f"plugin {call.entry.name!r}: {name} = {scale:g}: a distilled model has its teacher's guidance in it, and more of it "
                f"oversaturates at twice the cost; leave {name} out (1 is none), or say {otherwise}"
            )
    was = call.get(guidance.scale, takes[guidance.scale].default if guidance.scale in takes else None)
    if isinstance(was, (int, float)) and was > 1:
        call.note(f"guidance is off ({guidance.scale} = {was:g} is the pipeline's own)")
    return call.replace(**{name: 1.0 if name == guidance.scale else None for name in names})  # type: ignore[no-any-return]


def in_steps(call: RunCall, steps: int, otherwise: str) -> RunCall:
    """The call in as many steps as a distilled model knows.

    Args:
        otherwise: what to say to have another number all the same.

    Raises:
        ConfigError: the caller says another number.
    """
    said = call.get("num_inference_steps")
    if "num_inference_steps" in call.said and said != steps:
        raise ConfigError(
            f"plugin {call.entry.name!r}: num_inference_steps = {said}, and what was distilled knows {steps}: leave one of them out, "
            f"or say {otherwise}"
        )
    return call.replace(num_inference_steps=steps)  # type: ignore[no-any-return]


def ensure_own_levels(call: RunCall, otherwise: str) -> None:
    """Raises ConfigError where the caller brings a schedule: a distilled model knows its own levels only."""
    if own := [name for name in ("timesteps", "sigmas") if call.get(name) is not None]:
        raise ConfigError(
            f"plugin {call.entry.name!r}: the call says {' and '.join(own)} itself, and what was distilled knows its own levels only; "
            f"leave them out, or say {otherwise}"
        )


@contextmanager
def together(model: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Run ``model`` with these adapters, each at its own scale times a weight, beside those of the user that are on.

    Raises:
        Unsupported: a LoRA is fused into the weights.
    """
    with weighted(model, {**dict.fromkeys(switched_on(model), 1.0), **weights}):
        yield


def switched_on(model: nn.Module) -> list[str]:
    """The adapters that are active on a denoiser."""
    layers: list[Any] = [layer for layer in adapter_layers(root_of(model)) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})
