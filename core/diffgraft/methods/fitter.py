"""What a plugin says about how its numbers are learned; the loop is in `fitting`.

    class HeadFitter(Fitter):
        def build(self, probe):                       # what is learned, before it is
            return Head(probe.target.denoisers["unet"].config.in_channels)

        def loss(self, session, batch):               # [batch]
            x0, text = self.latents(batch), self.conditioning(batch)
            index = int(torch.randint(len(self.probe.timesteps), (), generator=batch.generator))
            ...
            session.at(index)
            prediction = session.model(x, t, **text, return_dict=False)[0]
            return (self.trained(prediction) - target).square().mean((1, 2, 3))

Its plugin declares ``fitting = HeadFitter`` and ``needs = (Need("fit", "artefact"),)``, and builds the same module of the artefact's
tensors: they are ``trained.state_dict()``.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffgraft.installed.anatomy import denoisers_of, root_of
from diffgraft.installed.config import build_config
from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.plugin import Paper, Plugin
from diffgraft.installed.registry import find_family
from diffgraft.kernel.calls import DenoiseCall
from diffgraft.kernel.session import Session
from diffgraft.methods.adapters import adapter_layers
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.conditioning import Listening
from diffgraft.methods.decoding import to_latents
from diffgraft.methods.examples import Example
from diffgraft.methods.extras import imported
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import CallSettings, call_arguments
from diffgraft.methods.search import Probe


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step of a fit learns from.

    step       its number, from 0
    examples   as they were given
    pixels     their pictures [batch, 3, height, width] in -1 to 1, float32, on the pipeline's device; None where there are none
    generator  of this step, on the CPU: every draw comes from it, so that a fit which was interrupted draws the same
    made       what ``rollout`` gave
    """

    step: int
    examples: tuple[Example, ...]
    pixels: Tensor | None
    generator: torch.Generator
    made: Any = None


class Fitter(Plugin):
    """Base of what learns a plugin's artefact by gradient descent. It is a plugin of its own, alone on the pipeline while it learns: hooks
    of the denoiser that it has (``denoise``, ``block``, ``attention``) act in ``session.model``, all in a ``rollout``.

    wants     what it learns from: "pictures", "prompts" (of a pipeline that takes no prompt, classes), both, or nothing
    trains    "modules" of its own; or "denoiser": see :class:`LoraFitter`. The weights of the pipeline never move
    Config    knobs of the fit itself (``diffgraft fit --set``); the plugin with its own is ``self.plugin``
    rate      largest learning rate, of which ``factor`` is taken; a knob of that name sets it, and one called ``rank`` that of a LoRA
    ema       decay a step of the average of the weights that is kept in their place, or 0
    clip      largest norm of a step's gradient, or None

    While it learns there are ``self.probe`` (the pipeline, and the steps of a call), ``self.settings`` of the call, and ``self.trained``.
    Whatever must survive an interruption is in ``trained`` (buffers too) or follows from ``batch.step``.
    """

    name = "fitter"
    paper = Paper("none", "", "learns what a plugin needs")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    sessions = True
    wants: ClassVar[frozenset[str]] = frozenset({"pictures"})
    trains: ClassVar[str] = "modules"
    rate: float = 1e-4
    ema: ClassVar[float] = 0.0
    clip: ClassVar[float | None] = 1.0

    def __init__(self, plugin: Plugin, **knobs: Any) -> None:
        self.plugin = plugin
        self.config = build_config(f"fit of {plugin.name}", self.Config, knobs)
        for name in {"rate", "rank"} & type(self.config).model_fields.keys():
            setattr(self, name, getattr(self.config, name))

    # what an author writes -----------------------------------------------------------------------------------------------------------

    def build(self, probe: Probe) -> nn.Module:
        """What is learned, as it is at first. Draw from torch's own generator: it is seeded. Raise ``Unsupported`` where there is none."""
        raise NotImplementedError

    def loss(self, session: Session, batch: Batch) -> Tensor:
        """One loss an example, [batch]; ``session`` is at the first step of a call's scheduler, and nothing is kept from other steps."""
        raise NotImplementedError

    def rollout(self, pipe: Any, batch: Batch) -> Any:
        """Before each step: what the pipeline makes itself (``pipe(**self.arguments(batch))``), for ``batch.made``."""
        return None

    def factor(self, step: int, steps: int) -> float:
        """Share of the learning rate in a step: a linear warm-up, then half a cosine down to a hundredth."""
        warmup = min(100, steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What moves them; the learning rate is set at every step."""
        return torch.optim.AdamW(parameters, lr=self.rate)

    def facts(self) -> dict[str, Any]:
        """Plain JSON values that the plugin reads beside the tensors."""
        return {}

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        """What it does in the denoiser while it learns; nothing unless it is written anew."""
        return next(call)

    # what it may use -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """The clean latents of the batch's pictures, in the layout of ``scheduler.step``."""
        family = self.probe.target.family
        assert batch.pixels is not None, "wants = {'pictures'}"
        pixels = batch.pixels[:, :, None] if family.latents == "bcfhw" else batch.pixels
        return to_latents(self.probe.target.pipe, family, pixels)

    def conditioning(self, batch: Batch, branch: str = "cond", whole: bool = False) -> Mapping[str, Any]:
        """What the pipeline hands to its denoiser for the batch's prompts (or classes), by the names of the denoiser's arguments.

        Args:
            whole: all of its call, as :meth:`calls` has it of every branch.
        """
        arguments, guidance = self.arguments(batch), self.probe.target.family.guidance
        if branch == "cond" and guidance.layout != "none":
            arguments[guidance.scale] = 1.0  # guidance off: no text is encoded that nobody asks for
        heard = self._listening.conditioning(arguments)
        return (heard.whole if whole else heard.of_branch)[branch]

    def calls(self, batch: Batch) -> Mapping[str, Mapping[str, Any]]:
        """All arguments of the denoiser's calls for the batch's prompts, by branch: with a noisy sample and a timestep, to be exchanged,
        sizes and token positions."""
        return self._listening.conditioning(self.arguments(batch)).whole

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The arguments of a call that makes the batch's prompts: the same each time, and nothing is drawn from ``batch.generator``."""
        seeds = torch.randint(
            2**62, (len(batch.examples),), generator=torch.Generator().manual_seed(batch.generator.initial_seed())
        ).tolist()
        samples = [each.sample(seed) for each, seed in zip(batch.examples, seeds, strict=True)]
        return call_arguments(self.probe.target.pipe, samples, self.settings)

    # what the loop does ---------------------------------------------------------------------------------------------------------------

    def begin(self, probe: Probe, settings: CallSettings) -> None:
        """Learn of the pipeline, and build."""
        self.probe, self.settings = probe, settings
        self._listening = Listening(probe.target.pipe)
        self.trained = self.build(probe)

    @classmethod
    def ensure_writable(cls, pipe: Any) -> None:
        """Raises Unsupported where what is learned on this pipeline could not be written."""

    def suits(self, settings: CallSettings) -> CallSettings:
        """Settings of the calls that the result is for, by those that were said and the plugin's knobs; ConfigError where these differ."""
        return settings

    def ensure_enough(self, pipe: Any, examples: Sequence[Example], rows: Iterable[Sequence[int]]) -> None:
        """Raise ConfigError where the examples do not suffice, before anything is kept; ``rows`` are those that each step will take."""

    @classmethod
    def told(cls, facts: Mapping[str, Any]) -> str | None:
        """How well it went, in a line of ``diffgraft fit``, by the facts of the result; None: its losses say it."""
        return None

    def values(self) -> dict[str, Tensor]:
        """The live tensors that are learned, by name."""
        return dict(self.trained.state_dict(keep_vars=True))

    def to_keep(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of :meth:`values` that the result holds; the others only let a fit go on that was stopped."""
        return values

    def write(self, artefact: Artefact, out: Path) -> None:
        """Write the file: the whole of it, or nothing."""
        for need in self.plugin.needs:
            if need.kind == "fit" and need.holds is not None:
                artefact.ensure_holds(need.holds)
        artefact.save(out)


class LoraFitter(Fitter):
    """Learns a LoRA of the (first) denoiser; the file is one that ``pipe.load_lora_weights`` and ``Need("adapter", ...)`` read.

    It learns on a copy of the denoiser, so the pipeline's own stays as it is; at the moment this takes the memory of a second one.

    rank     of the LoRA; alpha is the same number
    targets  names of the layers that get one
    """

    trains = "denoiser"
    rank: int = 8
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def build(self, probe: Probe) -> nn.Module:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self._attribute, model = next((name, root_of(model)) for name, model in probe.target.denoisers.items())
        try:
            model.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets)), "fit")  # type: ignore[operator]
        except ValueError as error:  # none of the layers is there
            raise ConfigError(f"{self.plugin.name}: no LoRA for this {type(model).__name__}: {error}") from None
        cast_training_params(model)  # what is learned in half precision does not move
        return model

    @classmethod
    def ensure_writable(cls, pipe: Any) -> None:
        imported("peft", "a fit that learns a LoRA")
        if not hasattr(pipe, "save_lora_weights"):
            raise Unsupported(f"what is learned is a LoRA, and {type(pipe).__name__} loads none")
        model = root_of(next(iter(denoisers_of(pipe, find_family(type(pipe))).values())))
        if adapter_layers(model):  # peft would switch it off for the one that is learned, or, where it is off, that one with it
            raise Unsupported(
                f"this {type(model).__name__} has a LoRA already, beside which a fit learns none; to learn for both pipe.fuse_lora() and "
                "then pipe.unload_lora_weights(), to learn without it pipe.unload_lora_weights() alone"
            )

    def values(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.trained.named_parameters() if ".fit." in name}

    def write(self, artefact: Artefact, out: Path) -> None:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.trained, state_dict=artefact.tensors, adapter_name="fit")
        cls, layers = type(self.probe.target.pipe), f"{self._attribute}_lora_layers"
        if layers not in inspect.signature(cls.save_lora_weights).parameters:
            raise Unsupported(f"{cls.__name__} writes no LoRA of its {self._attribute}")
        with tempfile.TemporaryDirectory(prefix="diffgraft-") as folder:
            cls.save_lora_weights(folder, **{layers: state}, weight_name=out.name)
            write_atomic(out, (Path(folder) / out.name).read_bytes())
