"""What editors and type checkers see of the public surface, and that nothing prints past the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import diffgraft
import pytest
from test_floors import ROOT, tracked

PACKAGES = sorted({path.parent for path in tracked("core/*/__init__.py", "pipelines/*/*/__init__.py", "plugins/*/diffgraft_*/__init__.py")
                   if (path.parent.parent / "pyproject.toml").exists()})  # fmt: skip
PRINTS_AS_A_COMMAND = {"pipelines/families/diffgraft_pipelines/observe.py"}
"""`python -m` of it is a command."""


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_says_that_it_is_typed(package: Path) -> None:
    assert (package / "py.typed").exists()


def test_nothing_prints_past_the_command_line() -> None:
    found = []
    for path in tracked("core/diffgraft/*.py", "pipelines/*/diffgraft_*/*.py", "plugins/*/diffgraft_*/*.py"):
        name = path.relative_to(ROOT).as_posix()
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if name not in PRINTS_AS_A_COMMAND and any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            found.append(name)
    assert not found


def test_every_logger_is_below_diffgrafts() -> None:
    for path in tracked("core/diffgraft/*.py", "pipelines/*/diffgraft_*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger" and "testing" not in path.parts:
                assert ast.unparse(node.args[0]) in ("__name__", "'diffgraft'"), path


@pytest.mark.parametrize("name", [name for name in diffgraft.__all__ if inspect.isfunction(getattr(diffgraft, name))])
def test_every_public_function_is_annotated(name: str) -> None:
    signature = inspect.signature(getattr(diffgraft, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())


SEEN = """
from pathlib import Path
from typing_extensions import assert_type
from diffgraft import load_pipeline
from diffgraft.kernel.stack import PluginStack
from diffgraft.stacks.report import Report

def seen(live: "DiffusionPipeline") -> None:
    pipe = load_pipeline("emoji-sd", plugins={"deepcache": "sdxl-fast", "t_stitch": {"fraction": 0.4}}, dtype=None)
    assert_type(pipe.plugins, PluginStack)
    assert_type(pipe.plugins.report(), Report)
    assert_type(pipe.plugins.save("stack.yaml"), Path)
    assert_type(load_pipeline(live, True).plugins, PluginStack)
    load_pipeline("owner/model", plugins="stack.yaml")
    load_pipeline("owner/model", plugins=[("deepcache", "sdxl-fast"), ("t_stitch", {"fraction": 0.4})])
    load_pipeline("owner/model", plugins=3)
    pipe.plugins.sabe("stack.yaml")

from diffusers import DiffusionPipeline
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_plugins(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="pip install 'diffgraft-core[test]'")
    (tmp_path / "seen.py").write_text(SEEN)
    words = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent", str(tmp_path / "seen.py")]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    faults = [line.partition(": error: ")[2] for line in done.stdout.splitlines() if ": error: " in line]
    assert len(faults) == 2, done.stdout
    assert "No overload variant" in faults[0] or "incompatible type" in faults[0]
    assert '"PluginStack" has no attribute "sabe"' in faults[1]
