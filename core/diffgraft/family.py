"""What a pipeline family is: facts as data, no torch, no diffusers.

A :class:`Family` says where the parts of a pipeline are and how they talk to each other, so that a plugin never names a model.
Families are registered through the entry-point group ``diffgraft.families``; a third party adds one as it adds a plugin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one kind, in the order in which the denoiser runs them.

    ``path`` is an attribute of the denoiser: a ``ModuleList`` or a single module (``mid_block``). ``takes`` and ``returns`` name, in order,
    the tensors that flow into and out of a block's ``forward`` (parameter names; the output names of a block that returns a tuple).
    ``layers`` are the ``ModuleList`` attributes *inside* each block (``resnets``, ``attentions``, ``downsamplers``...); each layer is a hookable
    block of its own, of kind ``<kind>.<list name without the final s>`` (``down.resnet``).
    """

    path: str
    kind: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ("hidden_states",)
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """How the pipeline runs classifier-free guidance.

    ``batched``: one denoiser call whose batch holds the branches, in ``order``. ``sequential``: one call per branch, in ``order``.
    ``none``: no guidance at all. ``active`` names the pipeline property that says whether guidance is on *now* (it can be cut in mid-run);
    where a pipeline has none, guidance is on when the call argument ``scale`` is above 1. ``scale`` is the argument's name.
    """

    layout: Literal["batched", "sequential", "none"]
    order: tuple[str, ...] = ("uncond", "cond")
    scale: str = "guidance_scale"
    active: str | None = None


@dataclass(frozen=True)
class Family:
    """Pipelines with one layout.

    name          short lower-case name ("sd", "flux")
    pipelines     exact diffusers class names covered
    denoisers     attributes of the pipeline that hold the denoiser(s), first = high noise (("transformer", "transformer_2") for Wan 2.2)
    kind          "unet" (has skip connections and a mid block) or "dit"
    blocks        block groups in running order
    guidance      see :class:`Guidance`
    sample        parameter of the denoiser's ``forward`` that takes the noisy sample
    timestep      parameter that takes the timestep
    timestep_scale  what the pipeline multiplies the scheduler's timestep with before it hands it to the denoiser (Flux: 1/1000)
    conditioning  parameters that take text or class conditioning
    prediction    "scheduler" (``scheduler.config.prediction_type`` says: epsilon, v_prediction, sample) or "flow"
    latents       layout of the sample given to ``scheduler.step``: "bchw", "bcfhw", "bfchw", "packed" (tokens) or "pixels"
    branch_prediction  what the pipeline does to a branch's raw denoiser output before it reaches the layout of ``model_output``:
                  "same"; "drop_sigma" (second half of the channel axis is a learned variance); "first_tokens" (keep as many tokens as the sample has)
    tiny          "module:function" of a seeded random tiny pipeline, ``function(class_name, seed) -> Tiny``, for tests
    """

    name: str
    pipelines: tuple[str, ...]
    denoisers: tuple[str, ...]
    kind: Literal["unet", "dit"]
    blocks: tuple[BlockGroup, ...]
    guidance: Guidance
    sample: str = "hidden_states"
    timestep: str = "timestep"
    timestep_scale: float = 1.0
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    prediction: Literal["scheduler", "flow"] = "scheduler"
    latents: Literal["bchw", "bcfhw", "bfchw", "packed", "pixels"] = "bchw"
    branch_prediction: Literal["same", "drop_sigma", "first_tokens"] = "same"
    tiny: str | None = None


@dataclass
class Tiny:
    """A tiny seeded random pipeline and how to call it (``pipe(**kwargs)``; ``pipe(**kwargs, **steps(n))``)."""

    pipe: object
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundled:
    """A small real checkpoint that ships with a package (entry-point group ``diffgraft.pipelines``).

    ``path`` a standard diffusers folder; ``prompts`` good example prompts; ``judge`` "module:function" returning an object with
    ``score(images, prompts) -> dict[str, list[bool | None]]`` (one verdict an image for each thing the prompt asks for), or None.
    """

    name: str
    path: str
    prompts: tuple[str, ...] = ()
    judge: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
