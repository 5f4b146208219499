"""The boundary of a hook: what a plugin gives back, and gives on, is held against the point's form, and what goes wrong there is named.

Only shapes, types and rows are looked at: no value is read, so nothing waits for the device. Whether values are finite is looked at
where ``pipe.plugins.check_finite`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from diffgraft.installed.errors import BrokenPlugin, NotFinite
from diffgraft.kernel.calls import Call, GuideCall, Schedule, StepOutput
from diffgraft.kernel.entry import Entry

Form = Callable[[Any, Any], str]
"""(call, result) -> what the result is and should be, or "" where it fits."""


def place(entry: Entry, point: str, call: Call) -> str:
    """``plugin 'deepcache', block hook, step 4 of 50, up_blocks.1``"""
    words = [f"plugin {entry.name!r}", f"{point} hook"]
    if point not in ("run", "schedule"):
        words.append(f"step {call.step.index + 1} of {call.step.total}")
    if (info := getattr(call, "info", None)) is not None:
        words.append(info.path)
    return ", ".join(words)


def ensure_call(given: Any, entry: Entry, point: str, call: Call) -> None:
    """Raises BrokenPlugin when a hook gives something else than a call to ``next``."""
    if given.__class__ is not call.__class__:
        raise BrokenPlugin(
            f"{place(entry, point, call)}: it gave {words(given)} to next, which takes the {type(call).__name__} that the hook got, or "
            "call.replace(...)"
        )


def late(entry: Entry, point: str) -> BrokenPlugin:
    """The error of a ``next`` that was kept."""
    return BrokenPlugin(
        f"plugin {entry.name!r}: the next of its {point} hook was called after that hook had returned; next belongs to one call, keep its "
        "result instead (call.state)"
    )


def remember(call: Call, key: Any, result: Any) -> Any:
    """Note the form of what was really computed; gives ``result`` back."""
    forms = call.run.forms
    if key not in forms:
        forms[key] = result.__class__, len(result) if isinstance(result, tuple) else 0
    return result


def words(value: Any) -> str:
    """A value in a few words: ``a torch.float32 tensor [2, 4, 8, 8]``."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {list(value.shape)}"
    if isinstance(value, tuple) and type(value) is tuple:
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


# the forms, one a point --------------------------------------------------------------------------------------------------------------


def prediction_form(call: Any, result: Any) -> str:
    sample = call.sample
    known = call.run.forms.get((call.model_name, sample.shape))
    if not isinstance(result, Tensor):
        return f"{words(result)}, not a prediction of {sample.shape[0]} rows"
    if known is None and (shape := usual_shape(call)) is not None:
        known = shape, result.dtype
    if known is None:
        fits = result.ndim == sample.ndim and result.shape[0] == sample.shape[0] and result.is_floating_point()
        return "" if fits else f"{words(result)} for {words(sample)}: rows, axes or kind of number differ"
    shape, dtype = known
    if result.shape == shape and result.dtype == dtype and result.is_floating_point() and result.device == sample.device:
        return ""
    return f"{words(result)} on {result.device}, and the denoiser's predictions here are {dtype} tensors {list(shape)} on {sample.device}"


def usual_shape(call: Any) -> torch.Size | None:
    """The shape of a prediction for this call while the denoiser has given none: that of the sample without what was appended to it."""
    family = call.family
    if family.branch_prediction != "same" or family.appended == "tokens":
        return None
    sizes = list(call.sample.shape)
    if family.appended == "channels":
        sizes[family.channel_axis] = min(sizes[family.channel_axis], call.model.config.get("out_channels") or sizes[family.channel_axis])
    return torch.Size(sizes)


def guided_form(call: Any, result: Any) -> str:
    combined = call.combined
    if isinstance(result, Tensor) and result.shape == combined.shape and result.is_floating_point():
        return ""
    return f"{words(result)}, and the pipeline's own combination is {words(combined)}"


def step_form(call: Any, result: Any) -> str:
    if not isinstance(result, StepOutput) or not isinstance(result.sample, Tensor):
        inner = f" of {words(result.sample)}" if isinstance(result, StepOutput) else ""
        return f"{words(result)}{inner}, not a StepOutput of a sample"
    sample, dtype = call.sample, call.run.forms.get("step")
    if result.sample.shape == sample.shape and result.sample.dtype == (dtype or result.sample.dtype) and result.sample.is_floating_point():
        return ""
    return f"the sample {words(result.sample)}, and a {dtype or sample.dtype} tensor {list(sample.shape)} is what the pipeline goes on with"


def schedule_form(call: Any, result: Any) -> str:
    if not isinstance(result, Schedule) or not isinstance(result.timesteps, Tensor):
        return f"{words(result)}, not a Schedule(timesteps, sigmas) of tensors"
    timesteps, sigmas = result
    own = getattr(call.scheduler, "sigmas", None)
    if timesteps.ndim != 1 or not len(timesteps):
        return f"timesteps of the shape {list(timesteps.shape)}: a run needs at least one"
    if (sigmas is None) != (own is None) or not (sigmas is None or isinstance(sigmas, Tensor)):
        return f"{words(sigmas)} for the sigmas, and those of {type(call.scheduler).__name__} are {words(own)}"
    return ""


def stream_form(call: Any, result: Any) -> str:
    """Of a block or an attention layer."""
    info = call.info
    known = call.run.forms.get(info)
    names, name, rows = getattr(info, "returns", ()), getattr(info, "stream", "hidden_states"), getattr(info, "rows", 0)
    if known is None:
        known = (tuple, len(names)) if len(names) > 1 else (None, 0)
    cls, n = known
    if result is None or (cls is not None and not isinstance(result, cls if not issubclass(cls, Tensor) else Tensor)):
        return f"{words(result)}, not {'a ' + cls.__name__ if cls else 'a tensor'}"
    main = result
    if isinstance(result, tuple):
        if n and len(result) != n:
            return f"{words(result)}, and {n} are returned here"
        at = names.index(name) if name in names and len(names) == len(result) else 0
        main = result[at] if result else None
    stream = call.get(name)
    if stream is None and call.args:
        stream = call.args[0]
    if not isinstance(stream, Tensor) or not isinstance(result, (Tensor, tuple)):
        return ""
    if isinstance(main, Tensor) and main.dim() == stream.dim() and main.size(rows) == stream.size(rows) and main.is_floating_point():
        return ""
    return f"{words(main)} for the stream {words(stream)}: rows, axes or kind of number differ"


def control_form(call: Any, result: Any) -> str:
    known = call.run.forms.get(call.model)
    if known is None:
        known = (object, 0) if call.get("return_dict", True) else ((tuple, list), 0)
    cls, n = known
    if result is None or not isinstance(result, cls) or (n and len(result) != n):
        return f"{words(result)}, not what a ControlNet returns{f', a tuple of {n}' if n else ''}"
    return ""


def run_form(call: Any, result: Any) -> str:
    known = call.run.forms.get("run", (BaseOutput, 0))[0]
    return "" if isinstance(result, (tuple, BaseOutput, known)) else f"{words(result)}, not what the pipeline returns"


FORMS: dict[str, Form] = {
    "run": run_form,
    "schedule": schedule_form,
    "control": control_form,
    "denoise": prediction_form,
    "block": stream_form,
    "attention": stream_form,
    "guide": guided_form,
    "step": step_form,
}


# finite values -----------------------------------------------------------------------------------------------------------------------


def is_finite(value: Any, nan_only: bool = False) -> bool:
    """Whether every floating number in nested tensors is finite (``nan_only``: is a number; masks hold -inf). Waits for the device."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return True
        return not bool(value.isnan().any()) if nan_only else bool(torch.isfinite(value).all())
    if isinstance(value, StepOutput):
        return is_finite(value.sample)
    if isinstance(value, dict):
        value = tuple(value.values())
    return all(is_finite(item, nan_only) for item in value) if isinstance(value, (tuple, list)) else True


def ensure_finite_result(result: Any, entry: Entry, point: str, call: Call) -> None:
    """Raises NotFinite for what a hook gave: all that it was given was finite, or it would not have come to this."""
    if not is_finite(result):
        raise NotFinite(f"{place(entry, point, call)}: the first values that are not finite are in what it gave back")


def ensure_finite_given(given: Call, entry: Entry, point: str, call: Call) -> None:
    """Raises NotFinite for what a hook gave on to ``next``."""
    before = call.arguments()
    if changed := [k for k, v in given.arguments().items() if v is not before.get(k) and not is_finite(v, nan_only=True)]:
        raise NotFinite(f"{place(entry, point, call)}: the first values that are not finite are in {', '.join(changed)}, given to next")


def watched(chain: Callable[[Any], Any], point: str, inner: bool) -> Callable[[Any], Any]:
    """``chain`` with a look at what the pipeline itself gives: its arguments at the outer end, its own results at the ``inner`` one."""
    where = {"denoise": "the denoiser", "block": "the block", "attention": "the attention layer", "step": "the scheduler's step"}

    def look(call: Call) -> Any:
        step = "" if point in ("run", "schedule") else f" at step {call.step.index + 1} of {call.step.total}"
        if inner:
            result = chain(call)
            if not is_finite(result):
                raise NotFinite(f"{where.get(point, 'the pipeline')} itself{step}: the first values that are not finite are in its result")
            return result
        given = call.arguments() | ({"combined": call.combined, **call.branches} if isinstance(call, GuideCall) else {})
        if bad := [name for name, value in given.items() if not is_finite(value, nan_only=True)]:
            raise NotFinite(f"the first values that are not finite{step} are in {', '.join(bad)}: no plugin made them, {point} got them so")
        return chain(call)

    return look
