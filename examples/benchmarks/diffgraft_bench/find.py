"""The time steps that the cases name: searched for once, and kept with the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffgraft.installed.registry import find_bundled
from diffgraft.installed.specs import build_plugin
from diffgraft.methods.fitness import TrajectoryFitness
from diffgraft.methods.inputs import Sample
from diffgraft.methods.search import Plan, search

from .cases import FOUND, SCHEDULERS, SEARCHED
from .methods import kind_of, made_scheduler
from .models import CALIBRATION_SEED, ROOT, BundledModel, training_prompts

PLAN = Plan(population=12, top=3, mutations=10, crossovers=2, epochs=18)
KNOBS = {"radius": 60, "mutation": 0.5, "first_mutation": 0.5}
PROMPTS, REFERENCE_STEPS = 8, 100


def find(pipeline: str, device: str, say: Callable[[str], None]) -> None:
    """Search what is missing for one pipeline: mean squared error of the latents to the plain pipeline's with many steps, on captions of
    the training set and noises that no picture of the comparison has."""
    on, numbers = SEARCHED[pipeline]
    model = BundledModel(pipeline, find_bundled(pipeline).steps, [], device, Path())
    samples = [Sample(CALIBRATION_SEED + i, prompt) for i, prompt in enumerate(training_prompts(pipeline, PROMPTS))]
    model.pipe.scheduler = made_scheduler(model.pipe, *SCHEDULERS[kind_of(model.pipe), on])
    for steps in numbers:
        path = ROOT / FOUND.format(pipeline=pipeline, on=on, steps=steps)
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        fitness = TrajectoryFitness(REFERENCE_STEPS)
        settings = replace(model.settings, steps=steps)
        found = search(
            model.pipe, build_plugin("autodiffusion"), samples, settings, path, fitness, plan=PLAN, knobs=KNOBS, batch=len(samples)
        )
        told = found.facts["fitness"]
        say(f"{path.name}: {told['loss_of_start']:.4g} -> {told['loss']:.4g} at {found.genome['timesteps']}")
