"""Build every distribution of this repository, and try the wheels in a clean environment.

    python .ci/release.py             # checks versions, ranges and metadata, writes out/dist, installs the wheels, runs, uninstalls
    python .ci/release.py --build     # without the trial
    python .ci/release.py --trial     # without holding the generated pages against the plugins: what CI runs on a contribution

Nothing is uploaded: `twine upload out/dist/*` is for a person to type. Before it, `towncrier build --version X.Y.Z` writes the changelog.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from published import ROOT, absolute, folders, module_of, project_of, wheel_faults

DIST = ROOT / "out" / "dist"
BUILD = """
import importlib, sys
try:
    import tomllib
except ImportError:
    import tomli as tomllib
backend = importlib.import_module(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["build-backend"])
for name in sys.argv[2:]:
    getattr(backend, f"build_{name}")(sys.argv[1])
"""
TRIAL = """
from diffgraft import load_pipeline
from diffgraft.installed import registry
broken = {name: info.broken for name, info in registry.installed().items() if info.broken}
assert not broken, broken
for name in registry.installed():
    registry.find(name)
pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
pipe.set_progress_bar_config(disable=True)
image = pipe("a big apple on a blue background", num_inference_steps=6).images[0]
print(len(registry.installed()), "plugins, a picture of", image.size)
"""
HUB = """
import sys
from diffgraft import load_pipeline
from diffgraft.installed import registry
assert list(registry.installed()) == [sys.argv[2]], registry.installed()
assert registry.bundled_names() == []
pipe = load_pipeline(sys.argv[1], plugins=[sys.argv[2]])
pipe.set_progress_bar_config(disable=True)
assert pipe("a big apple on a blue background", num_inference_steps=6).images[0].size == (64, 64)
print(pipe.plugins.report())
"""
"""A folder in the Hub's layout, with one plugin and without the bundled checkpoints."""
HUB_FOLDER = ROOT / "pipelines/checkpoints/diffgraft_checkpoints/bundled/emoji-sd-small"


# what requires what -----------------------------------------------------------------------------------------------------------------------


def version_of(folder: Path, project: Mapping[str, Any]) -> Version:
    """What the package says of itself: in its pyproject, or as ``__version__``."""
    if "version" in project:
        return Version(str(project["version"]))
    module = module_of(folder)
    assert module is not None, f"{folder}: no version"
    found = re.search(r'^__version__ = "([^"]+)"', (module / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{folder}: no version"
    return Version(found[1])


def requirements_of(project: Mapping[str, Any]) -> list[Requirement]:
    """What it depends on, in any of its extras too."""
    optional = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*project.get("dependencies", []), *(one for group in optional for one in group)]]


def faults(packages: Iterable[Path]) -> list[str]:
    """What is inconsistent among ourselves: a range that leaves out the version built beside it, an exact pin, an open end, a circle."""
    projects = {folder: project_of(folder) for folder in packages}
    versions = {project["name"]: version_of(folder, project) for folder, project in projects.items()}
    found, graph = [], {}
    for folder, project in projects.items():
        ours = [each for each in requirements_of(project) if each.name in versions and each.name != project["name"]]
        graph[project["name"]] = {each.name for each in ours}
        for requirement in ours:
            if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
                found.append(f"{folder.name}: {requirement} leaves out {versions[requirement.name]}, which is built beside it")
            operators = {each.operator for each in requirement.specifier}
            if operators & {"==", "==="} or not operators & {"<", "<=", "~="}:
                found.append(f"{folder.name}: {requirement}: a range with an upper bound, no pin ({requirement.name}>=0.1,<0.2)")
    if len(set(versions.values())) > 1:
        found.append(f"released together under one version, but there are {sorted(map(str, set(versions.values())))}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"they require each other: {' -> '.join(error.args[1])}")
    return found


# building ---------------------------------------------------------------------------------------------------------------------------------


def stage(folder: Path, scratch: Path) -> Path:
    """A package of this repository as it is published: what a build reads, the README with addresses in the place of relative links."""
    staged = scratch / (project_of(folder)["name"])
    staged.mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(folder / name, staged / name)
    (staged / "README.md").write_text(absolute((folder / "README.md").read_text(encoding="utf-8"), folder), encoding="utf-8")
    if (module := module_of(folder)) is not None:
        shutil.copytree(module, staged / module.name, ignore=shutil.ignore_patterns("__pycache__"))
    return staged


def build(packages: Iterable[Path], out: Path, kinds: Sequence[str] = ("wheel", "sdist")) -> list[Path]:
    """Wheels and source archives of packages, by their own build backends; gives the wheels in the order of the packages."""
    out.mkdir(parents=True, exist_ok=True)
    wheels = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in packages:
            source = stage(folder, Path(scratch)) if folder.is_relative_to(ROOT) else folder
            before = set(out.glob("*.whl"))
            subprocess.run([sys.executable, "-c", BUILD, str(out.resolve()), *kinds], cwd=source, check=True, stdout=subprocess.DEVNULL)
            wheels += sorted(set(out.glob("*.whl")) - before)
    return wheels


# environments -----------------------------------------------------------------------------------------------------------------------------


def brought(requirements: Iterable[Requirement]) -> Iterator[Distribution]:
    """The present environment's third-party distributions that these requirements bring, and what those require in turn."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        extras = ("", *sorted(requirement.extras))
        if requirement.name.startswith("diffgraft") or (canonicalize_name(requirement.name), extras) in seen:
            continue
        seen.add((canonicalize_name(requirement.name), extras))
        try:
            dist = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # of another platform; pip says so when it is not
        yield dist
        for text in dist.requires or []:
            each = Requirement(text)
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(each)


def clean_environment(folder: Path, packages: Iterable[Path] | None = None) -> Path:
    """A new virtual environment with third-party packages of the present one (as links), and nothing of diffgraft; gives its python.

    Args:
        packages: of this repository, whose dependencies are there, without their extras, and nothing else; None: everything is.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    here = Path(sysconfig.get_path("purelib"))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    if packages is None:
        names = {entry.name for entry in here.iterdir()}
    else:
        wanted = [Requirement(text) for package in packages for text in project_of(package).get("dependencies", [])]
        names = {path.parts[0] for dist in brought(wanted) for path in dist.files or [] if path.parts[0] != ".."}
    for name in sorted(names - {"__pycache__"}):
        if not name.startswith(("diffgraft", "__editable__")) and not name.endswith(".pth") and (here / name).exists():
            (site / name).symlink_to(here / name)
    return python


def pip(python: Path, *words: str) -> None:
    """pip of the present environment, working on another."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python), *words], check=True)


def install(python: Path, wheels: Sequence[Path]) -> None:
    """Only these files: nothing is fetched."""
    pip(python, "install", "--no-deps", "--no-index", "--no-compile", *map(str, wheels))


def install_by_name(python: Path, dist: str, wheelhouse: Path) -> None:
    """What `pip install NAME` does, with a folder in the place of the index: everything that it requires must be found."""
    pip(python, "install", "--no-index", "--no-compile", "--find-links", str(wheelhouse), dist)


def uninstall(python: Path, dists: Iterable[str]) -> list[str]:
    """Take dists of ours out of an environment; gives what they left behind."""
    pip(python, "uninstall", "-y", *dists)
    return [path.name for path in python.parent.parent.rglob("*diffgraft*")]


def run(python: Path, *words: str, cwd: Path) -> str:
    """What a command of that environment prints; nothing of the present environment leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "DIFFGRAFT"))}
    quiet = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *words], cwd=cwd, env={**kept, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


# the trials -------------------------------------------------------------------------------------------------------------------------------


def try_alone(folder: Path, scratch: Path, wheelhouse: Path) -> str:
    """Install only a plugin, by name, with nothing but what it requires; run it on a folder in the Hub's layout; uninstall everything.

    Returns:
        what the plugin's report says.

    Raises:
        RuntimeError: it did not run, or left something behind.
    """
    project = project_of(folder)
    home = scratch / project["name"]
    python = clean_environment(home / "venv", [*folders()[:3], folder])
    install_by_name(python, project["name"], wheelhouse)
    shutil.copytree(HUB_FOLDER, home / "model")
    said = run(python, "-c", HUB, str(home / "model"), folder.name, cwd=home)
    if left := uninstall(python, [project["name"], "diffgraft", "diffgraft-core", "diffgraft-families"]):
        raise RuntimeError(f"left behind after uninstalling {project['name']}: {left}")
    return said


def try_all(scratch: Path, wheels: Sequence[Path]) -> str:
    """Install everything, load every plugin, draw a picture, uninstall everything.

    Raises:
        RuntimeError: it did not run, or left something behind.
    """
    python = clean_environment(scratch / "all")
    install(python, wheels)
    said = run(python, "-c", TRIAL, cwd=scratch).strip().splitlines()[-1]
    if left := uninstall(python, [wheel.name.split("-")[0] for wheel in wheels]):
        raise RuntimeError(f"left behind after uninstalling: {left}")
    return said


def main() -> None:
    if found := faults(folders()):
        sys.exit("\n".join(found))
    pages = ("examples/readme.py", "examples/registry.py") if "--trial" not in sys.argv else ()  # they name every plugin
    for script in (".ci/published.py", *pages):
        subprocess.run([sys.executable, script, "--check", "--all"], cwd=ROOT, check=True)
    shutil.rmtree(DIST, ignore_errors=True)
    wheels = build(folders(), DIST)
    if found := [fault for wheel in wheels for fault in wheel_faults(wheel)]:
        sys.exit("\n".join(found))
    print(f"{len(wheels)} wheels in {DIST.relative_to(ROOT)}")
    if "--build" in sys.argv:
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(try_alone(ROOT / "plugins/deepcache", Path(scratch), DIST).strip())
        print(try_all(Path(scratch), wheels))
    print("installed, ran and uninstalled without trace")


if __name__ == "__main__":
    main()
