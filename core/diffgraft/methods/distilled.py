"""For plugins that run distilled models: a fixed number of steps, without guidance, on their own levels.

The LoRA that makes a model what it is lies ``beside`` those of the user (`diffgraft.methods.adapters`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffgraft.installed.errors import ConfigError
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
