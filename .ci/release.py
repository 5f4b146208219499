"""Build every distribution of this repository, and try the wheels in a clean environment.

    python .ci/release.py             # checks versions and ranges, writes out/dist, installs the wheels, runs, uninstalls
    python .ci/release.py --build     # without the trial

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
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "out" / "dist"
BUILD = "from flit_core.buildapi import build_sdist, build_wheel; import sys; build_wheel(sys.argv[1]); build_sdist(sys.argv[1])"
TRIAL = """
from diffgraft import load_pipeline
from diffgraft.kernel import registry
broken = {name: info.broken for name, info in registry.installed().items() if info.broken}
assert not broken, broken
for name in registry.installed():
    registry.find(name)
pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
pipe.set_progress_bar_config(disable=True)
image = pipe("a big apple on a blue background", num_inference_steps=6).images[0]
print(len(registry.installed()), "plugins, a picture of", image.size)
"""


def folders() -> list[Path]:
    """The packages of this repository: core first."""
    return [ROOT / "core", ROOT / "pipelines", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]


def version_of(folder: Path, project: dict[str, object]) -> Version:
    """What the package says of itself: in its pyproject, or as ``__version__``."""
    if "version" in project:
        return Version(str(project["version"]))
    module = str(project["name"]).replace("-", "_")
    text = (folder / module / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found, f"{folder}: no version"
    return Version(found[1])


def faults(packages: Iterable[Path]) -> list[str]:
    """What is inconsistent: a range that leaves out the version built beside it, an exact pin or an open end among ourselves."""
    projects = {folder: tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"] for folder in packages}
    versions = {project["name"]: version_of(folder, project) for folder, project in projects.items()}
    found = []
    for folder, project in projects.items():
        optional = project.get("optional-dependencies", {}).values()
        for text in [*project.get("dependencies", []), *(one for group in optional for one in group)]:
            requirement = Requirement(text)
            if requirement.name not in versions or requirement.name == project["name"]:
                continue
            if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
                found.append(f"{folder.name}: {text} leaves out {versions[requirement.name]}, which is built beside it")
            operators = {each.operator for each in requirement.specifier}
            if operators & {"==", "==="} or (requirement.name == "diffgraft" and not operators & {"<", "<=", "~="}):
                found.append(f"{folder.name}: {text}: a range with an upper bound, no pin (diffgraft>=0.1,<0.2)")
    return found


def build(packages: Iterable[Path], out: Path) -> list[Path]:
    """Wheels and source archives of packages, all with flit; gives the wheels."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.glob("*.whl"))
    for folder in packages:
        subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return sorted(set(out.glob("*.whl")) - before)


def clean_environment(folder: Path) -> Path:
    """A new virtual environment that has the present one's third-party packages (as links), and nothing of diffgraft; gives its python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("diffgraft") and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python


def pip(python: Path, *words: str) -> None:
    """pip of the present environment, working on another."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python), *words], check=True)


def install(python: Path, wheels: Sequence[Path]) -> None:
    """Only these files: nothing is fetched."""
    pip(python, "install", "--no-deps", "--no-index", *map(str, wheels))


def run(python: Path, *words: str, cwd: Path) -> str:
    """What a command of that environment prints; nothing of the present environment leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "DIFFGRAFT"))}
    done = subprocess.run([python, *words], cwd=cwd, env={**kept, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    if found := faults(folders()):
        sys.exit("\n".join(found))
    for script in ("readme", "registry"):  # the generated pages name every plugin
        subprocess.run([sys.executable, f"examples/{script}.py", "--check", "--all"], cwd=ROOT, check=True)
    shutil.rmtree(DIST, ignore_errors=True)
    wheels = build(folders(), DIST)
    print(f"{len(wheels)} wheels in {DIST.relative_to(ROOT)}")
    if "--build" in sys.argv:
        return
    with tempfile.TemporaryDirectory() as scratch:
        python = clean_environment(Path(scratch) / "venv")
        install(python, wheels)
        print(run(python, "-c", TRIAL, cwd=Path(scratch)).strip().splitlines()[-1])
        pip(python, "uninstall", "-y", *(wheel.name.split("-")[0] for wheel in wheels))
        left = [path.name for path in python.parent.parent.rglob("*diffgraft*")]
        if left:
            sys.exit(f"left behind after uninstalling: {left}")
    print("installed, ran and uninstalled without trace")


if __name__ == "__main__":
    main()
