"""Directions in a U-Net's h-space, the output of its mid block, found without labels (arXiv 2303.11073, 2210.10960)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffgraft import BlockCall, BlockInfo, ConfigError, DenoiseCall, Effects, Need, Plugin, Target, Unsupported
from diffgraft.methods.artefacts import Artefact, make_again
from diffgraft.methods.gradients import ensure_differentiable
from diffgraft.methods.predictions import known_kind, levels_after, levels_of
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from diffgraft_hspace_directions.calibration import HOLDS, Measure, difference, directions_of, mid_blocks
from diffgraft_hspace_directions.edit import Edit, MidJacobian, Shared, random_rows, random_unit
from diffgraft_hspace_directions.knobs import PAPER, HSpaceDirectionsConfig, idle_knobs
from diffgraft_hspace_directions.method import direction_level, same_sense, singular_directions, stretch

__all__ = ["HSpaceDirections", "difference"]
__version__ = "0.1.0"


class HSpaceDirections(Plugin):
    name = "hspace_directions"
    paper = PAPER
    families = ("unets",)
    not_on: ClassVar[dict[str, str]] = {
        "StableDiffusionXLAdapterPipeline": "its U-Net adds the adapter's features to h in place, through which no gradient goes"
    }
    Config = HSpaceDirectionsConfig
    State = Shared
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    active: ClassVar[dict[str, Any]] = {"strength": 1.0, "source": "jacobian", "unit": "norm", "iterations": 1}
    effects = Effects(  # check: allow effects because what it draws follows from the knob seed alone, the same in every run
        edits=frozenset({"prediction"}), needs=frozenset({"all_blocks", "extra_forwards", "plain_gradients", "calibrated_run"})
    )
    needs = (Need("artefact", "artefact", holds=HOLDS),)
    calibration = Measure
    config: HSpaceDirectionsConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        config, needs = self.config, {"all_blocks"}
        if config.source == "jacobian":
            needs |= {"extra_forwards", "plain_gradients"}
        if config.mode == "asyrp":
            needs |= {"extra_forwards"}
        if self.of_artefact:
            needs |= {"calibrated_run"}
        self.effects = replace(self.effects, needs=frozenset(needs))

    @property
    def of_artefact(self) -> bool:
        """Whether the direction, or its size, is a calibration's."""
        return self.config.source == "pca" or (self.config.source == "random" and self.config.unit == "own")

    def check(self, target: Target) -> None:
        if self.config.strength == 0:
            return
        if any(not any(block.model == model for block in mid_blocks(target.blocks)) for model in target.denoisers):
            raise Unsupported(
                f"hspace_directions: this {type(target.pipe).__name__} has no mid block, whose output is h-space; it needs a U-Net with one"
            )
        self.ensure_scheduler(target.family, target.pipe.scheduler)
        if self.of_artefact:
            self.ensure_component(target.given.get("artefact"))
        if self.config.source == "given":
            for model in target.denoisers.values():
                self.ensure_channels(model.config.get("block_out_channels"))

    def ensure_channels(self, widths: Sequence[int] | None) -> None:
        """Raises ConfigError where `direction` is of another width than the mid block, which is the last level's."""
        shape = tuple(self.config.direction.shape)
        if widths and shape[-3] != widths[-1]:
            raise ConfigError(
                f"plugin 'hspace_directions': direction of shape {list(shape)}: C = {shape[-3]}, and this U-Net's h has C = {widths[-1]}"
            )

    def ensure_component(self, artefact: Artefact | None) -> None:
        """Raises ConfigError where there is no artefact, or none with such a direction."""
        if artefact is None:
            way = " (or take unit = 'norm')" if self.config.source == "random" else ""
            raise ConfigError(
                f"plugin 'hspace_directions': artefact = None: source = {self.config.source!r} needs one{way}; {make_again(self.name)}"
            )
        K, samples, k = len(artefact.tensors["components"]), artefact.facts["samples"], self.config.component
        if samples < 2:
            raise ConfigError("plugin 'hspace_directions': artefact: one sample has no principal components; calibrate on some hundred")
        if k >= K:
            raise ConfigError(
                f"plugin 'hspace_directions': component = {k}: the artefact holds 0 to {K - 1}, of {samples} samples; calibrate on more, "
                f"with -o hspace_directions.components={k + 1} or above"
            )

    def ensure_scheduler(self, family: Any, scheduler: Any) -> None:
        """Raises Unsupported where what was asked for means nothing under this scheduler."""
        if self.config.source == "jacobian" or self.config.mode == "asyrp":
            known_kind(family, scheduler)
        if self.config.mode == "symmetric":
            return
        name = type(scheduler).__name__
        if not isinstance(scheduler, (DDIMScheduler, EulerDiscreteScheduler)):
            raise Unsupported(
                f"hspace_directions: mode = 'asyrp' takes a step apart into P_t and D_t, which is DDIM's and Euler's step and not that of "
                f"{name}; use DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False), or mode = 'symmetric' (where a plugin "
                f"brought this scheduler, only the latter, or without that plugin)"
            )
        if clips := [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]:
            raise Unsupported(
                f"hspace_directions: mode = 'asyrp' and {name} with {clips[0]} = True: P_t would be clipped; use "
                f"{name}.from_config(pipe.scheduler.config, {clips[0]}=False)"
            )

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        return mid_blocks(blocks) if self.config.strength else []

    # a run --------------------------------------------------------------------------------------------------------------------------

    def block(self, call: BlockCall, next: Any) -> Any:
        shared: Shared = call.shared
        if shared.replaced is not None:
            return shared.replaced
        h = next(call)
        if shared.watching:
            shared.h = h
        edit = shared.edit
        if edit is None:
            return h
        if edit.unit is None:
            shape = (h.shape[0] // edit.rows, *h.shape[1:])
            if shared.random is None or shared.random.shape[1:] != shape:
                shared.random = random_unit(shape, self.config.seed).to(h.device, non_blocking=True)
            edit.unit = shared.random
        return edit.on(h)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        config, step, shared = self.config, call.step, call.shared
        if config.strength == 0:
            return next(call)  # type: ignore[no-any-return]
        if step.call == 0:
            self.begin(call)
        inside = config.begin <= step.index / step.total < config.end
        edit = self.edit(call, shared) if inside else None
        if edit is None:
            return next(call)  # type: ignore[no-any-return]
        call.count("edited")
        shared.edit = edit
        try:
            edited: Tensor = next(call)
        finally:
            shared.edit = None
        if step.is_last and len({values.shape for values in shared.values}) == 1:
            call.record({"singular_values": torch.stack(shared.values)})  # [Jacobians, k + 1, B]
        return edited if config.mode == "symmetric" else self.asymmetric(call, edited, next(call))

    def begin(self, call: DenoiseCall) -> None:
        """Raises where this run cannot have what was asked for, before anything is computed."""
        config, total = self.config, call.step.total
        self.ensure_scheduler(call.family, call.pipe.scheduler)
        if config.source == "jacobian":
            ensure_differentiable(call)
        if self.of_artefact:
            self.ensure_component(call.given("artefact"))
        if idle := idle_knobs(config):
            call.note(f"without effect here: {', '.join(idle)} (source = {config.source!r}, unit = {config.unit!r})")
        if not any(config.begin <= i / total < config.end for i in range(total)):
            call.note(f"nothing is edited: no one of {total} steps lies in begin = {config.begin:g} to end = {config.end:g}")

    def asymmetric(self, call: DenoiseCall, edited: Tensor, plain: Tensor) -> Tensor:
        """The one prediction whose step is a' P_t(edited) + d D_t(plain)."""
        now, after = levels_of(call), levels_after(call)
        eta = float(call.run.arguments.get("eta") or 0.0) if isinstance(call.pipe.scheduler, DDIMScheduler) else 0.0
        k = stretch(now.a, now.s, after.a, direction_level(now.a, now.s, after.a, after.s, eta))
        axis, channels = call.family.channel_axis, call.latents.shape[call.family.channel_axis]
        difference = edited.float() - plain.float()
        made = plain.float() + k * difference
        if made.shape[axis] > channels:  # a learned variance is that of the edited pass
            made = torch.cat([made.narrow(axis, 0, channels), edited.narrow(axis, channels, made.shape[axis] - channels).float()], axis)
        return made.to(plain.dtype)

    # the direction of a call --------------------------------------------------------------------------------------------------------

    def edit(self, call: DenoiseCall, shared: Shared) -> Edit | None:
        """What this call's mid block is to add; None where the call has none of the edited branches."""
        config = self.config
        if config.branches == "cond" and "cond" not in call.texts:
            return None
        unit: Tensor | None = None
        size: Tensor | None = None
        if config.source == "jacobian":
            if "cond" not in call.texts:
                return None
            unit, size = self.of_jacobian(call, shared)
        elif config.source != "random" or config.unit == "own":
            units, sizes = shared.units = shared.units or self.directions(call)
            place = min(call.step.call, len(units) - 1)
            unit, size = units[place : place + 1], sizes[place : place + 1]
        return Edit(
            config.strength,
            unit,
            None if config.unit == "norm" else size,
            call.branches,
            len(call.sample),
            config.branches == "cond",
            "direction" if config.source == "given" else "artefact",
        )

    def directions(self, call: DenoiseCall) -> tuple[Tensor, Tensor]:
        """(directions of norm 1 [T, R, C, H, W], sizes [T]) on the device, for all denoiser calls of the run."""
        config, device, calls = self.config, call.sample.device, call.step.calls
        if config.source == "given":
            n = config.direction.float()
            n = n[None, None] if n.ndim == 3 else n[:, None] if n.ndim == 4 else n
            if len(n) not in (1, calls):
                raise ConfigError(
                    f"plugin 'hspace_directions': direction has {len(n)} steps, this run makes {calls}: give one for each, or one for all"
                )
            size = n.flatten(1).norm(dim=1)
            unit = n / size.clamp(min=torch.finfo(size.dtype).tiny).view(-1, 1, 1, 1, 1)
        else:
            unit, size = directions_of(call.given("artefact").tensors, config.component)
            if config.source == "random":
                unit = random_unit(unit.shape[1:], config.seed).expand_as(unit)
        return unit.to(device, non_blocking=True), size.to(device, non_blocking=True)

    def of_jacobian(self, call: DenoiseCall, shared: Shared) -> tuple[Tensor, Tensor]:
        """(v_k [B, R, C, H, W], sigma_k [B]) of the conditional prediction at these latents, or what was found a few steps ago."""
        config, step, k = self.config, call.step, self.config.component
        alone = call.only("cond") if "cond" in call.branches else call
        kept = shared.V is not None and shared.V.shape[1] == len(alone.sample)
        if not (kept and shared.taken <= step.index and (step.stage > 0 or step.index - shared.taken < config.every)):
            J = MidJacobian(alone, shared)
            if k >= (most := min(J.h[0].numel() * J.form_of_h[0], alone.latents[0].numel())):
                raise ConfigError(
                    f"plugin 'hspace_directions': component = {k}: the Jacobian of this picture has singular vectors 0 to {most - 1}"
                )
            before = shared.V if kept and shared.form == J.form_of_h else None
            start = random_rows(k + 1, J.h[0].numel() * J.form_of_h[0], config.seed).to(J.h.device, J.dtype)
            V, sigma = singular_directions(
                J.times, J.transposed, start[:, None].expand(-1, J.samples, -1) if before is None else before, config.iterations
            )
            shared.V, shared.sigma, shared.form, shared.taken = same_sense(V, before), sigma, J.form_of_h, step.index
            shared.values.append(sigma)
            call.count("Jacobians")
        assert shared.V is not None
        assert shared.sigma is not None
        return shared.V[k].float().unflatten(1, shared.form), shared.sigma[k].float()
