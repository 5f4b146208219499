"""Every plugin folder under `diffgraft check`: clean, and at the tier that it claims. The contract suite is in test_contract.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from diffgraft.community.check import Verdict, check, open_project
from diffgraft.community.check.claims import quality_of
from diffgraft.community.check.effects import families_to_run
from diffgraft.installed import registry
from sampling import sample_of

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
BY_NAME = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_every_folder_is_installed() -> None:
    assert {folder.name for folder in FOLDERS} <= set(registry.installed())


@BY_NAME
def test_static_rules(folder: Path) -> None:
    verdict = check(open_project(str(folder)), behaviour=False, contract=False)
    assert verdict.ok, str(verdict)
    assert verdict.tier is not None, "bronze is what a plugin needs to land"
    assert quality_of(open_project(str(folder))).card is not None, "a plugin of this repository says in quality.toml what it is for"


@pytest.mark.parametrize("script", sorted(ROOT.glob("plugins/*/benchmarks/*.py")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_what_a_benchmark_names_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes to run, and is run when figures are made: a name that has gone would be found then."""
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="asked")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "looked_at" in metafunc.fixturenames:
        chosen = sample_of(metafunc.config).folders("plugins whose effects are looked at", FOLDERS)
        metafunc.parametrize("looked_at", chosen, ids=lambda folder: folder.name)


def test_effects_are_what_can_be_seen(looked_at: Path) -> None:
    """On one family, the fastest."""
    project = open_project(str(looked_at))
    verdict: Verdict = check(project, contract=False, families=[families_to_run(project.cls)[0].name])
    assert verdict.ok, str(verdict)
