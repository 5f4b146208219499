"""Plugins under each form of the denoiser: what examples/matrix.md says is what happens. Which cells: `sampling.Sample.cells`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import Effects, Paper, Plugin, PluginConfig, Unsupported
from diffgraft.installed import registry
from diffgraft.testing import Cell, form_cells
from diffgraft.testing.forms import FORMS
from pydantic import Field
from sampling import sample_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import matrix  # noqa: E402  # the script that writes the page

RAW = json.loads(matrix.RAW.read_text())
KNOWN = {(cell["plugin"], cell["on"], cell["form"]): cell["verdict"] for cell in RAW["cells"]}
AGAIN = "the matrix is out of date: run `python examples/matrix.py"


def name_of(cell: Cell) -> tuple[str, ...]:
    return tuple(matrix.name_of(cell).values())


def slow(cell: Cell) -> Any:
    return pytest.param(cell, id=str(cell), marks=[pytest.mark.slow] * (cell.form.compiled and cell.family.kind == "unet"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_cell:
        metafunc.parametrize("cell", map(slow, sample_of(metafunc.config).cells(form_cells())))


def words(verdict: str) -> str:
    """A verdict; where another torch is installed, into which graphs it compiles is its own affair."""
    same = torch.__version__.partition("+")[0] == RAW["versions"]["torch"]
    return verdict if same else re.sub(r"\b(works|breaks)(, \d+ more graphs?)?", "works", verdict)


def test_cell(cell: Cell, record_property: Any) -> None:
    found = cell.run()
    record_property("verdict", found.verdict)
    known = KNOWN.get(name_of(cell))
    if known is not None:  # else somebody else's plugin, installed beside ours; of ours, see below
        assert words(found.verdict) == words(known), f"{AGAIN} {cell.plugin.name}`"


def test_every_plugin_here_has_its_rows(request: pytest.FixtureRequest) -> None:
    """But for one that is just being made: a new plugin edits nothing but its folder, and who merges it runs the script."""
    here = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")} & set(registry.installed())
    here -= sample_of(request.config).changed
    missing = {cell.plugin.name for cell in form_cells(sorted(here)) if name_of(cell) not in KNOWN}
    assert not missing, f"{', '.join(sorted(missing))}: {AGAIN} --missing`"


def test_the_page_is_made_of_the_raw_results() -> None:
    assert matrix.PATH.read_text() == matrix.page(RAW)


def test_nothing_fails() -> None:
    assert not [key for key, verdict in KNOWN.items() if verdict.startswith("fails")]


OFFLOAD = next(form for form in FORMS if form.name == "group offload, leaves")
CAST = next(form for form in FORMS if form.name == "layerwise casting")
TAKES = {"gradients", "plain_gradients"}
GRADIENTS = [cell for cell in form_cells(forms=[OFFLOAD]) if cell.plugin(**cell.plugin.active).effects.needs & TAKES]


@pytest.mark.parametrize("cell", GRADIENTS, ids=str)
def test_gradients_of_weights_that_move_are_refused_before_the_denoiser_runs(cell: Cell) -> None:
    """By whom a cell holds that; one that differentiates the decoder alone, and so may rest on cached blocks, works."""
    verdict, of_the_denoiser = cell.run().verdict, cell.plugin(**cell.plugin.active).effects.needs & {"plain_gradients"}
    assert verdict.startswith(f"refused: {cell.plugin.name} needs gradients") or (verdict == "works" and not of_the_denoiser)


class Knobs(PluginConfig):
    factor: float = Field(1.1, description="what a prediction is multiplied with")


class Scales(Plugin):
    """Works in every form."""

    name = "scales"
    paper = Paper("a probe", "0000.00000", "scales predictions")
    families = ("sd",)
    Config = Knobs
    neutral: ClassVar[dict[str, Any]] = {"factor": 1.0}
    effects = Effects(edits=frozenset({"prediction"}))

    def denoise(self, call, next):
        return next(call) * call.config.factor


class Counts(Scales):
    """Is another one in the next run."""

    runs = 0

    def run(self, call, next):
        self.runs += 1
        return next(call)

    def denoise(self, call, next):
        return next(call) * call.config.factor**self.runs


class Sleeps(Scales):
    """Does nothing on bfloat16, and does not say so."""

    def denoise(self, call, next):
        out = next(call)
        return out if out.dtype == torch.bfloat16 else out * call.config.factor


class Trips(Scales):
    """Cannot do bfloat16."""

    def denoise(self, call, next):
        out = next(call)
        return out @ torch.ones(out.shape[-1], out.shape[-1]) / out.shape[-1]


class Refuses(Scales):
    def denoise(self, call, next):
        if call.latents.dtype == torch.bfloat16:
            raise Unsupported("refuses needs float32: load the pipeline in it")
        return next(call) * call.config.factor


def cell_of(plugin: type[Plugin], form: Any) -> Cell:
    return next(iter(form_cells([plugin], [form])))


@pytest.mark.parametrize("form", [OFFLOAD, CAST], ids=lambda form: form.name)
def test_what_works_is_told(form: Any) -> None:
    assert cell_of(Scales, form).run().verdict == "works"


def test_a_refusal_is_told() -> None:
    assert cell_of(Refuses, CAST).run().verdict == "refused: refuses needs float32: load the pipeline in it"


@pytest.mark.parametrize(
    ("plugin", "form", "fault"),
    [
        (Counts, OFFLOAD, "the second run with the same seed"),
        (Sleeps, CAST, "no note says 'inactive'"),
        (Trips, CAST, "RuntimeError"),
    ],
)
def test_a_fault_is_caught(plugin: type[Plugin], form: Any, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        cell_of(plugin, form).run()


@pytest.mark.parametrize(
    ("verdict", "mark"),
    [
        ("works", "works"),
        ("works, 1 more graph", "+1"),
        ("breaks, 14 more graphs", "breaks +14"),
        ("refused: it does not", "no"),
        ("works with an artefact made under it", "own file"),
        ("before: works; after: refused: no", "works; after the plugin: no"),
        ("before: refused: it does not; after: refused: nor so", "no"),
        ("before: works with an artefact made under it; after: refused: it is of other weights", "own file"),
        ("not in diffusers", "-"),
        ("inactive", "inactive"),
        ("fails: ...", "**fails**"),
    ],
)
def test_marks(verdict: str, mark: str) -> None:
    assert matrix.mark(verdict) == mark
