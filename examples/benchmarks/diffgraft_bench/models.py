"""The pipelines: bundled checkpoints, and layouts of real models with random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffgraft.installed import registry
from diffgraft.installed.specs import build_plugin
from diffgraft.kernel.loading import read_pipeline
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, as_array, call_arguments, parameters
from torch import nn

from . import layouts

ROOT = Path(__file__).parents[3]
CALIBRATION_SEED = 900_000


class Model:
    """A pipeline without plugins, and how it is called."""

    name: str
    steps: int
    pipe: Any
    root = ROOT

    def run(self, call: Callable[..., Any], steps: int | None, numbers: Sequence[int]) -> Any:
        """What ``call`` (the pipeline, or a method on a copy of it) makes of samples ``numbers``."""
        raise NotImplementedError

    def artefact(self, name: str, knobs: Mapping[str, Any], steps: int | None) -> Any:
        """A plugin's artefact, from runs of the plain pipeline that no picture of the comparison shows."""
        raise NotImplementedError

    def half(self) -> Any:
        """A second pipeline of half the width."""
        raise NotImplementedError

    def mag_ratios(self) -> list[float]:
        """MagCache's ratios, from its own calibration in a run of the plain pipeline."""
        raise NotImplementedError


class BundledModel(Model):
    """A bundled checkpoint with its prompts and seeds."""

    def __init__(self, name: str, steps: int, samples: Sequence[Sample], device: str, kept: Path) -> None:
        self.name, self.steps, self.samples, self.kept = name, steps, samples, kept
        self.bundled = registry.find_bundled(name)
        self.pipe = read_pipeline(name).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.settings = CallSettings(guidance_scale=self.bundled.guidance_scale, extra=self.bundled.call)

    def arguments(self, samples: Sequence[Sample], steps: int | None) -> dict[str, Any]:
        return call_arguments(self.pipe, samples, replace(self.settings, steps=steps or self.steps))

    def run(self, call: Callable[..., Any], steps: int | None, numbers: Sequence[int]) -> Any:
        return call(**self.arguments([self.samples[i] for i in numbers], steps))

    def pictures(self, call: Callable[..., Any], steps: int | None, batch: int) -> Pictures:
        """All samples, ``batch`` in a call."""
        numbers = range(len(self.samples))
        parts = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
        return np.concatenate([as_array(self.run(call, steps, part), len(part)) for part in parts])

    def artefact(self, name: str, knobs: Mapping[str, Any], steps: int | None) -> Any:
        """Kept in a file: other processes need the same."""
        from diffgraft.methods.artefacts import Artefact
        from diffgraft.methods.calibration import calibrate

        made = CALIBRATION[name]
        plugin = build_plugin((name, {**knobs, **made["knobs"]}))
        prompts = training_prompts(self.name, made["prompts"])
        samples = [Sample(CALIBRATION_SEED + i, prompt) for i, prompt in enumerate(prompts)]
        settings = replace(self.settings, steps=made["steps"] or steps or self.steps)
        if made["batch"] > 1:
            count = next(name for name in (layouts.PICTURES, layouts.VIDEOS) if name in parameters(self.pipe))
            settings = replace(settings, extra={**settings.extra, count: made["batch"]})
        key = hashlib.sha256(json.dumps([self.name, name, settings.steps, made], default=str).encode()).hexdigest()[:12]
        path = self.kept / f"{self.name}-{name}-{key}.safetensors"
        if not path.exists():
            calibrate(self.pipe, plugin, samples, settings, path)
        return Artefact.load(path, name)

    def mag_ratios(self) -> list[float]:
        return mag_ratios(self, lambda pipe: self.run(pipe, None, [0]))


CALIBRATION: dict[str, dict[str, Any]] = {
    "ertacache": {"knobs": {}, "prompts": 4, "steps": None, "batch": 1},
    "dpm_solver_v3": {"knobs": {"intervals": 25}, "prompts": 4, "steps": 25, "batch": 8},
}
"""How each plugin's artefact is made: as its README does."""


def training_prompts(pipeline: str, count: int) -> list[str]:
    """Captions that the checkpoint was trained on."""
    from diffgraft_checkpoints.emoji import motion, scenes

    module = motion if pipeline == "emoji-wan" else scenes
    trained = module.split()[0]
    return [module.caption(trained[i]) for i in np.random.default_rng(7).choice(len(trained), count, replace=False)]


def mag_ratios(model: Model, run: Callable[[Any], Any]) -> list[float]:
    """MagCache's calibration prints what it found; there is no other way to get at it."""
    import contextlib
    import io
    import re

    import diffusers

    from .methods import own_copy

    pipe = own_copy(model.pipe)
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=model.steps))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(pipe)
    found = re.findall(r"^\[(.+)\]$", printed.getvalue(), re.MULTILINE)
    if not found:
        raise RuntimeError(f"MagCacheConfig(calibrate=True) told no ratios, but {printed.getvalue()!r}")
    return [float(x) for x in found[0].split(",")]


class LayoutModel(Model):
    """A denoiser of a real layout with random weights; only denoising is run."""

    def __init__(
        self, name: str, steps: int, device: str, dtype: torch.dtype, full: bool, batch: int = 1, shape: Mapping[str, Any] | None = None
    ) -> None:
        call = dict(shape or {})
        width = call.pop("channels", 1.0)
        self.name, self.steps, self.made, self.width = name, steps, (device, dtype, full, steps), width
        self.case = layouts.make_case(name, *self.made, width=width, batch=batch, call=call)
        self.pipe = self.case.pipe
        self.scale = ", ".join([self.case.scale, *(f"{key} {value}" for key, value in (shape or {}).items())])

    @cached_property
    def second(self) -> Any:
        return layouts.make_case(self.name, *self.made, width=self.width / 2).pipe

    def half(self) -> Any:
        return self.second

    def run(self, call: Callable[..., Any], steps: int | None, numbers: Sequence[int]) -> Any:
        arguments = {**self.case.arguments, "num_inference_steps": steps or self.steps}
        with torch.no_grad():
            return call(**arguments, generator=torch.Generator().manual_seed(numbers[0]))

    def artefact(self, name: str, knobs: Mapping[str, Any], steps: int | None) -> Any:
        return calibrate_call(self.pipe, build_plugin((name, dict(knobs))), lambda: self.run(self.pipe, steps, [0]))

    def known(self, pipe: Any) -> set[int]:
        """Storages that are there before a run of a copy of the pipeline: weights and inputs."""
        modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        tensors = [t for part in modules for t in (*part.parameters(), *part.buffers())]
        tensors += [value for value in self.case.arguments.values() if torch.is_tensor(value)]
        return {tensor.untyped_storage()._cdata for tensor in tensors}
