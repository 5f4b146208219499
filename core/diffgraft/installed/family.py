"""What a pipeline family is: facts as data, no torch, no diffusers.

A :class:`Family` says where the parts of a pipeline are and how they talk to each other, so that a plugin never names a model.
Families are registered through the entry-point group ``diffgraft.families``; a third party adds one as it adds a plugin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one kind, in the order in which the denoiser runs them.

    path     an attribute of the denoiser: a ``ModuleList`` or a single module (``mid_block``)
    takes, returns  in order, the tensors that flow into and out of a block's ``forward`` (parameter names; the output names of a block
             that returns a tuple)
    layers   the attributes *inside* each block that hold its layers, each a ``ModuleList`` (``resnets``, ``attentions``...) or a single
             module (``attn1``, ``ffn``); each layer is a hookable block of its own, of kind ``<kind>.<list name without the final s>``
             (``down.resnet``) or ``<kind>.<module name>`` (``block.ffn``)
    joined   where the text's tokens are in the stream of these blocks (``hidden_states``; where they take none, the first that they take):
             "none"; the model has put them "front" of the sample's tokens or "behind" them, which it undoes after the last block; "mixed":
             in front, as many in each row as its own text has, so that rows end differently; "alone": these blocks refine the text, and
             the sample is not in their stream
    rows     the axis of the batch's rows in the stream: 0; 1 where it is [tokens, rows, channels] (ERNIE-Image)

    A group of U-Net blocks is described by its largest block: one without attention lacks the list ``attentions`` (or holds None) and
    takes no ``encoder_hidden_states``. A layer returns a tensor, an attention layer a tuple with that tensor.
    """

    path: str
    kind: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ("hidden_states",)
    layers: tuple[str, ...] = ()
    joined: Literal["none", "front", "behind", "mixed", "alone"] = "none"
    rows: int = 0


@dataclass(frozen=True)
class Guidance:
    """How the pipeline runs classifier-free guidance.

    layout   "batched": one denoiser call whose batch holds the branches, in ``order``; "sequential": one call per branch, in ``order``;
             "none": no guidance at all
    order    the branches: "cond" and "uncond", and those in between, which a pipeline with more than one scale has ("image": of the start
             picture without the text)
    scale    the call argument that holds the guidance scale
    active   the pipeline property that says whether guidance is on *now* (it can be cut in mid-run); where a pipeline has none, guidance
             is on when ``scale`` is above ``off``, one of the arguments named in ``requires``, if any, is given (Flux: no true CFG without
             a negative prompt), and each of ``least`` is at least so much: (call argument, value)
    second_scale  the argument that the second denoiser uses (None given: the same)
    doubled  the pipeline steps the scheduler with one copy of the guided prediction a branch, so ``model_output`` and the sample have as
             many rows as the denoiser's batch (DiT)
    extra    (name, call argument that asks for it) of each further denoiser call that the pipeline may make in a step after that of the
             branches: of the conditional rows alone, for a prediction of another kind (SD3's skip-layer guidance)
    over     what the pipeline adds scale * (cond - uncond) to: "uncond", or "cond", and then its scale is smaller by 1 than that of all
             formulas, which plugins are told, and guidance is off at 0 instead of 1
    optional  of the branches in ``order`` those that run, with guidance or without, only while something is asked for: (branch, the
             pipeline's property that says whether it is on now, or where there is none the call's argument that asks for it by a value)
    bound    while an optional branch runs, the layers tell the branches by their place in the batch (perturbed attention): a plugin cannot
             ask the denoiser for one of them alone
    """

    layout: Literal["batched", "sequential", "none"]
    order: tuple[str, ...] = ("uncond", "cond")
    scale: str = "guidance_scale"
    active: str | None = None
    requires: tuple[str, ...] = ()
    least: tuple[tuple[str, float], ...] = ()
    second_scale: str | None = None
    doubled: bool = False
    extra: tuple[tuple[str, str], ...] = ()
    over: Literal["uncond", "cond"] = "uncond"
    optional: tuple[tuple[str, str], ...] = ()
    bound: bool = False

    @property
    def off(self) -> float:
        """The value of ``scale`` at which guidance does nothing."""
        return 1.0 if self.over == "uncond" else 0.0

    @property
    def usual(self) -> tuple[str, ...]:
        """The branches of guidance alone, in ``order``."""
        return tuple(name for name in self.order if name not in dict(self.optional))

    @property
    def together(self) -> str:
        """What a denoiser call of the usual branches in one batch is called."""
        return self.name_of(self.usual)

    @staticmethod
    def name_of(branches: tuple[str, ...]) -> str:
        """What a denoiser call of these branches is called: "cond", "both" (with "uncond"), "cond+image+uncond"."""
        return "both" if set(branches) == {"cond", "uncond"} else "+".join(branches)


@dataclass(frozen=True)
class Family:
    """Pipelines with one layout.

    name, pipelines  short lower-case name ("sd", "flux"); exact diffusers class names covered
    denoisers     attributes of the pipeline that hold the denoiser(s), first = high noise (("transformer", "transformer_2") for Wan 2.2);
                  a pipeline may hold None there (Wan 2.1 has one transformer)
    kind          "unet" (has skip connections and a mid block) or "dit"
    blocks, guidance  block groups in running order; see :class:`Guidance`
    sample, timestep  parameters of the denoiser's ``forward`` that take the noisy sample and the timestep
    timestep_scale, timestep_offset  the denoiser is told ``timestep_offset + timestep_scale * t`` at the scheduler's time t (Flux:
                  t / 1000; Lumina, whose time runs the other way: 1 - t / 1000); see :meth:`told`
    conditioning  parameters that take text or class conditioning
    prediction    "scheduler" (``scheduler.config.prediction_type`` says: epsilon, v_prediction, sample), "flow", or "consistency" (the
                  scheduler makes the clean sample of it and the noisy one by weights of its own)
    turned        the pipeline turns the sign of the denoiser's output before ``scheduler.step`` gets it. Plugins see it turned already
    listed        arguments of the denoiser that are lists with an entry for each row, whatever its length (Z-Image's texts). Where
                  ``sample`` is one, each entry is [channels, 1, height, width], and so is the output; plugins see tensors
                  [rows, channels, height, width]
    layered       arguments that hold a tensor [layers, rows, ...], one for each of the denoiser's layers (HiDream); plugins see a tuple
    emptied       arguments that are lists, and empty after a forward (the features of an adapter): each forward gets a list of its own
    copied_scheduler  the pipeline steps copies of its scheduler, one for each frame of the latents, which may be at different times: the
                  denoiser's timestep is [rows, frames], and what a plugin makes of the latents, the guidance or the schedule reaches no
                  step
    companion     the parameter that takes a second sample, which the denoiser predicts in its second output and a copy of the scheduler
                  steps at the same times (LTX-2: the sound). Plugins see the first one; see ``DenoiseCall.accompanied``
    companion_scale  the call argument that holds the companion's guidance scale
    latents       layout of the sample given to ``scheduler.step``: "bchw", "bcfhw", "bfchw", "packed" (tokens) or "pixels"
    appended      what the pipeline may put behind the noisy sample for the denoiser, whose sample is then larger than the latents on that
                  axis: "none", "channels" (mask, start picture; on the axis that ``latents`` names c, the last one of packed latents)
                  or "tokens" (reference picture of packed latents, axis 1)
    branch_prediction  what the pipeline does to a branch's raw denoiser output before it reaches the layout of ``model_output``:
                  "same"; "drop_sigma" (a denoiser with twice the channels: the second half is a learned variance, which guidance leaves
                  alone. A scheduler that takes it gets it behind the prediction; plugins see the prediction); "first_tokens" (keep as many
                  tokens as the sample has); "unpacked_tail" (tokens unpacked to bcfhw by the denoiser's ``num_frames``, ``height``,
                  ``width``, without the first frame)
    common        arguments of the denoiser that all rows of a batch share, though their first axis may be as long as the batch (rotary
                  tables, token positions); every other tensor whose first axis is a multiple of the batch holds a part for each row
    one_each      its pipelines take ``num_videos_per_prompt`` and make one all the same
    unit_start    its pipelines hand the noise that they drew to the denoiser as it is, without ``scheduler.init_noise_sigma``
    packages      import packages that diffusers does not bring and without which some of the pipelines die in mid-run: name -> these
                  pipelines. Such a pipeline is refused with the pip line where the package is not installed
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
    timestep_offset: float = 0.0
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    prediction: Literal["scheduler", "flow", "consistency"] = "scheduler"
    turned: bool = False
    listed: tuple[str, ...] = ()
    layered: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    copied_scheduler: bool = False
    companion: str | None = None
    companion_scale: str | None = None
    latents: Literal["bchw", "bcfhw", "bfchw", "packed", "pixels"] = "bchw"
    appended: Literal["none", "channels", "tokens"] = "none"
    branch_prediction: Literal["same", "drop_sigma", "first_tokens", "unpacked_tail"] = "same"
    common: tuple[str, ...] = ()
    one_each: bool = False
    unit_start: bool = False
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    tiny: str | None = None

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the sample given to ``scheduler.step``."""
        return {"packed": -1, "pixels": 1}.get(self.latents, self.latents.find("c"))

    def told(self, t: Any) -> Any:
        """What the denoiser is told at the scheduler's time ``t`` (a number or a tensor)."""
        return t * self.timestep_scale + self.timestep_offset

    def is_among(self, families: Iterable[str]) -> bool:
        """Whether a plugin's ``families`` name it: by name, by kind in the plural ("unets", "dits"; "dit" is a family), or by "*".

        A consistency family is named by its name only: what methods say of the noise or the clean sample in a prediction is not so there.
        """
        wide = set() if self.prediction == "consistency" else {"*", f"{self.kind}s"}
        return bool({self.name, *wide} & set(families))

    def binds(self, needs: Iterable[str], replaces: Iterable[str]) -> bool:
        """Whether layers of these pipelines would not know what a plugin asks of them, or of a denoiser in the place of their own."""
        return self.guidance.bound and ("extra_forwards" in needs or "denoiser" in replaces)

    def lost(self, edits: Iterable[str], points: Iterable[str]) -> list[str]:
        """What of a plugin's edits, in the words of its effects, would reach no step of these pipelines."""
        if not self.copied_scheduler:
            return ["timestep"] if self.companion and "timestep" in edits else []
        return sorted({"latents", "schedule"} & set(edits)) + ["guidance"] * ("guide" in points)


@dataclass
class Tiny:
    """A tiny seeded random pipeline and how to call it (``pipe(**kwargs)``; ``pipe(**kwargs, **steps(n))``)."""

    pipe: object
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundled:
    """A small real checkpoint that ships with a package (entry-point group ``diffgraft.pipelines``).

    path    a standard diffusers folder
    lora    a folder with a LoRA to load onto it (``pytorch_lora_weights.safetensors``) and the ``scheduler`` that it wants, or None
    prompts good example prompts
    judge   "module:function" returning an object with ``score(images, prompts) -> dict[str, list[bool | None]]`` (one verdict an image
            for each thing the prompt asks for; a video is a list of images), or None
    steps, guidance_scale, call  what its calls take where nobody says otherwise (None: the pipeline's own); ``call`` any other argument
            (``num_frames``)
    pictures  arguments that are pictures (``image``) -> their files
    """

    name: str
    path: str
    prompts: tuple[str, ...] = ()
    judge: str | None = None
    steps: int = 50
    guidance_scale: float | None = None
    lora: str | None = None
    call: Mapping[str, object] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """All that its calls take where nobody says otherwise, by the name that the pipeline's call has for it; pictures as paths."""
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"num_inference_steps": self.steps, **guidance, **self.call, **{name: Path(file) for name, file in self.pictures.items()}}
