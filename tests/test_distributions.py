"""Our distributions: what they require is what they import, what a package index shows of them, what importing them costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import diffgraft
import published
import pytest
import release
from diffgraft.community.check.packaging import BROUGHT
from diffgraft.methods.extras import EXTRAS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "core/diffgraft"
PROVIDED = packages_distributions()


# imports ----------------------------------------------------------------------------------------------------------------------------------


def third_party(folder: Path) -> Iterator[tuple[Path, int, str, bool]]:
    """(file, line, package, whether at module level) of every import of somebody else's package, type-only ones left out."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(f)}
        checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
        typed = {id(node) for block in checked for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for package in {name.partition(".")[0] for name in names}:
                if package not in sys.stdlib_module_names and not package.startswith("diffgraft") and id(node) not in typed:
                    yield path, node.lineno, package, id(node) not in inside


def required(folder: Path, *extras: str) -> set[str]:
    """Names of the dists that a package of ours requires, with these of its extras."""
    project = release.project_of(folder)
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def dists_of(package: str) -> set[str]:
    return {canonicalize_name(dist) for dist in PROVIDED.get(package, [package])}


BASE = required(ROOT / "core")
FLOORS: dict[str, tuple[str, ...]] = {"installed": (), "stacks": (), "kernel": (), "methods": ("lora", "torchao"), "cli": ()}
FLOORS |= {"lab": ("lab",), "testing": ("author", "quantisers"), "community": ("author",), "batch": ("ray",), "ui": ("ui",)}
"""Which extra's packages the functions of a floor may import; module level is for what `pip install diffgraft` brings, everywhere."""


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_what_is_required(floor: str) -> None:
    late = required(ROOT / "core", *FLOORS[floor])
    for path, line, package, at_once in third_party(CORE / floor):
        allowed = BASE if at_once else late
        assert dists_of(package) & allowed, f"{path.relative_to(ROOT)}:{line} imports {package}, which core/pyproject.toml does not bring"


def test_every_floor_is_looked_at_and_every_requirement_is_used() -> None:
    assert {path.name for path in CORE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)
    used = {dist for _, _, package, _ in third_party(CORE) for dist in dists_of(package)}
    assert BASE - used - {"tomli"} == set()


@pytest.mark.parametrize(
    ("folder", "part", "extras"),
    [
        ("pipelines/families", "diffgraft_pipelines", ()),
        ("pipelines/checkpoints", "diffgraft_checkpoints/bundled", ()),
        ("pipelines/checkpoints-more", "diffgraft_checkpoints_more", ()),
        ("pipelines/checkpoints", "diffgraft_checkpoints/emoji", ("train",)),  # the font is read to draw scenes, in training only
        ("pipelines/checkpoints", "diffgraft_checkpoints/train", ("train",)),
    ],
)
def test_the_pipelines_import_what_is_required(folder: str, part: str, extras: tuple[str, ...]) -> None:
    allowed = BASE | required(ROOT / folder, *extras)
    for path, line, package, _ in third_party(ROOT / folder / part):
        assert dists_of(package) & allowed, f"{path.relative_to(ROOT)}:{line} imports {package}, which its pyproject does not bring"


def test_what_needs_an_extra_says_so_by_one_helper() -> None:
    """Every ``imported("package...")`` names a package of the table, and the table's extras bring their packages."""
    for package, extra in EXTRAS.items():
        assert canonicalize_name(package) in required(ROOT / "core", extra), (package, extra)
        assert extra in release.project_of(ROOT)["optional-dependencies"]
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "imported" and isinstance(node.args[0], ast.Constant):
                assert str(node.args[0].value).partition(".")[0] in EXTRAS, f"{path}:{node.lineno}"


def test_what_plugins_may_count_on_is_what_is_brought() -> None:
    for package in BROUGHT - {"diffgraft"}:
        assert dists_of(package) & BASE, package


# importing costs nothing ------------------------------------------------------------------------------------------------------------------


def fresh(code: str, **environment: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import diffgraft; print(*(m.partition('.')[0] for m in set(sys.modules) - before))"
    assert set(fresh(code).split()) - sys.stdlib_module_names == {"diffgraft"}


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["search", "cache"], ["--help"]])
def test_a_list_imports_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from diffgraft.cli import app
try:
    app({words!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "diffusers", "transformers", "numpy"}} & set(sys.modules)
plugins = [name for name in sys.modules if name.startswith("diffgraft_")]
assert not heavy and not plugins, (heavy, plugins)
"""
    fresh(code)


def test_the_names_are_all_there() -> None:
    assert dir(diffgraft) == diffgraft.__all__ == sorted(diffgraft.__all__)
    assert set(diffgraft._LAZY) | {"__version__"} == set(diffgraft.__all__)
    for name in diffgraft.__all__:
        assert getattr(diffgraft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_pipelin'"):
        diffgraft.load_pipelin  # noqa: B018


@pytest.mark.parametrize(
    ("line", "offered"),
    [("diffgraft ru", "run"), ("diffgraft run emoji-f", "emoji-flux"), ("diffgraft run x -p t_stitch,deep", "t_stitch,deepcache")],
)
def test_the_shell_completes(line: str, offered: str) -> None:
    words = {"_DIFFGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    said = fresh("import runpy; runpy.run_module('diffgraft', run_name='__main__')", **words)
    assert offered in said


# what an index shows ----------------------------------------------------------------------------------------------------------------------


def test_every_pyproject_is_complete() -> None:
    missing = [path for path, text in published.wanted() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    assert not missing, "run `python .ci/published.py`"


@pytest.mark.parametrize("folder", published.folders(), ids=lambda folder: release.project_of(folder)["name"])
def test_a_wheel_tells_what_it_is(folder: Path, tmp_path: Path) -> None:
    (wheel,) = release.build([folder], tmp_path, ["wheel"])
    assert published.wheel_faults(wheel) == []


def test_a_bare_wheel_is_told_what_it_lacks(tmp_path: Path) -> None:
    home = tmp_path / "bare"
    (home / "diffgraft_bare").mkdir(parents=True)
    (home / "diffgraft_bare/__init__.py").write_text('"""Bare."""\n')
    (home / "diffgraft_bare/NOTICE").write_text("theirs")
    (home / "README.md").write_text("[here](docs/x.md), ![a](b.png), `[no](code.md)`, <img src='c.png'> and [there](https://example.org)\n")
    (home / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["flit_core>=3.11"]\nbuild-backend = "flit_core.buildapi"\n'
        '[project]\nname = "diffgraft-bare"\nversion = "1"\ndescription = "Bare"\nreadme = "README.md"\n'
    )
    (wheel,) = release.build([home], tmp_path / "dist", ["wheel"])
    told = " ".join(published.wheel_faults(wheel))
    for word in ("License-Expression", "License-File", "Keywords", "Classifier", "Author", "address Homepage", "py.typed", "NOTICE"):
        assert word in told
    for target in ("docs/x.md", "b.png", "c.png"):
        assert f"links to {target}" in told
    assert "code.md" not in told
    assert "example.org" not in told


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("[a](../../LICENSE)", f"[a]({published.REPOSITORY}/blob/main/LICENSE)"),
        ("[a](../../examples/benchmarks)", f"[a]({published.REPOSITORY}/tree/main/examples/benchmarks)"),
        ("[`a`](README.md#knobs)", f"[`a`]({published.REPOSITORY}/blob/main/plugins/deepcache/README.md#knobs)"),
        ("[a](#knobs)", f"[a]({published.REPOSITORY}/blob/main/plugins/deepcache/README.md#knobs)"),
        ("![a](../../examples/compare.png)", f"![a]({published.RAW}/examples/compare.png)"),
        (
            "[![a](../../examples/compare.png)](../../README.md)",
            f"[![a]({published.RAW}/examples/compare.png)]({published.REPOSITORY}/blob/main/README.md)",
        ),
        ("[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("`[a](x.md)`", "`[a](x.md)`"),
        ("```python\nx = [a](b)\n```", "```python\nx = [a](b)\n```"),
    ],
)
def test_a_readme_is_read_anywhere(text: str, read: str) -> None:
    assert published.absolute(text, ROOT / "plugins/deepcache") == read
    assert published.relative_targets(read) == []


def test_a_dead_link_is_refused() -> None:
    with pytest.raises(ValueError, match=r"plugins/deepcache/README\.md links to gone\.md"):
        published.absolute("[a](gone.md)", ROOT / "plugins/deepcache")


# the ranges among ourselves ---------------------------------------------------------------------------------------------------------------


def test_our_ranges() -> None:
    assert release.faults(published.folders()) == []


def test_what_brings_what() -> None:
    """The metapackage brings core and families, which do not bring each other's users; the weights are nobody's requirement."""
    ours = {}
    for folder in published.folders():
        ours[release.project_of(folder)["name"]] = {name for name in required(folder) if name.startswith("diffgraft")}
    assert ours.pop("diffgraft") == {"diffgraft-core", "diffgraft-families"}
    assert ours.pop("diffgraft-core") == set()
    assert ours.pop("diffgraft-families") == {"diffgraft-core"}
    assert ours.pop("diffgraft-checkpoints") == {"diffgraft-core", "diffgraft-families"}
    assert ours.pop("diffgraft-checkpoints-more") == {"diffgraft-core", "diffgraft-families", "diffgraft-checkpoints"}
    assert set(map(frozenset, ours.values())) == {frozenset({"diffgraft"})}


@pytest.mark.parametrize(
    ("one", "other", "fault"),
    [
        (("0.1.0", []), ("0.1.0", ["diffgraft-one>=0.2,<0.3"]), "leaves out 0.1.0"),
        (("0.1.0", []), ("0.1.0", ["diffgraft-one==0.1.0"]), "no pin"),
        (("0.1.0", []), ("0.1.0", ["diffgraft-one>=0.1"]), "a range with an upper bound"),
        (("0.1.0", []), ("0.1.1", []), "one version"),
        (("0.1.0", ["diffgraft-other>=0.1,<0.2"]), ("0.1.0", ["diffgraft-one>=0.1,<0.2"]), "require each other"),
    ],
)
def test_a_wrong_range_is_told(one: tuple[str, list[str]], other: tuple[str, list[str]], fault: str, tmp_path: Path) -> None:
    for name, (version, requires) in {"one": one, "other": other}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(
            f'[project]\nname = "diffgraft-{name}"\nversion = "{version}"\n[project.optional-dependencies]\nx = {requires!r}\n'
        )
    assert fault in " ".join(release.faults([tmp_path / "one", tmp_path / "other"]))
