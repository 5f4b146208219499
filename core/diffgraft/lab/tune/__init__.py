"""``tune``: the fastest way to a wanted fidelity on one pipeline, over numbers of steps, legal stacks of plugins and their knobs.

A plugin says which values of which knobs are worth trying (``Plugin.tune``); the planner says which stacks are legal. Optuna proposes,
every candidate is timed in turn with the plain pipeline, and all of it lies in ``OUT.partial/`` before the next one begins: proposals are
a function of the seed and of what was measured so far, so that an interrupted run goes on with the same command. What a search finds best
on some prompts was partly luck: in the end its best candidates meet the plain pipeline with fewer steps on prompts that it has not seen.
The engine prints and draws nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffgraft.installed.errors import ConfigError
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.stack import ensure_bare
from diffgraft.lab.compare import quiet
from diffgraft.lab.judging import Judge
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.tune.goal import TuneSettings, Tuning, front_of
from diffgraft.lab.tune.space import ensure_fits
from diffgraft.lab.tune.study import Study
from diffgraft.lab.tune.tuner import Tuner, describe_here
from diffgraft.methods.artefacts import Fingerprint, scheduler_facts
from diffgraft.methods.calibration import OnProgress
from diffgraft.methods.calibration import plain as plain_call
from diffgraft.methods.extras import imported
from diffgraft.methods.files import claim, partial_of, work_digest, write_json
from diffgraft.methods.inputs import CallSettings


def tune(
    pipe: Any,
    plugins: Sequence[Plugin],
    settings: TuneSettings,
    out: str | os.PathLike[str],
    *,
    name: str,
    judge: Judge | None = None,
    left_out: Mapping[str, str] | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    started: float | None = None,
) -> Tuning:
    """Look for the fastest way to ``settings.goal`` and write ``out/tune.json``; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        plugins: the candidates, with the knobs that are fixed.
        name: of the pipeline, as ``load_pipeline`` takes it, for the ready line.
        judge: scores pictures against prompts; needed for the measure "judge".
        left_out: plugins that do not take part, and why: kept in the result.
        command: kept in the file.
        started: ``time.monotonic()`` at which the budget began [default: now].

    Raises:
        Unsupported: Optuna is not installed, or a plugin does not work on this pipeline.
        ConfigError: no judge, pictures too small for SSIM, a setting that the plain pipeline refuses, a budget too short for one stack
            and the shortest end, or ``OUT.partial`` holds an unfinished run of another command.
        Conflict: there are plugins on the pipeline.
    """
    started = time.monotonic() if started is None else started
    optuna = imported("optuna", "`diffgraft tune`")
    environment = {"versions": {**versions(), "optuna": version("optuna")}, **machine(pipe.device), "dtype": str(pipe.dtype)}
    ensure_bare(pipe, "what is tuned starts from the plain pipeline")
    if settings.goal.measure == "judge" and judge is None:
        raise ConfigError(f"target judge={settings.goal.value:g}: {name} brings no judge; take psnr or ssim")
    for plugin in plugins:
        ensure_fits(pipe, plugin)
    folder = partial_of(out)
    claim(folder, "tuning", digest_of(pipe, plugins, settings))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with quiet(pipe):
            tuner = Tuner(pipe, plugins, settings, folder, judge, on_progress or (lambda phase, done, total: None), started)
            study = Study(optuna, folder, tuner.space, settings.seed)
            try:
                exhausted = tuner.search(study)
            finally:
                if not tuner.trials:  # refused before anything was measured: nothing to go on from
                    shutil.rmtree(folder)
            finals, winner = tuner.finish(Path(out), name)
    finally:
        optuna.logging.set_verbosity(before)
    result = Tuning(
        type(pipe).__name__,
        tuner.settings,
        tuner.trials,
        front_of(tuner.trials),
        finals,
        winner,
        dict(left_out or {}),
        environment,
        tuner.spent(),
        exhausted,
    )
    write_json(Path(out) / "tune.json", {"pipeline_name": name, "command": command, **result.to_json()})
    shutil.rmtree(folder)
    return result


def digest_of(pipe: Any, plugins: Sequence[Plugin], settings: TuneSettings) -> str:
    """What must be the same for a run to go on. When to stop is not of it: more time for the same search is no other search."""
    what = {
        "plugins": [(plugin.name, plugin.own_knobs, plugin.tune) for plugin in plugins],
        "settings": asdict(replace(settings, budget=None, trials=1, call=CallSettings())),
        "call": plain_call(settings.call),
        "pipeline": type(pipe).__name__,
        "denoisers": [asdict(Fingerprint.of(model)) for model in describe_here(pipe).denoisers.values()],
        "scheduler": (type(pipe.scheduler).__name__, scheduler_facts(pipe.scheduler)),
    }
    return work_digest(what)
