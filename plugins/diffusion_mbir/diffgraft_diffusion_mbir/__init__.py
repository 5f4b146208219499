"""DiffusionMBIR: a volume from measurements of its slices, by a 2-D diffusion model (Chung, Ryu, McCann, Klasky, Ye, arXiv 2211.10655).

The slices are the batch of a run. The pipeline denoises them one by one, and after each of its steps one ADMM iteration on the whole
volume draws them to the measurement and, by total variation along z, to each other. Its dual variables live as long as the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.predictions import clean_estimate, is_exploding, known_kind, levels_after, levels_of, prediction_kind
from diffgraft.methods.problems import Problem, ProblemKnob
from diffgraft.methods.restoring import begins_with_its_own, ensure_one_call_a_step, first_guess, latents_of, pixels_of, problem_of
from pydantic import Field
from torch import Tensor

from diffgraft_diffusion_mbir.method import Boundary, admm, consistent, descend, dz, dz_back, largest
from diffgraft_diffusion_mbir.parts import Measured, in_parts, slices_of

__all__ = ["DiffusionMBIR"]
__version__ = "0.1.0"

OWN_SAMPLES = ("last_sample", "cur_sample", "sample")
"""Attributes of schedulers that go on from a sample they have kept, so that an edit of what they gave is lost."""


class DiffusionMBIRConfig(PluginConfig):
    """Knobs of DiffusionMBIR."""

    problem: ProblemKnob = Field(
        None, description="y = A(x) + noise, y[z] of slice z: a Problem, or a dict of operator, y and noise; none: off, bit for bit"
    )
    weight: float = Field(0.001, ge=0, le=1e6, description="lambda: of the total variation along z, over || AT A ||; 0: each slice alone")
    rho: float = Field(0.03, gt=0, le=1e6, description="rho: of ADMM's coupling, over || AT A ||")
    on: Literal["auto", "x0", "xt"] = Field(
        "auto",
        description="what ADMM works on: the denoiser's clean estimate, or the noisy volume (paper; in the unit x0 + sigma eps); auto: "
        "xt on pixels under schedulers of that unit, else x0",
    )
    cg_steps: int = Field(3, ge=1, le=100, description="steps of conjugate gradients in an iteration (official: 1)")
    boundary: Boundary = Field("open", description="behind the last slice: nothing, or the first one again (official code)")
    chunk: int = Field(0, ge=0, le=4096, description="slices that the denoiser, the decoder and A see at once (official: 12); 0: all")
    consistency: bool = Field(True, description="one step x + AT(y - A x) / AT A 1 at the end")


@dataclass
class Volume:
    """Of one run: what was measured, and ADMM's variables d and u in pixels [depth, c, h, w], float32."""

    measured: Measured | None = None
    size: Tensor | None = None
    """|| AT A ||, the unit of lambda and rho."""
    d: Tensor | None = None
    u: Tensor | None = None
    residual: Tensor | None = None
    """Of the volume that the run has ended at: not of a stopped one."""


class DiffusionMBIR(Plugin):
    name = "diffusion_mbir"
    paper = Paper(
        title="Solving 3D Inverse Problems using Pre-trained 2D Diffusion Models",
        arxiv="2211.10655",
        implemented="one ADMM iteration a step with total variation along z and warm duals, on x_t (paper) or on the clean estimate; "
        "slices in parts; the last consistency step",
        omitted="the Langevin corrector, which no pipeline has; total variation within slices (official variants)",
        licence="Apache-2.0; written from the formulas",
    )
    families = ("pixel", "sd", "sdxl", "sd3", "flux", "pixart")
    not_on: ClassVar[dict[str, str]] = begins_with_its_own("DiffusionMBIR")
    Config = DiffusionMBIRConfig
    State = Volume
    neutral: ClassVar[dict[str, Any]] = {"problem": None}
    active: ClassVar[dict[str, Any]] = {"weight": 0.001}
    effects = Effects(edits=frozenset({"latents"}), needs=frozenset({"one_size"}), couples_batch=True)
    needs = (Need("problem", "problem"),)
    config: DiffusionMBIRConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        problem = self.config.problem
        alone = self.config.weight == 0 and isinstance(problem, Problem) and len(problem.shape) == 4
        blocks = frozenset({"all_blocks"} if self.config.chunk else ())  # a cache would hand one part's features to the next
        self.effects = Effects(edits=self.effects.edits, needs=self.effects.needs | blocks, couples_batch=not alone)

    def check(self, target: Target) -> None:
        if self.config.problem is None:
            return
        ensure_decodes(target.pipe, target.family)
        known_kind(target.family, target.pipe.scheduler, self.name)
        problem: Problem = target.given["problem"]
        if not problem.operator.linear:
            raise Unsupported(f"diffusion_mbir: {type(problem.operator).__name__} is not linear, and ADMM needs its adjoint; take red_diff")
        if self.config.on == "xt" and target.family.latents != "pixels":
            raise Unsupported(f"diffusion_mbir: on = 'xt': noisy latents of {type(target.pipe).__name__} are no picture; use on = 'x0'")

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.problem is None:
            return next(call)
        scheduler, name = call.pipe.scheduler, type(call.pipe.scheduler).__name__
        ensure_one_call_a_step(self.name, call.family, scheduler)
        if own := [each for each in OWN_SAMPLES if hasattr(scheduler, each)]:
            raise Unsupported(
                f"diffusion_mbir: {name} goes on from a sample of its own ({own[0]}), so that what ADMM makes of one is lost; use DDIM, "
                "DDPM, Euler, DPMSolverMultistep or FlowMatchEuler"
            )
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        result = next(call)
        if call.shared.residual is not None:
            call.record({"residual": call.shared.residual})
        return result

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.problem is None:
            return next(call)  # type: ignore[no-any-return]
        volume: Volume = call.shared
        if volume.measured is None:
            self._begin(call, volume)
        n = len(call.branches)
        depth, chunk = len(call.sample) // n, self.config.chunk
        if not 0 < chunk < depth:
            return next(call)  # type: ignore[no-any-return]
        parts = [next(slices_of(call, i, i + chunk)).chunk(n) for i in range(0, depth, chunk)]
        return torch.cat([torch.cat([part[branch] for part in parts]) for branch in range(n)])

    def _begin(self, call: DenoiseCall, volume: Volume) -> None:
        """Hold the problem against the run, before anything is computed."""
        problem, depth = problem_of(call, self.name, volumes=True), len(call.latents)
        if len(problem.shape) == 5 and (len(problem.y) != 1 or problem.shape[2] != depth):
            raise ConfigError(
                f"diffusion_mbir: problem is of {len(problem.y)} volume(s) of {problem.shape[2]} slices, and the run makes {depth} "
                "pictures: give one volume of so many"
            )
        volume.measured = measured = Measured(problem, depth, self.config.chunk)
        first_guess(call, problem, self.name, torch.zeros(measured.slice, device=problem.y.device))  # refuses another size
        shape = measured.slice if measured.any else (depth, *measured.slice[1:])
        volume.size = largest(measured.gram, shape, problem.y.device)
        if not measured.together and (self.config.weight == 0 or depth == 1):
            call.note("2-D, each slice by itself: " + ("weight is 0" if self.config.weight == 0 else "one slice has no neighbour"))

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        volume: Volume = call.shared
        if volume.measured is None:
            return out
        sample, x0, a = out.sample.float(), out.x0, levels_after(call).a
        if self._on(call) == "xt":  # in the paper's unit, x0 + sigma eps
            sample = sample + a * self._changed(call, sample / a, volume, self._iterate)
        else:
            if x0 is None:
                kind = prediction_kind(call.family, call.scheduler)
                x0 = clean_estimate(call.sample.float(), call.model_output.float(), levels_of(call), kind)
            change = self._changed(call, x0.float(), volume, self._iterate)
            x0 = (x0.float() + change).to(out.sample.dtype)
            sample = sample + a * change
        if call.step.ends_schedule:
            if self.config.consistency:
                sample = sample + self._changed(call, sample, volume, self._consistent)
            volume.residual = volume.measured.residual(in_parts(lambda z: pixels_of(call, z), sample, self.config.chunk))
        return StepOutput(sample.to(out.sample.dtype), x0)

    def _on(self, call: StepCall) -> str:
        if self.config.on != "auto":
            return self.config.on
        return "xt" if call.family.latents == "pixels" and is_exploding(call.scheduler) else "x0"

    def _changed(self, call: StepCall, z: Tensor, volume: Volume, change: Callable[[Volume, Tensor], Tensor]) -> Tensor:
        """What is to be added to z for ``change`` to happen to its pixels. Through an autoencoder a difference of two encodings: what it
        loses of a picture is in both, and no change is none bit for bit."""
        chunk = self.config.chunk
        with torch.no_grad():
            x = in_parts(lambda part: pixels_of(call, part), z, chunk)
            new = change(volume, x)
            if call.family.latents == "pixels":
                return new - x
            encoded, before = (in_parts(lambda part: latents_of(call, part), each, chunk) for each in (new, x))
            return encoded - before

    def _iterate(self, volume: Volume, x: Tensor) -> Tensor:
        """One ADMM iteration; without total variation, steps on AT A x = AT y, each slice by itself."""
        measured, k = volume.measured, self.config
        assert measured is not None
        assert volume.size is not None
        if k.weight == 0:
            return descend(measured.gram, measured.back, x, k.cg_steps, apart=not measured.together)
        if volume.d is None or volume.u is None:
            volume.d, volume.u = torch.zeros_like(x), torch.zeros_like(x)
        lam, rho = k.weight * volume.size, k.rho * volume.size
        D, DT = partial(dz, boundary=k.boundary), partial(dz_back, boundary=k.boundary)
        x, volume.d, volume.u = admm(x, volume.d, volume.u, measured.gram, measured.back, D, DT, lam, rho, k.cg_steps)
        return x

    @staticmethod
    def _consistent(volume: Volume, x: Tensor) -> Tensor:
        measured = volume.measured
        assert measured is not None
        return consistent(x, measured.gram, measured.back)
