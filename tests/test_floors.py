"""The house stays readable: short files, plugins that stand on the public floors only. Floors and circles of imports: `lint-imports`."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 450
"""Lines of a file ("about 400")."""
FLOORS = {"kernel": 4441, "stacks": 1044, "installed": 1801}
"""Lines of the three lowest floors, docstrings included: each can be read in one sitting."""


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout, new ones included."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return [ROOT / name for name in listed if name and (ROOT / name).exists()]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): n for path in tracked("core/*.py", "pipelines/*.py", "tests/*.py") if (n := lines(path)) > LONGEST}
    assert not long, f"longer than {LONGEST} lines: {long}; a file is one idea"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_low_floor_can_be_read_in_one_sitting(floor: str) -> None:
    assert sum(lines(path) for path in tracked(f"core/diffgraft/{floor}/*.py")) <= FLOORS[floor]


def imported(path: Path) -> set[str]:
    """Modules that a file imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", sorted((ROOT / "plugins").glob("*/diffgraft_*")), ids=lambda folder: folder.name)
def test_a_plugin_imports_the_public_floors_only(folder: Path) -> None:
    allowed = ("diffgraft.methods", folder.name)
    for path in folder.rglob("*.py"):
        ours = {name for name in imported(path) if name.partition(".")[0].startswith("diffgraft")}
        strange = sorted(name for name in ours if name != "diffgraft" and not name.startswith(allowed))
        assert not strange, f"{path.name} imports {strange}: a plugin imports from diffgraft, diffgraft.methods and itself"


@pytest.mark.parametrize("floor", FLOORS)
def test_the_tours_name_every_file(floor: str) -> None:
    tour = (ROOT / "core" / "README.md").read_text(encoding="utf-8")
    for path in tracked(f"core/diffgraft/{floor}/*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in tour, f"core/README.md does not name {path.name}"
