"""What is checked: a plugin's source folder, or an installed plugin."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffgraft.community.quality import toml
from diffgraft.installed import registry
from diffgraft.installed.errors import BrokenPlugin, ConfigError, PluginNotFound, choices
from diffgraft.installed.plugin import Plugin

ALLOW = re.compile(r"#\s*check:\s*allow\s+(\w+)\s+because\s+(\S.*)")


@dataclass(frozen=True)
class Source:
    """One Python file of the plugin's package. ``where`` is how it is named to people."""

    path: Path
    where: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.where)

    @cached_property
    def allowed(self) -> dict[int, tuple[str, str]]:
        """line -> (rule, reason) of explicit ``# check: allow RULE because REASON``."""
        found = ((i, ALLOW.search(line)) for i, line in enumerate(self.text.splitlines(), 1))
        return {i: (match[1], match[2].strip()) for i, match in found if match}


@dataclass(frozen=True)
class Project:
    """A plugin to check.

    name     entry-point name
    value    what the entry point names ("diffgraft_x:X")
    dist     distribution name
    package  folder of the import package
    root     source folder with the pyproject.toml, or None for an installed wheel
    project  the pyproject's [project] table, or what an installed wheel's metadata says of it
    readme   text of the README
    """

    name: str
    value: str
    dist: str
    package: Path
    root: Path | None
    project: dict[str, Any]
    readme: str

    @property
    def module(self) -> str:
        return self.value.partition(":")[0].partition(".")[0]

    @property
    def class_name(self) -> str:
        return self.value.partition(":")[2]

    def where(self, path: Path) -> str:
        """A path as people are told it: relative to the source folder, or to what the package lies in."""
        base = self.root or self.package.parent
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()

    def line_of(self, file: str, pattern: str) -> int:
        """First line of a file in the source folder that matches; 0 where none does."""
        path = (self.root or self.package.parent) / file
        if not path.is_file():
            return 0
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return next((i for i, line in lines if re.search(pattern, line)), 0)

    @cached_property
    def sources(self) -> list[Source]:
        """The package's Python files; raises ConfigError for one that is no Python."""
        found = [Source(path, self.where(path), path.read_text(encoding="utf-8")) for path in sorted(self.package.rglob("*.py"))]
        for source in found:
            try:
                _ = source.tree
            except SyntaxError as error:
                raise ConfigError(f"{source.where}:{error.lineno}: {error.msg}; it must be Python before it can be checked") from None
        return found

    @cached_property
    def cls(self) -> type[Plugin]:
        """The plugin's class, imported from this very folder whether or not it is installed.

        Raises:
            BrokenPlugin: it cannot be imported, is no complete plugin, or another package of that name is in the way.
        """
        home = str(self.package.parent)
        if home not in sys.path:
            sys.path.insert(0, home)
        with registry.blamed(f"{self.value} cannot be imported"):
            importlib.invalidate_caches()
            module = importlib.import_module(self.value.partition(":")[0])
            cls = getattr(module, self.class_name)
        origin = Path(getattr(sys.modules[self.module], "__file__", None) or "").resolve()
        if not origin.is_relative_to(self.package.resolve()):
            raise BrokenPlugin(
                f"{self.module} was imported from {origin}, not from {self.package}: another package of that name is in the way"
            )
        registry.check_class(cls, f"plugin {self.name!r}")
        return cls  # type: ignore[no-any-return]


def open_project(target: str) -> Project:
    """The plugin in a folder, or the installed plugin of that name (its source folder where it is installed editable).

    Raises:
        ConfigError: the folder is no plugin's.
        PluginNotFound: neither a folder nor an installed plugin.
    """
    path = Path(target)
    if path.is_dir():
        return from_folder(path.resolve())
    known = registry.installed()
    if target not in known:
        raise PluginNotFound(f"{target!r} is neither a folder nor an installed plugin{choices(target, known, 'Installed')}")
    return from_installed(known[target])


def from_folder(root: Path) -> Project:
    """The plugin in a source folder."""
    pyproject = root / "pyproject.toml"
    if not pyproject.is_file():
        raise ConfigError(f"{root} has no pyproject.toml, so it is no plugin's folder; `diffgraft new NAME` makes one")
    project = toml(pyproject.read_text(encoding="utf-8"), str(pyproject)).get("project", {})
    entries = project.get("entry-points", {}).get(registry.PLUGINS, {})
    if len(entries) != 1:
        raise ConfigError(f'{pyproject}: [project.entry-points."{registry.PLUGINS}"] names {len(entries)} plugins; a package holds one')
    [(name, value)] = entries.items()
    module = str(value).partition(":")[0].partition(".")[0]
    package = next((base / module for base in (root, root / "src") if (base / module).is_dir()), None)
    if package is None:
        raise ConfigError(f"{pyproject}: the entry point names {value!r}, but there is no folder {module} here")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return Project(name, str(value), str(project.get("name", "")), package, root, project, text)


def from_installed(info: registry.Offer) -> Project:
    """An installed plugin: its source folder where the package lies in one, else what the wheel brought."""
    module = info.module.partition(".")[0]
    spec = importlib.util.find_spec(module)
    if info.broken or spec is None or not spec.submodule_search_locations:
        raise BrokenPlugin(f"plugin {info.name!r} of {info.dist} cannot be checked: {info.broken or f'{module} is no package'}")
    package = Path(next(iter(spec.submodule_search_locations))).resolve()
    for root in (package.parent, package.parent.parent):
        if (root / "pyproject.toml").is_file() and root.joinpath("pyproject.toml").read_text(encoding="utf-8").find(info.value) >= 0:
            return from_folder(root)
    dist = info.distribution
    meta: Any = dist.metadata if dist else {}
    requires = [text for text in (dist.requires or []) if "extra ==" not in text] if dist else []
    project = {
        "name": info.dist,
        "dependencies": requires,
        "license": meta.get("License-Expression") or meta.get("License") or "",
        "requires-python": meta.get("Requires-Python"),
    }
    return Project(info.name, info.value, info.dist, package, None, project, str(meta.get_payload() if dist else ""))
