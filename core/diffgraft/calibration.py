"""``calibrate``: run a pipeline over prompts with a plugin's calibrator on it, and write what it found as one artefact.

One record a prompt, kept in ``OUT.partial/`` until all are there: an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgraft.artefacts import Artefact, MadeFor
from diffgraft.errors import ConfigError, Unsupported
from diffgraft.inputs import CallSettings, Sample, call_arguments
from diffgraft.loading import load_pipeline
from diffgraft.plugin import Plugin
from diffgraft.stack import describe, ensure_bare

OnProgress = Callable[[str, int, int], None]


def calibrate(
    pipe: Any,
    plugin: Plugin,
    samples: Sequence[Sample],
    settings: CallSettings,
    out: str | os.PathLike[str],
    *,
    on_progress: OnProgress | None = None,
) -> Artefact:
    """The artefact of ``plugin`` for this pipeline, written to ``out``; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        samples: what is run, one at a time.
        settings: steps, guidance scale and size: the artefact fits these only.

    Raises:
        Unsupported: the plugin needs no calibration, or does not work on this pipeline.
        ConfigError: no prompt, or ``out`` holds an unfinished calibration of something else.
    """
    if plugin.calibration is None:
        raise Unsupported(f"{plugin.name} needs no calibration: it has no artefact")
    if not samples:
        raise ConfigError("nothing to calibrate on: give at least one prompt")
    ensure_bare(pipe, "what is measured must be the plain one")
    knobs = {name: getattr(plugin.config, name) for name in plugin.config.model_fields_set}
    calibrator = plugin.calibration(**knobs)
    stack = load_pipeline(pipe, [calibrator]).plugins
    try:
        family = stack.family
        if not family.is_among(plugin.families):
            raise Unsupported(f"{plugin.name} does not work on {stack.base_class.__name__}: it is made for {', '.join(plugin.families)}")
        denoisers = describe(pipe, family).denoisers
        records: list[dict[str, Tensor]] = []
        made_for: MadeFor | None = None
        folder = Path(out).with_name(Path(out).name + ".partial")
        for number, sample in enumerate(samples):
            path = folder / f"{number:05d}.safetensors"
            what = {"knobs": calibrator.config.model_dump(mode="json"), "sample": asdict(sample), "call": plain(settings)}
            digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
            found = resume(path, plugin.name, digest) if path.exists() else None
            if found is None:
                pipe(**call_arguments(pipe, [sample], settings))
                report = stack.report()
                made_for = MadeFor.describe(plugin.name, pipe, denoisers, report.steps, report.shape[1:])
                found = Artefact(made_for, report.plugins[calibrator.name].records, {"digest": digest})
                found.save(path)
            elif made_for is None:
                found.ensure_model(pipe, denoisers)
                made_for = found.made_for
            records.append(found.tensors)
            if on_progress:
                on_progress("calibration", number + 1, len(samples))
        assert made_for is not None
        tensors, facts = calibrator.summarise(records)
        artefact = Artefact(made_for, tensors, {**facts, "prompts": len(samples), "knobs": calibrator.config.model_dump(mode="json")})
        artefact.save(out)
        shutil.rmtree(folder)
        return artefact
    finally:
        stack.clear()


def calibrate_call(pipe: Any, plugin: Plugin, call: Callable[[], Any]) -> Artefact:
    """The artefact that one ``call()`` of ``pipe`` gives: enough for a test or a benchmark on random weights; nothing is written.

    Raises:
        Unsupported: the plugin needs no calibration, or does not work on this pipeline.
    """
    if plugin.calibration is None:
        raise Unsupported(f"{plugin.name} needs no calibration: it has no artefact")
    calibrator = plugin.calibration(**{name: getattr(plugin.config, name) for name in plugin.config.model_fields_set})
    stack = load_pipeline(pipe, [calibrator]).plugins
    try:
        call()
        report = stack.report()
        made_for = MadeFor.describe(plugin.name, pipe, describe(pipe, stack.family).denoisers, report.steps, report.shape[1:])
        return Artefact(made_for, *calibrator.summarise([report.plugins[calibrator.name].records]))
    finally:
        stack.clear()


def resume(path: Path, plugin: str, digest: str) -> Artefact:
    """A record of an interrupted calibration.

    Raises:
        ConfigError: it is of another calibration.
    """
    found = Artefact.load(path, plugin)
    if found.facts.get("digest") != digest:
        raise ConfigError(
            f"{path.parent} holds an unfinished calibration with other knobs, prompts or settings: finish that one, delete the folder, "
            "or choose another --out"
        )
    return found


def plain(settings: CallSettings) -> dict[str, Any]:
    """The settings without the picture."""
    return {"steps": settings.steps, "guidance": settings.guidance_scale, "negative": settings.negative_prompt,
            "size": (settings.height, settings.width), "image": settings.image is not None, "extra": dict(settings.extra)}  # fmt: skip
