"""DPM-OT (Li, Li, Wang, Lei, Luo, Gu, arXiv 2307.11308): a run begins at the optimal transport image of its noise, at level m.

The images are training pictures, noised once: the map says which of them a noise is sent to. What is left of the schedule, a few steps,
is the pipeline's own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffgraft import (
    ArtefactMismatch,
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    Target,
    Unsupported,
)
from diffgraft.methods.artefacts import Artefact, make_again
from diffgraft.methods.starts import begins_at, cut, is_first, unit_noise
from torch import Tensor

from diffgraft_dpm_ot.fitter import MapFitter, ensure_level
from diffgraft_dpm_ot.knobs import ANY, HOLDS, PAPER, DpmOtConfig, poor
from diffgraft_dpm_ot.method import cell_of, source_of, values

__all__ = ["DpmOt"]
__version__ = "0.1.0"

SAME = 1e-2
"""Timesteps that differ by less are of one level: some schedulers compute them in single precision."""


class DpmOt(Plugin):
    name = "dpm_ot"
    paper = PAPER
    families = ("pixel", "dit")
    not_on: ClassVar[dict[str, str]] = {"PNDMPipeline": "its scheduler follows no schedule but its own, so no run begins late"}
    Config = DpmOtConfig
    neutral: ClassVar[dict[str, Any]] = {"start": None}
    active: ClassVar[dict[str, Any]] = {"start": 400.0}
    effects = Effects(edits=frozenset({"latents", "schedule"}))
    needs = (Need("fit", "artefact", fits=frozenset({"scheduler", "shape"}), holds=HOLDS),)
    fitting = MapFitter
    config: DpmOtConfig

    def check(self, target: Target) -> None:
        found: Artefact | None = target.given.get("artefact")
        knobs = self.config
        if knobs.start is None:
            return
        ensure_level(target.pipe.scheduler, knobs.start)
        if found is None:
            return
        for key in ("start", "source"):
            if (made := found.facts[key]) != (asked := getattr(knobs, key)):
                raise ArtefactMismatch(
                    f"dpm_ot: the map {found.path or '(in memory)'} was fitted with {key} = {made}, and {key} = {asked} is asked for; say "
                    f"{key} = {made}, or {make_again(self.name, 'fit')}"
                )

    def run(self, call: RunCall, next: Any) -> Any:
        found, start = self.map(call), self.config.start
        if found is None:
            if start is not None and start < int(call.pipe.scheduler.config.get("num_train_timesteps", 1000)):
                raise ConfigError(
                    f"plugin 'dpm_ot': start = {start:g} and artefact = None: noise is no sample of that level, so no run begins there; "
                    f"{make_again(self.name, 'fit')}, or take start = None, which is off"
                )
            call.note(f"inactive: {'start is None' if start is None else 'no map is given, and start is the whole schedule'}")
            return next(call)
        labels, asked = found.tensors["labels"], call.get("class_labels")
        ensure_classes(labels, asked)
        call.note(f"begins with noised training pictures: {held(labels, asked)}, and a sampler without noise makes no more")
        if found.facts["off"] is None:
            call.note("the map is an example: its targets are no pictures")
        elif wrong := poor(found.facts):
            call.note(wrong)
        return next(call)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        found = self.map(call)
        if found is None:
            return own
        assert self.config.start is not None
        times, level = own.timesteps.tolist(), found.facts["timestep"]  # once a run
        begin = begins_at(call.scheduler, times, self.config.start)
        if begin is None or not abs(times[begin] - level) < SAME:
            where = f"would begin at {times[begin]:g}" if begin is not None else f"ends at {times[-1]:g}"
            raise ArtefactMismatch(
                f"dpm_ot: the targets are of timestep {level:g}, and this run {where}; the map was fitted for "
                f"num_inference_steps={found.facts['steps']} of the plain schedule: take that, and no plugin that changes it, or "
                f"{make_again(self.name, 'fit')}"
            )
        return cut(call, own, self.config.start)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if call.step.call == 0 and self.map(call) is not None:
            call = call.with_latents(self.start(call) if is_first(call) else call.latents)
        return next(call)  # type: ignore[no-any-return]

    def map(self, call: Any) -> Artefact | None:
        """What a run was given; None where nothing is to be done."""
        return None if self.config.start is None else call.given("artefact")

    def start(self, call: DenoiseCall) -> Tensor:
        """T(x): a target for each sample, in the pipeline's layout and dtype."""
        noise, found = unit_noise(call), call.given("artefact").tensors
        if found["targets"].shape[1:] != noise.shape[1:]:
            raise ArtefactMismatch(
                f"dpm_ot: targets of shape {tuple(found['targets'].shape[1:])}, latents of {tuple(noise.shape[1:])}; "
                f"{make_again(self.name, 'fit')}"
            )
        h, y, labels = found["heights"] * found["unit"], found["targets"], found["labels"]
        h, y, labels = (each.to(noise.device, non_blocking=True) for each in (h, y, labels))
        flat = y.flatten(1).float()
        j = cell_of(values(source_of(noise, self.config.source), flat, h), allowed(call, labels) if has_classes(found["labels"]) else None)
        call.count("starts at a training picture", len(j))
        return y[j].to(call.latents.dtype)


def has_classes(labels: Tensor) -> bool:
    """Whether a map's targets belong to classes; of labels on the processor."""
    return bool((labels != ANY).any())  # check: allow host_sync because the labels are on the processor


def allowed(call: DenoiseCall, labels: Tensor) -> Tensor | None:
    """[n, J]: the targets of each sample's class; None where the model has no classes."""
    name = "class_labels"
    return call.only("cond")[name].reshape(-1, 1) == labels if name in call.family.conditioning else None


def held(labels: Tensor, asked: Any) -> str:
    """How many targets a map has for a run, of the classes that it asks for."""
    if asked is None or not has_classes(labels):
        return f"{len(labels)} of them are in the map"
    wanted = torch.as_tensor(asked).reshape(-1).unique().tolist()  # check: allow host_sync because it is read once a run, before it
    counts = {each: int((labels == each).sum()) for each in wanted}
    least = min(counts, key=lambda each: counts[each])
    if len(counts) == 1:
        return f"{counts[least]} of them are in the map for class {least}"
    return f"{sum(counts.values())} of them are in the map for the {len(counts)} classes asked for, {counts[least]} for class {least}"


def ensure_classes(labels: Tensor, asked: Any) -> None:
    """Raises Unsupported for a class without targets."""
    known = set(labels.tolist())
    if asked is not None and has_classes(labels) and (missing := sorted(set(torch.as_tensor(asked).reshape(-1).tolist()) - known)):
        raise Unsupported(
            f"dpm_ot: the map has no target of class {missing[0]}, only of {sorted(known)}: ask for these, or fit it with pictures of that "
            "class"
        )
