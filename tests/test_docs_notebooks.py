"""The notebooks of the docs: each runs from an empty folder, and what it shows is what it gave."""

from __future__ import annotations

import pytest
from diffgraft.testing.cover import shuffled
from notebooks import FOLDER, NAMES, executed, nbformat


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In a sample one of them is run: each takes up to a minute."""
    if "run" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--sample")
        metafunc.parametrize("run", NAMES if seed is None else shuffled(NAMES, seed)[:1])


def shown(book: nbformat.NotebookNode) -> list[tuple[str, list[str]]]:
    """(source, kinds of its outputs) of each cell of code."""
    return [(cell.source, [output.output_type for output in cell.outputs]) for cell in book.cells if cell.cell_type == "code"]


def kept(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_a_notebook_runs_and_shows_what_it_gives(run: str) -> None:
    assert shown(executed(run)) == shown(kept(run)), f"made before something changed: python docs/notebooks.py {run}"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_as_it_ran(name: str) -> None:
    """From the first cell to the last, once, and without an error."""
    cells = [cell for cell in kept(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr" or "/home/" in str(output) or "/root/" in str(output)]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000


def test_every_notebook_is_named() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
