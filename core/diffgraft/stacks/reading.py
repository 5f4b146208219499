"""From a stack file to specs: every fault of the file, of what is installed and of the files that it names is found before anything is
touched."""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, PluginNotFound, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.installed.offers import PLUGINS, own_names
from diffgraft.stacks.references import hub_file, resolved
from diffgraft.stacks.schema import LARGEST, STACK, Member, StackFile, parse

_log = logging.getLogger(__name__)

NAME = "stack.yaml"
"""What a stack file is called beside ``model_index.json`` and in a repository on the Hub."""
SUFFIXES = (".yaml", ".yml")


def is_stack(plugins: Any) -> bool:
    """Whether what stands after ``plugins=`` names a stack file: a path, a name with its suffix, or ``owner/name`` on the Hub."""
    return isinstance(plugins, os.PathLike) or (
        isinstance(plugins, str) and (plugins.endswith(SUFFIXES) or "/" in plugins or os.sep in plugins)
    )


@dataclass(frozen=True)
class Stack:
    """A stack file that was read. ``find`` leads from a path in it to the file here."""

    source: str
    file: StackFile
    find: Callable[[str], Path]

    def specs(self) -> list[tuple[str, dict[str, Any]]]:
        """(plugin, knobs), outermost first, with the paths of files that were held against their checksums.

        Raises:
            PluginNotFound: plugins that are not installed, all of them, and where to get them.
            ConfigError, ArtefactMismatch: a file that a knob names is not there, or is another one.
        """
        here = {member.name: registry.by_name(PLUGINS, member.name).get(member.name) for member in self.file.plugins}
        if missing := [member for member in self.file.plugins if here[member.name] is None]:
            raise PluginNotFound(f"{self.source}: {'; '.join(map(not_here, missing))}")
        specs = []
        for member in self.file.plugins:
            offer = here[member.name]
            if offer is not None and member.version not in (None, offer.version):
                _log.warning("%s: made with %s %s, here is %s", self.source, member.name, member.version, offer.version)
            where = f"{self.source}: {member.name}."
            specs.append((member.name, {knob: resolved(value, self.find, where + plain(knob)) for knob, value in member.knobs.items()}))
        return specs

    @property
    def disabled(self) -> tuple[str, ...]:
        """Names of the plugins that were switched off."""
        return tuple(member.name for member in self.file.plugins if not member.enabled)

    def ensure_for(self, family: Family, pipeline: str) -> None:
        """Raises Unsupported where the family of a pipeline class is another one than the file's."""
        if self.file.family not in (None, family.name):
            raise Unsupported(
                f"{self.source} was made for the family {self.file.family!r}, and {pipeline} is of the family {family.name!r}: artefacts "
                "and settings are another family's. To use its plugins all the same, take the line `family:` out of it"
            )


def not_here(member: Member) -> str:
    """Where to get a plugin. A pip line is only made of names that this diffgraft knows itself, never of what a file says."""
    dist = own_names()[PLUGINS].get(member.name)
    if dist is not None:
        return f"{member.name} is not installed: `pip install {dist}`"
    told = f"; the file says that it is of the package {brief(member.package)}, which nobody here has looked at" if member.package else ""
    return f"{member.name} is not installed{told}; `diffgraft search` lists the plugins that are published"


def read_stack(source: str | os.PathLike[str]) -> Stack:
    """The stack file at a path, in a folder, at ``owner/name`` or at ``owner/name/file.yaml`` on the Hub.

    Raises:
        ConfigError: there is none, or it is none, of a newer schema, or not as diffgraft writes it.
    """
    text, path = os.fspath(source), Path(source).expanduser()
    if path.is_dir():
        path = path / NAME
    on_hub = isinstance(source, str) and text.count("/") >= 1 and not text.startswith((".", "/", "~", "\\"))
    if path.is_file() or not on_hub:
        return Stack(text, parse(content_of(path), text, StackFile, STACK), partial(Path.joinpath, path.parent))
    if text.count("/") > 1 and not text.endswith(SUFFIXES):
        raise ConfigError(f"plugins={brief(text)}: no such file here, and a stack file on the Hub is owner/name or owner/name/FILE.yaml")
    if text.count("/") == 1 and text.endswith(SUFFIXES):
        raise ConfigError(f"plugins={brief(text)}: there is no such file")
    owner, name, *inside = text.split("/", 2)
    file = inside[0] if inside else NAME
    folder = file.rpartition("/")[0]
    found = hub_file(f"{owner}/{name}/{file}")
    return Stack(text, parse(content_of(found), text, StackFile, STACK), partial(in_repository, f"{owner}/{name}", folder))


def content_of(path: Path) -> str:
    """Raises ConfigError where there is no such file, or none that can be a stack."""
    if not path.is_file():
        lies = [each.name for each in path.parent.glob("*.y*ml")][:5] if path.parent.is_dir() else []
        raise ConfigError(f"there is no stack file {plain(path)}" + (f"; there is {', '.join(map(plain, lies))}" if lies else ""))
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{plain(path)} has more than {LARGEST:,} bytes: it is no stack file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{plain(path)} is no stack file: {said(error)}") from None


def in_repository(repository: str, folder: str, name: str) -> Path:
    """A file of the repository on the Hub that the stack file is in; nothing outside of it."""
    path = posixpath.normpath(posixpath.join(folder, name))
    if path.startswith(".."):
        raise ConfigError(f"{brief(name)} leads out of the repository {repository}")
    return hub_file(f"{repository}/{path}")


def class_at(folder: str | os.PathLike[str]) -> list[str]:
    """The pipeline class that the index of a folder or Hub id names, to be asked before any weight is read; none where there is none."""
    index, text = Path(folder) / "model_index.json", os.fspath(folder)
    try:
        index = hub_file(f"{text}/{index.name}") if not index.is_file() and text.count("/") == 1 else index
        return [str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])]
    except (ConfigError, OSError, ValueError, KeyError, TypeError):  # loading says why
        return []
