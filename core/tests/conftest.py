"""Fixtures that several files of tests share."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from cli_plugins import install
from diffgraft import cli
from diffgraft.installed import registry
from diffgraft.lab.tune.goal import Candidate
from diffgraft.lab.tune.tuner import Tuner
from diffgraft.methods.inputs import Sample
from probes import tiny
from typer.testing import CliRunner
from workshop import Workshop

collect_ignore = [] if all(importlib.util.find_spec(name) for name in ("torchao", "optimum")) else ["test_quantisers.py"]


@pytest.fixture
def sd():
    """(a tiny Stable Diffusion pipeline, arguments of its call)."""
    return tiny("StableDiffusionPipeline")


@pytest.fixture
def workshop(tmp_path):
    before = list(sys.path)
    yield Workshop(tmp_path)
    sys.path[:] = before
    for module in [module for module in sys.modules if module.startswith("diffgraft_chk")]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def pipe():
    made = tiny("StableDiffusionPipeline")[0]
    made(prompt="x", num_inference_steps=1, height=32, width=32)  # diffusers notes things on a pipeline in its first call
    return made


@pytest.fixture
def no_collection(monkeypatch):
    """For tests that measure often."""
    monkeypatch.setattr("diffgraft.lab.tune.tuner.gc.collect", lambda: 0)  # a quarter of a second each with torch in memory


@pytest.fixture
def clock(monkeypatch):
    """Time that follows from the settings: a step takes a second, ``every`` of them for sparse a second together; idle saves a half."""
    asked: list[Candidate] = []

    def timed(tuner: Tuner, candidate: Candidate, sample: Sample) -> tuple[float, list[str]]:
        asked.append(candidate)
        seconds = float(candidate.steps)
        for name, knobs in candidate.plugins.items():
            seconds *= 0.5 if name == "idle" else 1 / knobs.get("every", 1)
        return seconds, []

    monkeypatch.setattr(Tuner, "timed", timed)
    return asked


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a command in an empty folder with the test plugins installed."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv(registry.ALLOW, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("diffgraft.lab.checkup.place", lambda: tmp_path / "doctor.json")
    return lambda *words: CliRunner().invoke(cli.app, [str(word) for word in words])
