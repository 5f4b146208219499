"""The ``guide`` point: a step's raw predictions, branch by branch, in the layout of the pipeline's own combination of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.calls import DenoiseCall, GuideCall, StepCall


def guided(chain: Callable[[Any], Any], step: StepCall, asked: DenoiseCall, predictions: Mapping[str, Tensor]) -> StepCall:
    """The step with what the onion ``chain`` makes of the branches.

    Args:
        asked: the step's last denoiser call.
        predictions: by branch, as the denoiser gave them.
    """
    run, family, combined = step.run, step.family, step.model_output
    rows = next(iter(predictions.values())).shape[0]
    call = GuideCall(run, None, {}, (), {})  # type: ignore[arg-type]
    call.combined = combined[:rows] if family.guidance.doubled else combined
    call.branches = {name: to_combined_layout(x, call.combined, asked) for name, x in predictions.items()}
    call.scale = run.guidance_scale(asked.model_name)
    result = chain(call)
    if result is call.combined:
        return step
    return step.replace(model_output=fill_rows(result.to(combined.dtype), combined.shape[0]))  # type: ignore[no-any-return]


def to_combined_layout(x: Tensor, combined: Tensor, asked: DenoiseCall) -> Tensor:
    """A branch's raw prediction in the layout of the pipeline's combination, as the family says.

    Raises:
        Unsupported: the family does not say it.
    """
    family = asked.family
    how = family.branch_prediction
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
