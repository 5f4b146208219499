"""Timestep-segment experts (AlignHuman, arXiv 2506.11144): several LoRA, each acting at noise levels of its own.

What a run decides early (layout, motion) and what it decides late (detail, fidelity) are learned by different LoRA, each at the levels of
its own segment alone, and each acts there and nowhere else. Which one acts follows from the level of the latents, never from the number
of the step, so that other schedulers, other numbers of steps and runs that begin in the middle switch at the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import DenoiseCall, Effects, Need, Plugin, Step, Target
from diffgraft.methods.adapters import Adapter, beside
from diffgraft.methods.predictions import levels_at
from torch import Tensor

from diffgraft_segment_lora.fitter import PreferenceFitter
from diffgraft_segment_lora.knobs import PAPER, SegmentLoraConfig
from diffgraft_segment_lora.method import active, normalised

__all__ = ["SegmentLora"]
__version__ = "0.1.0"


@dataclass
class Levels:
    """Of a run (``call.shared``): sigma of each of its calls, with the tensors that it was read from."""

    known: dict[int, tuple[float, tuple[Any, ...]]] = field(default_factory=dict)


class SegmentLora(Plugin):
    name = "segment_lora"
    paper = PAPER
    families = (
        "sd", "sdxl", "sd_edit", "sdxl_edit", "sd3", "flux", "flux_fill", "flux_kontext", "qwen_image", "qwen_image_edit", "wan", "ltx",
        "ltx_image", "cogvideox", "animatediff", "latent_consistency",
    )  # fmt: skip
    Config = SegmentLoraConfig
    State = Levels
    neutral: ClassVar[dict[str, Any]] = {"lora": None}
    active: ClassVar[dict[str, Any]] = {"segments": ((1.0, 0.1),)}
    effects = Effects(edits=frozenset({"weights"}))
    needs = (Need("adapter", "lora"),)
    fitting = PreferenceFitter
    config: SegmentLoraConfig

    def check(self, target: Target) -> None:
        scheduler = target.pipe.scheduler
        if not isinstance(getattr(scheduler, "sigmas", None), Tensor):
            levels_at(target.family, scheduler, torch.tensor(0), None, torch.device("cpu"))  # refuses one that says no levels

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        experts = as_list(call.given("lora"))
        if not experts:
            return next(call)
        weights, shown = self.config.weights or (1.0,) * len(experts), {}
        for k in active(self.level(call), self.config.segments):
            if call.model_name not in experts[k].loras:
                call.note(f"LoRA {k + 1} has nothing for the {call.model_name}, which ran without it in its segment")
            elif weights[k] != 0:
                shown[experts[k].name] = weights[k]
                call.count(f"LoRA {k + 1}")
        if not shown:
            call.count("none")
            return next(call)
        with beside(call.model, shown):
            return next(call)

    def level(self, call: DenoiseCall) -> float:
        """sigma of this call's latents; all levels of the run are read at once, and again only where the schedule was changed since."""
        step, known = call.step, call.shared.known
        if step.call not in known or known[step.call][1] != source(step):
            steps = [call.step_at(ahead) for ahead in range(max(1, step.calls - step.call))]
            first, t = not known, torch.stack([torch.as_tensor(each.t) for each in steps])
            sigmas = [each.sigma for each in steps if each.sigma is not None]
            levels = levels_at(call.family, call.pipe.scheduler, t, torch.stack(sigmas) if sigmas else None, call.sample.device)
            found = normalised(*levels).tolist()  # check: allow host_sync because it is read once a run
            known.update((each.call, (sigma, source(each))) for each, sigma in zip(steps, found, strict=True))
            if first:
                self.tell(call, found)
        return float(known[step.call][0])

    def tell(self, call: DenoiseCall, found: list[float]) -> None:
        """Say in the report which segments no step of the run is in."""
        reached = {k for sigma in found for k in active(sigma, self.config.segments)}
        for k, (start, end) in enumerate(self.config.segments):
            if k not in reached:
                ends = f"{max(found):.3f} to {min(found):.3f}"
                call.note(f"LoRA {k + 1}: no step of this run has sigma in {start:g} to {end:g}; they are from {ends}")


def as_list(given: Any) -> list[Adapter]:
    """The experts, in the order of their segments."""
    return [] if given is None else given if isinstance(given, list) else [given]


def source(step: Step) -> tuple[Any, ...]:
    """What a level was read from, without reading it: where the numbers lie, and how often that place was written to."""
    tensors = [value for value in (step.t, step.sigma) if isinstance(value, Tensor)]
    return tuple((value.data_ptr(), None if value.is_inference() else value._version) for value in tensors)
