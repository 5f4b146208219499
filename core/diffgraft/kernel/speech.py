"""How a denoiser is spoken to, where that is not how plugins speak.

A plugin sees a tensor for the noisy sample and one for the prediction, whose sign is that of ``scheduler.step``, and can tell which of the
other arguments hold something for each row. What a family says of its denoiser (``turned``, ``listed``, ``layered``, ``emptied``) is
translated here, at the two ends of the ``denoise`` onion and where a plugin asks a denoiser by itself: both ways are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family

_companions: Any = WeakTensorKeyDictionary()  # by prediction, as long as that lives


def companion_of(call: Any, prediction: Tensor) -> Any:
    """What the denoiser predicted of the companion (the sound) in the forward that gave that very tensor, else in the only one of this
    call; else None."""
    return _companions.get(prediction, call.run.heard[0] if len(call.run.heard) == 1 else None)


def accompanied(prediction: Tensor, companion: Tensor) -> Tensor:
    """``prediction``, made by a plugin itself, with what that says of the companion: an answer that no forward of the call gave, or that
    was made of several, needs it where the family has a ``companion``."""
    _companions[prediction] = companion
    return prediction


def companion_for(call: Any, prediction: Tensor) -> tuple[Tensor]:
    """What goes with the plugins' answer to a ``denoise`` call.

    Raises:
        Unsupported: it is not there for all of the call's rows, so that it would be stale, or another's.
    """
    run, name, found = call.run, call.family.companion, companion_of(call, prediction)
    if found is not None and found.shape[:-1] == call[name].shape[:-1]:
        return (found,)
    by = [run.answers["denoise"]] if "denoise" in run.answers else [each for each in run.entries if "denoise" in each.plugin.points()]
    raise Unsupported(
        f"{', '.join(each.name for each in by)}, denoise hook, step {call.step.index + 1} of {call.step.total}: the answer, after "
        f"{len(run.heard)} forward(s), is of {call.family.sample} alone, and {type(run.pipe).__name__} denoises {name} with it: answer "
        "with what next gave, or with call.accompanied(prediction, companion)"
    )


class Rows(list[Any]):
    """An argument with an entry for each row of the batch, of any length."""


def heard(family: Family, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among these that a plugin sees otherwise than the pipeline gave them."""
    changes: dict[str, Any] = {}
    for name in family.listed:
        if type(value := arguments.get(name)) is list:
            changes[name] = torch.stack(value).squeeze(2) if name == family.sample else Rows(value)
    for name in family.layered:
        if isinstance(value := arguments.get(name), Tensor):
            changes[name] = tuple(value.unbind())
    return changes


def said(family: Family, arguments: Any) -> dict[str, Any]:
    """What the denoiser takes otherwise than plugins have it among these arguments: a sample in a list, a list of its own to empty."""
    changes: dict[str, Any] = {name: list(value) for name in family.emptied if type(value := arguments.get(name)) is list}
    if family.sample in family.listed and isinstance(sample := arguments.get(family.sample), Tensor):
        changes[family.sample] = list(sample.unsqueeze(2).unbind())
    return changes


def prediction_of(family: Family, output: Any) -> Tensor:
    """A denoiser's first output as plugins see it."""
    x: Tensor = torch.stack(output).squeeze(2) if family.sample in family.listed else output
    return -x if family.turned else x


def predicted(family: Family, outputs: Any) -> Tensor:
    """The prediction in all that a denoiser gives, with its companion's where there is one."""
    return accompanied(prediction_of(family, outputs[0]), outputs[1]) if family.companion else prediction_of(family, outputs[0])


def answer(family: Family, prediction: Tensor) -> Any:
    """What the pipeline gets of a prediction: the way back from :func:`prediction_of`."""
    x = -prediction if family.turned else prediction
    return list(x.unsqueeze(2).unbind()) if family.sample in family.listed else x


def forwarded(call: Any, forward: Callable[..., Any]) -> Tensor:
    """The prediction that a denoiser's ``forward`` gives for a ``denoise`` call."""
    changes = said(call.family, call)
    given = call.replace(**changes) if changes else call
    return predicted(call.family, forward(*given.args, **given.kwargs))


def ask(family: Family, model: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
    """The prediction of a family's denoiser for arguments as plugins see them (``DenoiseCall.arguments()``): for one that asks a model
    itself, not by ``next``."""
    given = {**arguments, **said(family, arguments), "return_dict": False}
    return predicted(family, model(**given))
