"""The ``guide`` point: a step's raw predictions, branch by branch, in the layout of the pipeline's own combination of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.calls import DenoiseCall, GuideCall, RunView, StepCall


def branches_on(run: RunView) -> tuple[str, ...]:
    """The branches that a batch of the pipeline's holds now."""
    guidance, pipe = run.family.guidance, run.pipe
    on = {name: getattr(pipe, said) if hasattr(type(pipe), said) else run.arguments.get(said) for name, said in guidance.optional}
    guided = guidance.layout == "batched" and run.guidance_active()
    return tuple(name for name in guidance.order if on.get(name, guided or name == "cond")) if guided or on else ("cond",)


def ensure_whole(call: DenoiseCall) -> None:
    """Raises Unsupported where the denoiser is asked for other branches than the pipeline's, and its layers would not know them."""
    guidance, run, rows = call.family.guidance, call.run, len(call.sample)
    if guidance.bound and {*run.in_step} - {*guidance.usual} and (call.branches, rows) != (run.in_step, run.rows):
        raise Unsupported(
            f"{rows} rows of {', '.join(call.branches)} were asked of the denoiser, and layers of {type(run.pipe).__name__} tell "
            f"{', '.join(run.in_step)} by their places in a batch of {run.rows}; run it without {guidance.optional[0][0]}"
        )


def without_variance(call: StepCall) -> StepCall:
    """The step as plugins see it: a learned variance behind the prediction comes back where the pipeline's own scheduler steps."""
    whole, inner, channels = call.model_output, call.inner, call.sample.shape[1]
    if call.family.branch_prediction != "drop_sigma" or whole.shape[1] != 2 * channels:
        return call

    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(model_output if call.run.replaced else torch.cat([model_output, whole[:, channels:]], dim=1), *args, **kwargs)

    bare: StepCall = call.replace(model_output=whole[:, :channels])
    bare.inner = step
    return bare


def guided(chain: Callable[[Any], Any], step: StepCall, asked: DenoiseCall, predictions: Mapping[str, Tensor]) -> StepCall:
    """The step with what the onion ``chain`` makes of the branches.

    Args:
        asked: the step's last denoiser call.
        predictions: by branch, as the denoiser gave them.
    """
    run, family, combined = step.run, step.family, step.model_output
    rows = next(iter(predictions.values())).shape[0]
    call = GuideCall(run, None, {}, (), {}, step.branch)  # type: ignore[arg-type]
    call.copy = step.copy
    call.combined = combined[:rows] if family.guidance.doubled else combined
    how = "same" if step.copy else family.branch_prediction
    call.branches = {name: to_combined_layout(x, call.combined, asked, how) for name, x in predictions.items()}
    call.scale = run.guidance_scale(asked.model_name, family.companion_scale if step.copy else None)
    result = chain(call)
    if result is call.combined:
        return step
    return step.replace(model_output=fill_rows(result.to(combined.dtype), combined.shape[0]))  # type: ignore[no-any-return]


def to_combined_layout(x: Tensor, combined: Tensor, asked: DenoiseCall, how: str) -> Tensor:
    """A branch's raw prediction in the layout of the pipeline's combination, as the family says (``how``).

    Raises:
        Unsupported: the family does not say it.
    """
    family = asked.family
    if how == "drop_sigma" and x.shape[1] == 2 * combined.shape[1]:
        x = x.chunk(2, dim=1)[0]
    elif how == "first_tokens" and x.shape[1] > combined.shape[1]:
        x = x[:, : combined.shape[1]]
    elif how == "unpacked_tail" and x.ndim == 3:
        sizes = [asked[name] for name in ("num_frames", "height", "width")]
        x = x.unflatten(1, sizes).movedim(-1, 1)[:, :, 1:]  # tokens -> channels, frames, height, width; the first frame is given
    if x.shape != combined.shape:
        raise Unsupported(
            f"family {family.name!r} does not say how a branch prediction {tuple(x.shape)} becomes the scheduler's "
            f"{tuple(combined.shape)} (branch_prediction={how!r}), so guidance plugins cannot work on it"
        )
    return x.to(combined.dtype)  # some pipelines combine in float32


def fill_rows(x: Tensor, rows: int) -> Tensor:
    """The same rows again and again, up to ``rows``."""
    return x if x.shape[0] == rows else torch.cat([x] * (rows // x.shape[0]))
