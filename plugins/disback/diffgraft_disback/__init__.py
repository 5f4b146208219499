"""DisBack (Zhang, Yang, Li, Zhao, Meng, Yang, Yang, Yang, Sun, arXiv 2408.15991): a picture in one denoiser call, x_0 = (x - s eps) / a.

What makes a model draw in one step is brought along: the published U-Net of Stable Diffusion XL, or a LoRA that `diffgraft fit disback`
has learned by going back along the teacher's path of degradation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from diffgraft import DenoiseCall, Effects, Family, ModulesCall, Need, Paper, Plugin, PluginConfig, RunCall, Target, Unsupported
from diffgraft.methods.adapters import adapter_layers, beside
from diffgraft.methods.distilled import ensure_own_levels, in_steps, unguided
from diffgraft.methods.predictions import known_kind
from diffgraft.methods.published import Weights
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_disback.fitting import DisBackFitter
from diffgraft_disback.scheduler import OneStepScheduler, one_step
from diffgraft_disback.weights import LAYOUT, filled, misfits

__all__ = ["DisBack", "OneStepScheduler"]
__version__ = "0.1.0"

PUBLISHED = 399
"""Training timestep of the published student."""
OTHERWISE = "strict=False to have it done in one step all the same"


class DisBackConfig(PluginConfig):
    """Knobs of DisBack."""

    one_step: bool = Field(True, description="draw in one step; false is off, bit for bit")
    lora: str | Path | dict[str, Any] | None = Field(None, description="a student that `diffgraft fit disback` learned on this model")
    weights: str | Path | list[str | Path] | Weights | None = Field(
        None, description="the published student of SDXL, a whole U-Net: a file, or 'SYZhang0805/DisBack/SDXL_DisBack.bin' on the Hub"
    )
    timestep: int | None = Field(
        None, ge=0, description="t: training timestep of the one step; none: 399 with `weights`, as published, else the model's last"
    )
    strict: bool = Field(
        True, description="refuse calls that ask for more steps or guidance; false: they get one step all the same, guided as they say"
    )

    @model_validator(mode="after")
    def _one_student(self) -> Self:  # before anything is fetched
        if self.lora is not None and self.weights is not None:
            raise ValueError("lora and weights both say a student; give one of them")
        return self


class DisBack(Plugin):
    name = "disback"
    paper = Paper(
        title="Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion Distillation",
        arxiv="2408.15991",
        implemented="one-step sampling with the published SDXL student or a LoRA of one's own; both stages of the distillation as "
        "`diffgraft fit`: recording the teacher's degradation path, and going back along it",
        omitted="full fine-tuning (a LoRA is learned), the GAN loss of the official text-to-image run, pixel-space EDM models",
        licence="official code MIT; written from the paper's description",
    )
    families = ("sd", "sdxl")
    not_on: ClassVar[dict[str, str]] = dict.fromkeys(
        ("*Img2Img*", "*Depth2Img*", "*Inpaint*", "*InstructPix2Pix*"), "its one step begins in pure noise, and not with a picture"
    )
    Config = DisBackConfig
    neutral: ClassVar[dict[str, Any]] = {"one_step": False}
    active: ClassVar[dict[str, Any]] = {"one_step": True, "strict": False}  # any number of steps, any call
    scheduler = OneStepScheduler
    effects = Effects(replaces=frozenset({"scheduler"}), edits=frozenset({"weights", "schedule"}), needs=frozenset({"calibrated_run"}))
    needs = (Need("adapter", "lora"), Need("weights", "weights", holds=LAYOUT))
    fitting = DisBackFitter
    config: DisBackConfig

    def check(self, target: Target) -> None:
        weights = target.given.get("weights")
        if weights is None or not self.config.one_step:
            return
        model, name = target.denoisers["unet"], type(target.pipe).__name__
        if adapter_layers(model):
            raise Unsupported("disback: a LoRA lies on the U-Net that the weights would take the place of; load it after the plugin")
        if wrong := misfits(weights.tensors, model):
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise Unsupported(
                f"disback: weights = {weights.source} are of another U-Net than that of this {name}: {'; '.join(wrong[:3])}{more}"
            )

    def modules(self, call: ModulesCall, next: Any) -> None:
        weights = call.given("weights")
        if weights is not None and self.config.one_step:
            model = call.denoisers["unet"]
            for part, module in filled(model, weights.tensors).named_children():
                if any(True for _ in module.parameters()):
                    call.swap(model, part, module)
        next(call)

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if not self.config.one_step:
            return None
        kind, last = known_kind(family, old), old.config.get("num_train_timesteps", 1000) - 1
        usual = last if self.config.weights is None else min(PUBLISHED, last)
        return one_step(old, kind, usual if self.config.timestep is None else self.config.timestep)

    def run(self, call: RunCall, next: Any) -> Any:
        if not self.config.one_step:
            return next(call)
        if self.config.lora is None and self.config.weights is None:
            call.note("no student is given (lora, weights): this is the one-step estimate of the model as it is")
        if self.config.strict:
            ensure_own_levels(call, "timestep= for this plugin")
            return next(unguided(in_steps(call, 1, OTHERWISE), OTHERWISE))
        call.note("one step, whatever the call says (strict=False)")
        own = {name: None for name in ("timesteps", "sigmas") if call.get(name) is not None}
        return next(call.replace(num_inference_steps=1, **own))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        lora = call.given("lora")
        if lora is None or not self.config.one_step:
            return next(call)  # type: ignore[no-any-return]
        with beside(call.model, {lora.name: 1.0}):
            return next(call)  # type: ignore[no-any-return]
