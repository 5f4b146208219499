"""``calibrate``: run a pipeline over prompts with a plugin's calibrator on it, and write what it found as one artefact.

One record a prompt, kept in ``OUT.partial/`` until all are there: an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgraft.installed.anatomy import Target
from diffgraft.installed.errors import ConfigError
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.given import describe
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffgraft.methods.files import partial_of, work_digest
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments
from diffgraft.methods.named import declared
from diffgraft.methods.watching import Calibrator, made_for, watching

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
    made_by = declared(plugin, "calibration")
    if not samples:
        raise ConfigError("nothing to calibrate on: give at least one prompt")
    ensure_on(plugin)
    calibrator = made_by(**plugin.own_knobs)
    with watching(pipe, plugin, calibrator) as stack:
        target = describe(pipe, stack.family)
        paths: list[Path] = []
        fits: MadeFor | None = None
        folder = partial_of(out)
        for number, sample in enumerate(samples):
            path = folder / f"{number:05d}.safetensors"
            what = {"knobs": calibrator.config.model_dump(mode="json"), "sample": asdict(sample), "call": plain(settings)}
            digest = work_digest(what)
            found = resume(path, plugin.name, digest) if path.exists() else None
            if found is None:
                pipe(**call_arguments(pipe, [sample], settings, several=True))
                fits = made_for(plugin, stack)
                found = Artefact(fits, stack.report().plugins[calibrator.name].records, {"digest": digest})
                found.save(path)
            elif fits is None:
                found.ensure_model(pipe, target.denoisers)
                fits = found.made_for
            paths.append(path)
            if on_progress:
                on_progress("calibration", number + 1, len(samples))
        assert fits is not None
        tensors, facts = summarised(calibrator, Records(paths, plugin.name, on_progress), target)
        artefact = Artefact(fits, tensors, {**facts, "prompts": len(samples), "knobs": calibrator.config.model_dump(mode="json")})
        artefact.save(out)
        shutil.rmtree(folder)
        return artefact


def ensure_on(plugin: Plugin) -> None:
    """Raises ConfigError where the knobs that were said switch the plugin off: it would measure nothing."""
    said = plugin.own_knobs
    if plugin.neutral and all(name in said and said[name] == value for name, value in plugin.neutral.items()):
        off = ", ".join(f"{name} = {value!r}" for name, value in plugin.neutral.items())
        raise ConfigError(f"plugin {plugin.name!r}: {off}: it is off so, and there is nothing to measure; calibrate it with other knobs")


def calibrate_call(pipe: Any, plugin: Plugin, call: Callable[[], Any]) -> Artefact:
    """The artefact that one ``call()`` of ``pipe`` gives: enough for a test or a benchmark on random weights; nothing is written.

    Raises:
        Unsupported: the plugin needs no calibration, or does not work on this pipeline.
    """
    made_by = declared(plugin, "calibration")
    calibrator = made_by(**plugin.own_knobs)
    with watching(pipe, plugin, calibrator) as stack:
        call()
        fits, records = made_for(plugin, stack), stack.report().plugins[calibrator.name].records
        return Artefact(fits, *summarised(calibrator, [records], describe(pipe, stack.family)))


class Records(Sequence[dict[str, Tensor]]):
    """The records of a calibration, each read from its file whenever it is asked for: what they take in memory does not grow with the
    number of prompts.

    ``folder`` holds them until all is done: what a calibrator leaves there, an interrupted calibration finds again. ``on_progress`` is told
    how far a long summary is.
    """

    def __init__(self, paths: Sequence[Path], plugin: str, on_progress: OnProgress | None = None) -> None:
        self._paths, self._plugin, self.on_progress = paths, plugin, on_progress

    @property
    def folder(self) -> Path:
        return self._paths[0].parent

    @property
    def digest(self) -> str:
        """Tells these records from others: of other prompts, knobs or settings, or fewer of them."""
        return work_digest({"records": [Artefact.load(path, self._plugin).facts["digest"] for path in self._paths]})

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Records(self._paths[i], self._plugin, self.on_progress)
        return Artefact.load(self._paths[i], self._plugin).tensors


def summarised(calibrator: Calibrator, records: Sequence[dict[str, Tensor]], target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the calibrator makes of the records; one that takes a second argument gets the pipeline, with its own modules still in it."""
    told = (records, target) if len(inspect.signature(calibrator.summarise).parameters) > 1 else (records,)
    return calibrator.summarise(*told)


def resume(path: Path, plugin: str, digest: str, what: str = "calibration") -> Artefact:
    """A record of an interrupted calibration, or of another long piece of work.

    Raises:
        ConfigError: it is of another one.
    """
    found = Artefact.load(path, plugin)
    if found.facts.get("digest") != digest:
        raise ConfigError(
            f"{path.parent} holds an unfinished {what} with other knobs, prompts or settings: finish that one, delete the folder, "
            "or choose another --out"
        )
    return found


def plain(settings: CallSettings) -> dict[str, Any]:
    """The settings without the picture."""
    return {"steps": settings.steps, "guidance": settings.guidance_scale, "negative": settings.negative_prompt,
            "size": (settings.height, settings.width), "image": settings.image is not None, "extra": dict(settings.extra)}  # fmt: skip
