"""How a tiny pipeline is run: the setting of one case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffgraft.stacks.report import PluginReport

STEPS = 4


PROMPTS = ("a red apple on the left", "two green dogs")


NEGATIVES = ("blurry", "a drawing")


BATCHED_INPUTS = ("prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids", "image_latents")
"""Callback tensors that hold all guidance branches while guidance is on."""


@dataclass(frozen=True)
class Setting:
    """How one call is made; hashable, so that its baseline is computed once.

    changes    call arguments on top of the tiny pipeline's own
    samples    which samples the batch holds: sample i has its own prompt and its own seed
    scheduler  short name from :data:`SCHEDULERS`, or None for the pipeline's own
    distinct   make repeated timesteps differ by one rounding unit
    cut        step after which guidance is cut off, or None
    processors whether every attention processor is wrapped by a foreign one
    ip_adapter whether an IP-Adapter with random weights is loaded and used
    lora       whether a LoRA with random weights is on the denoiser
    """

    changes: tuple[tuple[str, Any], ...] = ()
    samples: tuple[int, ...] = (0,)
    scheduler: str | None = None
    distinct: bool = False
    cut: int | None = None
    processors: bool = False
    ip_adapter: bool = False
    lora: bool = False

    def but(self, **changes: Any) -> Setting:
        """The same with these call arguments."""
        return replace(self, changes=tuple(sorted({**dict(self.changes), **changes}.items())))


USUAL = Setting()


def under(scheduler: str) -> Setting:
    """A shorter call under another scheduler: three steps, which a second-order one makes in five."""
    return Setting(changes=(("num_inference_steps", 3),), scheduler=scheduler)


ANOTHER = Setting(samples=(1,))
"""Another prompt and seed: what a run before leaves behind must not look like what the next run computes."""


@dataclass(frozen=True)
class Outcome:
    """An attached plugin's run: what came out, its report, and how much the denoiser really computed."""

    output: Tensor
    report: PluginReport
    work: int
    leaves: int
