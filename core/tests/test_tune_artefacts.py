"""Artefacts that a tuning makes for plugins which need one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffgraft import load_pipeline
from diffgraft.lab.tune.goal import Goal
from diffgraft.lab.tune.tuner import Tuner
from diffgraft.methods.inputs import make_pictures
from tuning import CALL, SAMPLES, SETTINGS, Gain, Meter, run

pytestmark = pytest.mark.usefixtures("no_collection")


def test_artefacts_are_made_once_and_kept(pipe, tmp_path, monkeypatch):
    Meter.asked.clear()
    monkeypatch.setattr(Tuner, "timed", lambda tuner, candidate, sample: (0.5 if candidate.plugins else 1.0, []))
    made = run(pipe, tmp_path / "out", [Gain()], replace(SETTINGS, goal=Goal("psnr", 99), trials=99))
    assert all(trial.reason is None for trial in made.trials)
    assert sorted(Meter.asked) == [(steps, 1.0) for steps in (1, 2, 3, 4) for _ in SETTINGS.samples]
    knobs = made.best.candidate.plugins["gain"]
    assert knobs == {"gain": 1.0, "artefact": str(tmp_path / "out" / "gain-4.safetensors")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gain-4.safetensors", "tune.json"]
    load_pipeline(pipe, [Gain(**knobs)])
    try:
        make_pictures(pipe, SAMPLES[:1], replace(CALL, steps=4))
    finally:
        pipe.plugins.clear()


def test_an_artefact_that_takes_too_much_of_the_budget_is_not_made(pipe, tmp_path, clock, monkeypatch):
    monkeypatch.setattr("diffgraft.lab.tune.tuner.CALIBRATION_SHARE", 0.0)
    Meter.asked.clear()
    made = run(pipe, tmp_path / "out", [Gain()], replace(SETTINGS, trials=99, budget=1e6))
    assert len(Meter.asked) == 4, "the first sample of each number of steps tells"
    assert sum("gain: its artefact takes about" in (trial.reason or "") for trial in made.trials) == 4
    assert not hasattr(pipe, "plugins")
