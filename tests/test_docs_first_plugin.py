"""From an empty directory to a wheel with exactly the commands and files of docs/first-plugin.md, in an environment of its own, offline."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path

import pytest
from blocks import blocks_of, run_page
from diffgraft.cli import app
from typer.main import get_command

PAGE = Path(__file__).resolve().parent.parent / "docs" / "first-plugin.md"
MINUTES = 5


def test_nothing_on_the_page_is_left_out() -> None:
    blocks = blocks_of(PAGE)
    assert not [block for block in blocks if block.mark]
    commands = "".join(block.code for block in blocks if block.language == "bash")
    for word in ("diffgraft new", "pip install", "pytest", "diffgraft check", "pip wheel"):
        assert word in commands


@pytest.mark.slow
@pytest.mark.skipif("new" not in getattr(get_command(app), "commands", {}), reason="this diffgraft has no `diffgraft new` yet")
def test_from_an_empty_directory_to_a_wheel(tmp_path: Path) -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_page(PAGE, tmp_path)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime
    assert seconds < 60 * MINUTES, f"{seconds:.0f} s of machine time"
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "diffgraft_my_method/__init__.py" in names
        assert "my_method = diffgraft_my_method:MyMethod" in archive.read(entry).decode().replace("=", " = ").replace("  =  ", " = ")
