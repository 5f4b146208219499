"""Plugins for the tests of the command line and of comparisons, installed for a test by :func:`install`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffgraft import Effects, Need, Paper, Plugin, PluginConfig, StepOutput
from pydantic import Field

PAPER = Paper(title="A test", arxiv="0000.00001", implemented="what a test needs", omitted="the rest", licence="none")
HERE = Path(__file__).parent


class Base(Plugin):
    paper = PAPER
    families = ("*",)
    neutral = {"off": True}  # noqa: RUF012


class EveryConfig(PluginConfig):
    every: int = Field(2, ge=1, description="run the denoiser every N-th call")
    mode: str | None = Field(None, description="a word, or none")


class Sparse(Base):
    """Answers all but every N-th denoiser call with the last prediction."""

    name = "sparse"
    Config = EveryConfig
    neutral = {"every": 1}  # noqa: RUF012
    effects = Effects(skips=frozenset({"denoiser"}))

    class State:
        last: Any = None
        calls: int = 0

    def denoise(self, call, next):
        due = call.state.calls % self.config.every == 0
        call.state.calls += 1
        call.count("computed" if due else "skipped")
        if due:
            call.state.last = next(call)
        return call.state.last


class Rival(Sparse):
    name = "rival"


class IdleConfig(PluginConfig):
    off: bool = Field(False, description="do nothing and be proud of it")


class Idle(Base):
    """Does nothing, and says so."""

    name = "idle"
    Config = IdleConfig

    def denoise(self, call, next):
        call.note("inactive: there was nothing to do")
        return next(call)


class Slow(Idle):
    """Runs the denoiser three times for one."""

    name = "slow"

    def denoise(self, call, next):
        next(call)
        next(call)
        return next(call)


class OnlyTransformers(Idle):
    name = "only_transformers"
    families = ("dit",)


class SolverConfig(PluginConfig):
    problem: Any = Field(None, description="what was measured; none: off")


class Solver(Base):
    """Ends a run at the pseudo-inverse of its problem."""

    name = "solver"
    Config = SolverConfig
    neutral = {"problem": None}  # noqa: RUF012
    families = ("pixel",)
    effects = Effects(edits=frozenset({"latents"}))
    needs = (Need("problem", "problem"),)

    def step(self, call, next):
        out, problem = next(call), call.given("problem")
        if problem is None or not call.step.ends_schedule:
            return out
        return StepOutput(problem.operator.pinv(problem.y).expand_as(out.sample).to(out.sample.dtype), None)


class SecondSolver(Solver):
    name = "second_solver"


class OldContract(Idle):
    name = "old_contract"
    api = 99


MADE = (Sparse, Rival, Idle, OnlyTransformers, Solver, SecondSolver, OldContract)
CLASSES = {cls.name: cls.__name__ for cls in MADE}


def install(folder: Path) -> Path:
    """A folder for ``sys.path`` that holds the metadata of two packages: one with these plugins, one that fails to import."""
    (folder / "cli_test_plugins.py").write_text((HERE / "cli_plugins.py").read_text())
    (folder / "cli_broken.py").write_text("raise RuntimeError('its own fault')\n")
    dist(folder, "diffgraft-cli-test", {name: f"cli_test_plugins:{cls}" for name, cls in CLASSES.items()})
    dist(folder, "diffgraft-cli-broken", {"broken": "cli_broken:Plugin", "nowhere": "cli_nowhere:Plugin"})
    return folder


def dist(folder: Path, name: str, entries: dict[str, str]) -> None:
    """Write the metadata of an installed package."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: Made for a test\n")
    (info / "entry_points.txt").write_text("[diffgraft.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
