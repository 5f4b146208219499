"""What a package index shows of our distributions: the same facts in every pyproject, and a long description without dead links.

    python .ci/published.py             # writes what is missing into the pyprojects, and LICENSE and py.typed beside them
    python .ci/published.py --check     # exit code 1, with every fault, when something is missing

What a pyproject says already is never changed: a plugin may have keywords and classifiers of its own.
"""

from __future__ import annotations

import posixpath
import re
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/diffgraft/diffgraft"
RAW = "https://raw.githubusercontent.com/diffgraft/diffgraft/main"
URLS = {
    "Homepage": f"{REPOSITORY}{{tree}}",
    "Documentation": f"{REPOSITORY}/tree/main/docs",
    "Source": REPOSITORY,
    "Issues": f"{REPOSITORY}/issues",
    "Changelog": f"{REPOSITORY}/blob/main/docs/changelog.md",
}
AUTHOR = "The diffgraft authors"
CLASSIFIERS = (
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: OS Independent",
    "Programming Language :: Python :: 3 :: Only",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
)
KEYWORDS = ("diffusers", "diffusion-models", "generative-ai")
CODE = r"^```.*?^```[ \t]*$|(?<!`)`[^`\n]+`(?!`)"
LABEL = r"(?:[^\[\]]|\[[^\[\]]*\](?:\([^()]*\))?)*"
LINK = re.compile(rf"{CODE}|(?P<picture>!?)\[(?P<label>{LABEL})\]\((?P<target>[^()\s]+)\)", re.MULTILINE | re.DOTALL)
OTHER = re.compile(
    rf"""{CODE}|<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)\s*=\s*["'](?P<html>[^"']*)["']|^\[[^\]\n]+\]:\s*(?P<reference>\S+)""",
    re.MULTILINE | re.DOTALL,
)


def folders() -> list[Path]:
    """The packages of this repository: what others require comes first."""
    plugins = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
    return [ROOT / "core", ROOT / "pipelines/families", ROOT, ROOT / "pipelines/checkpoints", ROOT / "pipelines/checkpoints-more", *plugins]


def project_of(folder: Path) -> dict[str, Any]:
    """``[project]`` of a folder's pyproject."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def module_of(folder: Path) -> Path | None:
    """The import package of a folder; None for the metapackage, which has none."""
    return next((path.parent for path in sorted(folder.glob("diffgraft*/__init__.py"))), None)


# the pyprojects ---------------------------------------------------------------------------------------------------------------------------


def listed(key: str, values: tuple[str, ...]) -> str:
    return f"{key} = [\n" + "".join(f'  "{value}",\n' for value in values) + "]\n"


def completed(folder: Path) -> str:
    """A folder's pyproject with what is missing in its ``[project]``: author, keywords, classifiers, addresses."""
    text, project = (folder / "pyproject.toml").read_text(encoding="utf-8"), project_of(folder)
    where = folder.relative_to(ROOT).as_posix()
    own = (project["name"],) if where.startswith("plugins/") else ()
    lines = {
        "authors": f'authors = [{{ name = "{AUTHOR}" }}]\n',
        "keywords": f"keywords = [{', '.join(map(repr, (*KEYWORDS, *own)))}]\n".replace("'", '"'),
        "classifiers": listed("classifiers", CLASSIFIERS),
    }
    new = "".join(line for key, line in lines.items() if key not in project)
    text = re.sub(r"^(license\s*=.*\n(?:license-files\s*=.*\n)?)", lambda found: found[1] + new, text, count=1, flags=re.MULTILINE)
    tree = "" if where == "." else f"/tree/main/{where}"
    urls = "".join(f'{label} = "{url.format(tree=tree)}"\n' for label, url in URLS.items() if label not in project.get("urls", {}))
    if "urls" in project:
        text = text.replace("[project.urls]\n", f"[project.urls]\n{urls}", 1)
    else:
        urls = f"[project.urls]\n{urls}"
        text = re.sub(r"^(\[(?!build-system\]|project\]))", lambda found: f"{urls}\n{found[1]}", text, count=1, flags=re.MULTILINE)
    return text


def wanted() -> Iterator[tuple[Path, str]]:
    """(file, text) of everything that this script keeps."""
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for folder in folders():
        yield folder / "pyproject.toml", completed(folder)
        if not (folder / "LICENSE").is_file():
            yield folder / "LICENSE", licence  # a build takes files of its own folder only
        if (module := module_of(folder)) is not None and not (module / "py.typed").is_file():
            yield module / "py.typed", ""


# the long description ---------------------------------------------------------------------------------------------------------------------


def absolute(text: str, folder: Path) -> str:
    """A README as it can be read anywhere: links to files of the repository become addresses, code stays as it is.

    Raises:
        ValueError: a link leads nowhere.
    """
    where = folder.relative_to(ROOT).as_posix()

    def address(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None:
            return found[0]  # code
        label = LINK.sub(address, found["label"])  # it may be a picture, which is a link of its own
        if not re.match(r"[a-z]+:", target):
            path, hash_sign, anchor = target.partition("#")
            path = posixpath.normpath(posixpath.join(where, path or "README.md"))
            if not (ROOT / path).exists():
                raise ValueError(f"{where}/README.md links to {target}, which is not there")
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            base = RAW if found["picture"] else f"{REPOSITORY}/{kind}/main"
            target = f"{base}/{path}{hash_sign}{anchor}"
        return f"{found['picture']}[{label}]({target})"

    return LINK.sub(address, text)


def targets(text: str) -> Iterator[str]:
    """Where the links and pictures of a Markdown text lead; what is code is not one."""
    for found in LINK.finditer(text):
        if found["target"] is not None:
            yield found["target"]
            yield from targets(found["label"])
    for found in OTHER.finditer(text):
        if found["html"] or found["reference"]:
            yield found["html"] or found["reference"]


def relative_targets(text: str) -> list[str]:
    """Links and pictures that lead nowhere outside the repository."""
    return [target for target in targets(text) if not re.match(r"(https?|mailto):", target)]


# the wheels -------------------------------------------------------------------------------------------------------------------------------


def wheel_faults(path: Path) -> list[str]:
    """What a wheel does not tell or bring that every wheel of ours must."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        meta = message_from_bytes(wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))))
    found = []
    fields = ("Summary", "License-Expression", "License-File", "Keywords", "Classifier", "Requires-Python", "Description-Content-Type")
    found += [f"no {field}" for field in fields if not meta[field]]
    if not meta["Author"] and not meta["Author-email"]:
        found.append("no Author")
    labels = {str(line).partition(",")[0].strip() for line in meta.get_all("Project-URL", [])}
    found += [f"no address {label}" for label in URLS if label not in labels]
    inside = {name.partition(".dist-info/licenses/")[2] for name in names if ".dist-info/licenses/" in name}
    found += [f"{name} is not inside" for name in meta.get_all("License-File", []) if name not in inside]
    modules = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    found += [f"no {module}/py.typed" for module in sorted(modules) if f"{module}/py.typed" not in names]
    text = meta.get_payload(decode=True).decode()  # type: ignore[union-attr]
    if not text.strip():
        found.append("no long description")
    found += [f"its long description links to {target}" for target in relative_targets(text)]
    notices = {name for name in names if re.search(r"/(LICENSE|NOTICE)[^/]*(?<!\.jinja)$", name) and ".dist-info/" not in name}
    found += [f"{name} is not among its licence files" for name in sorted(notices - inside)]
    return [f"{path.name}: {fault}" for fault in found]


def main() -> None:
    missing = [(path, text) for path, text in wanted() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path, text in missing:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)}: not complete; run `python .ci/published.py`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if missing and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
