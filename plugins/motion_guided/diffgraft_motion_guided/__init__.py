"""Motion-guided sampling (Yang, He, Ma, Zhang, arXiv 2312.00853): frames that are made one by one, drawn along the clip's optical flow.

After each of the pipeline's steps the latents of all frames take a step down the gradient of their warping error. The loss is of the
latents themselves: no gradient goes through the denoiser, and the flow is warped once a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, DenoiseCall, Effects, Plugin, RunCall, StepCall, StepOutput, Target, Unsupported
from diffgraft.methods.conditioning import number_of_prompts
from diffgraft.methods.predictions import SignalNoise, levels_after, levels_at, levels_of
from diffgraft.methods.solvers import at_least_float32
from torch import Tensor, nn

from diffgraft_motion_guided.flows import Flows, dis, estimated, opencv, pan, read_clip, resized
from diffgraft_motion_guided.knobs import PAPER, MotionGuidedConfig
from diffgraft_motion_guided.method import Motion, loss_and_gradient, motion_of, occluded, scale_of

__all__ = ["MotionGuided"]
__version__ = "0.1.0"


@dataclass
class Clip:
    """Of one run: the flows that were given or found, what they make of latents of a shape, and L before each guided step [clips]."""

    flows: Flows | None = None
    motions: dict[tuple[int, ...], Motion | None] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)


class MotionGuided(Plugin):
    name = "motion_guided"
    paper = PAPER
    families = ("sd", "sd_edit", "sd_upscale", "sdxl", "sdxl_edit", "sd3", "latent_upscale", "animatediff", "animatediff_xl")
    Config = MotionGuidedConfig
    State = Clip
    neutral: ClassVar[dict[str, Any]] = {"g": 0.0}
    active: ClassVar[dict[str, Any]] = {"flow": (3.0, -2.0)}
    effects = Effects(edits=frozenset({"latents"}), couples_batch=True)
    config: MotionGuidedConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if not self.config.on:
            self.effects = Effects()

    def check(self, target: Target) -> None:
        if not self.config.on:
            return
        if self.config.flow == "dis":
            opencv()
        vae = autoencoder_of(target.pipe)
        if vae is not None and any(isinstance(part, nn.Conv3d) for part in vae.modules()):
            raise Unsupported(
                f"motion_guided: {type(vae).__name__} packs several frames into one latent frame, and no flow leads from one such frame to "
                "the next: use a pipeline whose autoencoder takes frames one by one"
            )

    def run(self, call: RunCall, next: Any) -> Any:
        clip: Clip = call.shared
        clip.__init__()  # type: ignore[misc]  # an outer plugin may run the pipeline several times
        if not self.config.on:
            call.note("inactive: g is 0" if self.config.g == 0 else "inactive: no flow is given; set flow")
            return next(call)
        ensure_goes_on(call.pipe.scheduler)
        arguments = call.arguments()
        if call.family.latents != "bcfhw" and number_of_prompts(arguments) > 1 and (arguments.get("num_images_per_prompt") or 1) > 1:
            raise ConfigError(
                "plugin 'motion_guided': num_images_per_prompt makes several pictures of each prompt next to each other, and the rows of a "
                "batch are a clip's frames in their order here: make one of each, or repeat the list of prompts and set frames"
            )
        clip.flows = self._flows(arguments)
        result = next(call)
        if clip.losses:
            call.record({"loss": torch.stack(clip.losses)})
        return result

    def _flows(self, arguments: dict[str, Any]) -> Flows | None:
        """What is given, or found in the clip; None of a pan, which is written on the latents' grid.

        Raises:
            ConfigError: there is no clip to find it in.
        """
        flow, clip = self.config.flow, self.config.source
        if isinstance(flow, Flows):
            return flow
        if isinstance(flow, tuple):
            return None
        if clip is None:
            name = next((name for name in ("video", "image") if arguments.get(name) is not None), None)
            if name is None:
                raise ConfigError("plugin 'motion_guided': flow is found in a clip, and the call has no video or image: give source")
            try:
                clip = read_clip(arguments[name])
            except ValueError as error:
                raise ConfigError(f"plugin 'motion_guided': flow is found in the call's {name}: {error}; or give source") from None
        if len(clip) < 2:
            raise ConfigError("plugin 'motion_guided': flow is found in a clip, and this one has a single frame; give more, as source")
        return estimated(clip, dis if flow == "dis" else flow)

    # on the latents' grid -------------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.on and not call.shared.motions:
            levels_of(call)  # refuses a scheduler that says none, before anything is computed
            self._motion(call, call.latents)
        return next(call)  # type: ignore[no-any-return]

    def _motion(self, call: Any, x: Tensor) -> Motion | None:
        """What is held against what in latents like ``x``; None of one frame. Made once for each shape.

        Raises:
            ConfigError: the flow is of another number of frames.
        """
        clip: Clip = call.shared
        if (key := tuple(x.shape)) not in clip.motions:
            clip.motions[key] = self._made(call, x, clip.flows)
        return clip.motions[key]

    def _made(self, call: Any, x: Tensor, flows: Flows | None) -> Motion | None:
        knobs = self.config
        there = x.shape[2] if x.ndim == 5 else x.shape[0]
        frames = knobs.frames or (flows.frames if flows else there)
        if (flows and flows.frames != frames) or (x.ndim == 5 and frames != there) or there % frames:
            given = f"flow is of {flows.frames} frames" if flows else "flow is a pan"
            raise ConfigError(
                f"plugin 'motion_guided': {given}, frames = {knobs.frames}, and this run makes {there} frame(s): give a flow between each "
                "two of them, [T - 1, 2, H, W]; a batch of several clips holds a multiple of T"
            )
        if frames == 1:
            call.note("inactive: one frame has no neighbour; ask for a clip's frames in one call")
            return None
        h, w = x.shape[-2:]
        if flows is None:
            factor = pixels_a_latent(call.pipe)
            flows = pan(knobs.flow[0] / factor, knobs.flow[1] / factor, frames - 1, h, w)
        forward, backward = (resized(flow.to(x.device), h, w) for flow in flows)
        return motion_of(forward, backward, occluded(forward, backward, knobs.alpha, knobs.beta), knobs.pairs)

    # the step -------------------------------------------------------------------------------------------------------------------------

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        if not self.config.on or not call.step.ends_step:  # a solver's step in two calls has a state of its own between them
            return out
        motion = self._motion(call, out.sample)
        if motion is None:
            return out
        x, knobs = out.sample, self.config
        z = as_clips(x.to(at_least_float32(x.dtype)), len(motion.source) // 2 + 1)
        loss, gradient = loss_and_gradient(z, motion)
        begin, after = call.start_of(call.step.index), levels_after(call)
        before = levels_at(call.family, call.pipe.scheduler, begin.t, begin.sigma, x.device)
        abar, abar_after = power(before), power(after)
        far = knobs.g * scale_of(knobs.scale_fn, abar, abar_after) * ((1 - abar_after).sqrt() <= knobs.below)
        if knobs.elements is not None:
            far = far * (z[0, 0].numel() / knobs.elements)
        unit = (after.a.square() + after.s.square()).sqrt()  # 1 of a variance-preserving sample, which the paper's is
        call.shared.losses.append(loss / unit)
        call.count("guided steps")
        return StepOutput(as_sample(z - unit * far * gradient, x), out.x0)


def ensure_goes_on(scheduler: Any) -> None:
    """Refuse a scheduler that does not go on from the sample that it is given, or goes the other way.

    Raises:
        Unsupported: with the way out.
    """
    name = type(scheduler).__name__
    kept = hasattr(scheduler, "last_sample") or (hasattr(scheduler, "sample") and getattr(scheduler, "order", 1) == 1)
    if kept or "Inverse" in name:
        why = "goes from the picture to noise" if "Inverse" in name else "goes on from a sample of its own, not from the guided one"
        raise Unsupported(f"motion_guided: {name} {why}; use DDIM, DDPM, Euler, DPMSolverMultistep or FlowMatchEuler")


def power(levels: SignalNoise) -> Tensor:
    """abar: the signal's share of a sample's power."""
    return levels.a.square() / (levels.a.square() + levels.s.square())


def as_clips(x: Tensor, frames: int) -> Tensor:
    """[b, T, c, h, w] of latents [b, c, T, h, w], or of pictures in a batch [b T, c, h, w]."""
    return x.movedim(2, 1) if x.ndim == 5 else x.unflatten(0, (-1, frames))


def as_sample(z: Tensor, like: Tensor) -> Tensor:
    """The way back, in the pipeline's layout and dtype."""
    return (z.movedim(1, 2) if like.ndim == 5 else z.flatten(0, 1)).to(like.dtype)


def autoencoder_of(pipe: Any) -> Any:
    return next((part for name in ("vae", "vqvae") if (part := getattr(pipe, name, None)) is not None), None)


def pixels_a_latent(pipe: Any) -> int:
    """Of the picture's side: 8 of Stable Diffusion, 4 of its upscaler."""
    vae = autoencoder_of(pipe)
    return 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
