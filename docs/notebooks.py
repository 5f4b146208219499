"""Runs the notebooks of ``docs/notebooks`` in order and keeps what they printed and drew.

    python docs/notebooks.py [first_stack ...]      # all of them: about a minute

Each runs in an empty folder. What goes to stderr (progress bars, remarks of other packages) is not kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
NAMES = ("first_stack", "calibrate_and_tune", "write_a_plugin")


def executed(name: str) -> nbformat.NotebookNode:
    """A notebook with the outputs that it has now.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # at what time
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # PIL gives its picture twice
    return book


def main(names: Annotated[list[str] | None, typer.Argument(help="without .ipynb; all without a name")] = None) -> None:
    for name in names or NAMES:
        nbformat.write(executed(name), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    typer.run(main)
