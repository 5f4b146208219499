"""Rules on how the plugin is packaged: names, versions, licence, what it imports."""

from __future__ import annotations

import ast
import keyword
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from diffgraft.community.check.project import Project
from diffgraft.community.check.rule import Problem, rule

PYPROJECT = "pyproject.toml"
LONGEST = 60
"""Letters of a plugin's name."""
RANGE = "diffgraft>=0.1,<0.2"
"""What a plugin of this contract depends on."""
BROUGHT = frozenset(
    {
        "diffgraft",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "safetensors",
        "pydantic",
        "typing_extensions",
        "PIL",
        "numpy",
        "packaging",
    }
)
"""What diffgraft's own dependencies bring, by import name."""


def dist_of(name: str) -> str:
    """The distribution of a plugin."""
    return "diffgraft-" + name.replace("_", "-")


def module_of(name: str) -> str:
    """The import package of a plugin."""
    return f"diffgraft_{name}"


def fault_of_name(name: str) -> str | None:
    """Why ``name`` cannot be a plugin's name, or None."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        return "it must be snake_case: small letters and digits, words joined by one underscore, a letter first"
    if len(name) > LONGEST:
        return f"it has {len(name)} letters, and folders, packages and tables have room for {LONGEST}"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return "it is a keyword of Python"
    if name.startswith("diffgraft"):
        return "it must not start with diffgraft: the distribution and the package get that prefix by themselves"
    return None


@rule("package", "installs")
def names(project: Project) -> Iterator[Problem]:
    """Entry point, distribution, folder, class attribute and README title are one name."""
    name, dist, module = project.name, dist_of(project.name), module_of(project.name)
    if fault := fault_of_name(name):
        yield Problem(
            f"the entry point is called {name!r}: {fault}", "choose another name", PYPROJECT, project.line_of(PYPROJECT, rf"^{name}\s*=")
        )
    if canonicalize_name(project.dist) != dist:
        yield Problem(
            f"the distribution is called {project.dist!r}, the entry point {name!r}: one must be found by the other's name",
            f'name = "{dist}"',
            PYPROJECT,
            project.line_of(PYPROJECT, r"^name\s*="),
        )
    if project.module != module:
        yield Problem(
            f"the import package is called {project.module!r}: flat and prefixed it collides with nobody's",
            f"call it {module}",
            PYPROJECT,
            project.line_of(PYPROJECT, r"\[project.entry-points"),
        )
    if project.root is not None and project.root.parent.name == "plugins" and project.root.name != name:
        yield Problem(f"the folder is called {project.root.name!r}, the entry point {name!r}", f"call the folder {name}", project.root.name)
    title = next((line for line in project.readme.splitlines() if line.startswith("# ")), "")
    if title.removeprefix("# ").strip() != name:
        yield Problem(
            f"the README's title is {title!r}: a reader looks for {name!r}", f"'# {name}' as its first line (--fix)", "README.md", 1
        )
    for source, line, value in name_attributes(project):
        if value != name:
            yield Problem(f"class attribute name = {value!r}, the entry point is {name!r}", f'name = "{name}"', source, line)


def name_attributes(project: Project) -> Iterator[tuple[str, int, object]]:
    """(file, line, value) of ``name = "..."`` in the plugin's class."""
    for source in project.sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == project.class_name:
                for item in node.body:
                    if isinstance(item, (ast.Assign, ast.AnnAssign)) and isinstance(item.value, ast.Constant):
                        targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                        if any(isinstance(t, ast.Name) and t.id == "name" for t in targets):
                            yield source.where, item.lineno, item.value.value


@rule("package", "installs")
def versions(project: Project) -> Iterator[Problem]:
    """Dependencies are ranges, and diffgraft's has both ends."""
    texts = [str(text) for text in project.project.get("dependencies", [])]
    found = False
    for text in texts:
        line = project.line_of(PYPROJECT, re.escape(text))
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            yield Problem(f"dependency {text!r}: {error}", "write it as PEP 508 says: 'name>=1,<2'", PYPROJECT, line)
            continue
        operators = {item.operator for item in requirement.specifier}
        if operators & {"==", "==="} and not any(item.version.endswith(".*") for item in requirement.specifier):
            yield Problem(
                f"dependency {text!r} is a pin: it breaks users at each release of the other",
                "a range: '>=a,<b' (--fix: diffgraft's)",
                PYPROJECT,
                line,
            )
        if canonicalize_name(requirement.name) == "diffgraft":
            found = True
            if is_open(requirement):
                yield Problem(f"dependency {text!r} is open: the next contract may not be this one", f"{RANGE!r} (--fix)", PYPROJECT, line)
    if not found:
        yield Problem(
            "it does not depend on diffgraft, so it cannot be installed alone", f"dependencies = [{RANGE!r}] (--fix)", PYPROJECT, 1
        )


@rule("package", "installs")
def imports(project: Project) -> Iterator[Problem]:
    """Everything that is imported is of Python, of diffgraft or a declared dependency; no other plugin is."""
    declared = {canonicalize_name(Requirement(text).name) for text in project.project.get("dependencies", []) if is_requirement(text)}
    provided = packages_distributions()
    for source in project.sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for top in dict.fromkeys(module.partition(".")[0] for module in modules):
                if top in sys.stdlib_module_names or top in BROUGHT or top == project.module:
                    continue
                if top.startswith("diffgraft_") and not top.startswith("diffgraft_checkpoints"):
                    yield Problem(
                        f"imports {top}: a plugin that needs another one cannot be installed, tested or removed alone",
                        "say what it must do (`effects`, `needs`) and let the user stack the two",
                        source.where,
                        node.lineno,
                    )
                    continue
                dists = {canonicalize_name(dist) for dist in provided.get(top, [top])}
                if not dists & declared:
                    yield Problem(
                        f"imports {top}, which neither diffgraft brings nor the pyproject declares: a fresh install would not have it",
                        f"declare it in dependencies ({', '.join(sorted(dists))})",
                        source.where,
                        node.lineno,
                    )


def is_open(requirement: Requirement) -> bool:
    """Whether a range lacks its lower or its upper end."""
    operators = {item.operator for item in requirement.specifier}
    return not operators & {">=", ">", "~="} or not operators & {"<", "<=", "~="}


def is_requirement(text: object) -> bool:
    try:
        Requirement(str(text))
    except InvalidRequirement:
        return False
    return True


@rule("package", "installs")
def licence(project: Project) -> Iterator[Problem]:
    """The pyproject names a licence, and its text is in the plugin's own folder: a build takes it from nowhere else."""
    given = project.project.get("license") or project.project.get("license-files")
    if not given:
        yield Problem(
            "no licence is named: nobody may use it",
            'license = "Apache-2.0"',
            PYPROJECT,
            project.line_of(PYPROJECT, r"^\[project\]"),
        )
    if project.root is not None and not any(project.root.glob("LICEN[SC]E*")):
        remedy = "put the text of the licence into the folder" + (" (--fix: the repository's)" if licence_above(project.root) else "")
        yield Problem("no LICENSE file lies here, so the wheel will have none", remedy, "LICENSE")


def licence_above(folder: Path) -> Path | None:
    """The LICENSE of the repository that holds a folder, or None."""
    for above in (folder, *folder.parents):
        if (above / ".git").exists():
            return next(iter(sorted(above.glob("LICEN[SC]E*"))), None)
    return None
