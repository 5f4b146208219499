"""Finding plugins, families and bundled pipelines by entry point. Listing imports none of them."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from email.message import Message
from email.parser import HeaderParser
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement

from diffgraft.kernel.errors import BrokenPlugin, PipelineNotFound, PluginNotFound, Unsupported, choices, nearest
from diffgraft.kernel.family import Bundled, Family

if TYPE_CHECKING:
    from diffgraft.kernel.plugin import Plugin

PLUGINS = "diffgraft.plugins"
FAMILIES = "diffgraft.families"
PIPELINES = "diffgraft.pipelines"
NEEDS = "diffgraft.needs"
ALLOW = "DIFFGRAFT_PLUGINS"
"""Environment variable: a comma-separated list that narrows which plugins may load."""
CHECKPOINTS = "diffgraft-checkpoints"
NO_FAMILY = "no pipeline family is installed, so nothing is known of any pipeline: `pip install diffgraft-families`"


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin as its metadata tells it. ``broken`` says why it cannot be used, without importing it."""

    name: str
    dist: str
    version: str
    summary: str
    homepage: str
    entry: EntryPoint
    allowed: bool
    broken: str | None = None


def installed() -> dict[str, PluginInfo]:
    """All installed plugins by name, from entry points and dist metadata; nothing is imported."""
    allow = allow_list()
    found: dict[str, PluginInfo] = {}
    for entry in sorted(entry_points(group=PLUGINS), key=lambda e: e.name):
        meta = headers_of(entry.dist)
        dist = meta.get("Name", "?")
        broken = metadata_fault(entry, meta.get_all("Requires-Dist") or ())
        if entry.name in found and found[entry.name].entry != entry:
            broken = f"two installed packages offer it: {found[entry.name].dist} and {dist}; uninstall one"
        found[entry.name] = PluginInfo(
            name=entry.name,
            dist=dist,
            version=meta.get("Version", "?"),
            summary=meta.get("Summary", ""),
            homepage=homepage_of(meta),
            entry=entry,
            allowed=allow is None or entry.name in allow,
            broken=broken,
        )
    return found


def headers_of(dist: Distribution | None) -> Message:
    """A dist's metadata without its long description. ``dist.metadata``, ``dist.name`` and the like read all of it each time."""
    text = (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "") if dist else ""
    return HeaderParser().parsestr(text.partition("\n\n")[0])


def homepage_of(meta: Message) -> str:
    """The homepage that a dist's metadata names, or ""."""
    for line in meta.get_all("Project-URL") or ():
        label, _, url = str(line).partition(",")
        if label.strip().lower() == "homepage":
            return url.strip()
    return str(meta.get("Home-page", ""))


def allow_list() -> frozenset[str] | None:
    """Names in ``DIFFGRAFT_PLUGINS``, or None when it is not set (all may load; an empty value allows none)."""
    value = os.environ.get(ALLOW)
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


def metadata_fault(entry: EntryPoint, requires: Iterable[str]) -> str | None:
    """What can be seen to be wrong from metadata and source text alone, or None."""
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"requirement {text!r} in its metadata: {error}"
        if requirement.name in {"diffgraft", "diffgraft-core"}:
            here = core_version()  # both are released together
            if not requirement.specifier.contains(here, prereleases=True):
                return f"needs {requirement.name} {requirement.specifier}, installed is {here}"
    module, _, attribute = entry.value.partition(":")
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        return f"module {top!r}: {error}"
    if spec is None:
        return f"module {top!r} is not installed (entry point {entry.value!r})"
    if not attribute:
        return f"entry point {entry.value!r} names a module; it must be 'module:PluginClass'"
    if module == top and spec.origin and spec.origin.endswith(".py") and not is_compiled(spec.origin):
        try:
            with open(spec.origin, encoding="utf-8") as file:
                ast.parse(file.read(), spec.origin)
        except (OSError, SyntaxError) as error:
            return f"{type(error).__name__}: {error}"
    return None


@cache
def core_version() -> str:
    """The version of the core that runs."""
    return version("diffgraft-core")


def is_compiled(source: str) -> bool:
    """Whether a file has been compiled as it is now: then its text needs no look, which takes a list most of its time."""
    try:
        stat = os.stat(source)
        with open(importlib.util.cache_from_source(source), "rb") as file:
            head = file.read(16)
    except (OSError, NotImplementedError):
        return False
    stamp = b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in (0, int(stat.st_mtime), stat.st_size))
    return head == importlib.util.MAGIC_NUMBER + stamp


def find(name: str) -> type[Plugin]:
    """Import one plugin by name.

    Raises:
        PluginNotFound: not installed, or not on the allow-list.
        BrokenPlugin: it cannot be imported, is not a Plugin, or was written for another contract number.
    """
    known = installed()
    info = known.get(name)
    if info is None:
        raise PluginNotFound(  # no pip line: the name of a package is never made up from what somebody typed
            f"no plugin {name!r} is installed{choices(name, known, 'Installed')} `diffgraft search` lists those that are published."
        )
    if not info.allowed:
        raise PluginNotFound(
            f"plugin {name!r} is installed ({info.dist}) but {ALLOW}={os.environ[ALLOW]!r} does not allow it; add it there"
        )
    if info.broken:
        raise BrokenPlugin(f"plugin {name!r} of {info.dist} {info.version} cannot be used: {info.broken}")
    try:
        loaded = info.entry.load()
    except Exception as error:  # whatever a foreign package raises on import is its defect, told as such
        raise BrokenPlugin(
            f"plugin {name!r} of {info.dist} {info.version} fails to import: {type(error).__name__}: {error}; "
            f"`pip install --upgrade {info.dist}` or remove it"
        ) from error
    check_class(loaded, f"plugin {name!r} of {info.dist} {info.version}")
    if loaded.name != name:
        raise BrokenPlugin(f"plugin {name!r} of {info.dist} calls itself {loaded.name!r}; the two names must agree")
    return loaded  # type: ignore[no-any-return]


def check_class(cls: object, what: str) -> None:
    """Raises BrokenPlugin unless ``cls`` is a complete plugin class for this contract."""
    from diffgraft.kernel.plugin import API, Plugin  # it brings pydantic, which a list does not need

    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise BrokenPlugin(f"{what} is {cls!r}, not a subclass of diffgraft.Plugin")
    if cls.api != API:
        raise BrokenPlugin(
            f"{what} was written for contract {cls.api}, this diffgraft speaks {API}; upgrade "
            + ("diffgraft" if cls.api > API else "the plugin")
        )
    missing = [name for name in ("name", "paper", "families", "neutral") if not hasattr(cls, name)]
    if missing:
        raise BrokenPlugin(f"{what} does not declare {', '.join(missing)}")
    if not cls.points() and cls.scheduler is None:
        raise BrokenPlugin(f"{what} implements no hook point")


@cache
def load_families() -> tuple[dict[str, Family], dict[str, str]]:
    """(families by name, error by entry-point name). Loading them imports no torch, and a broken one breaks no other."""
    found: dict[str, Family] = {}
    faults: dict[str, str] = {}
    for entry in sorted(entry_points(group=FAMILIES), key=lambda e: e.name):
        try:
            family = entry.load()
            found[family.name] = family
        except Exception as error:  # whatever a foreign package raises on import; shown by `doctor` and when a pipeline is not known
            faults[entry.name] = f"{entry.value}: {type(error).__name__}: {error}"
    return found, faults


def families() -> dict[str, Family]:
    """All families that could be loaded, by name."""
    return load_families()[0]


def find_family(pipeline_class: type) -> Family:
    """The family of a pipeline class, or of the nearest class it inherits from.

    Raises:
        Unsupported: no family knows it; the text lists what a family must say, or what to install when there is no family at all.
    """
    known, faults = load_families()
    if not known and not faults:
        raise Unsupported(f"{pipeline_class.__name__}: {NO_FAMILY}")
    by_class = {name: family for family in known.values() for name in family.pipelines}
    for cls in pipeline_class.__mro__:
        if cls.__name__ in by_class:
            return by_class[cls.__name__]
    facts = ", ".join(field.name for field in fields(Family))
    broken = f" Families that could not be loaded: {faults}." if faults else ""
    raise Unsupported(
        f"no family describes {pipeline_class.__name__}{nearest(pipeline_class.__name__, by_class)} A family is data: a "
        f"diffgraft.Family({facts}) registered through the entry-point group {FAMILIES!r}.{broken}"
    )


def find_need(kind: str, plugin: str) -> Callable[[Any, Any, Any, Any], Any]:
    """The function (plugin, need, value, target) -> thing that fetches and checks what plugins need of this kind.

    Raises:
        BrokenPlugin: nothing that is installed offers it.
    """
    offered = {entry.name: entry for entry in entry_points(group=NEEDS)}
    if kind not in offered:
        raise BrokenPlugin(f"plugin {plugin!r} needs something of an unknown kind {kind!r}{choices(kind, sorted(offered), 'Known')}")
    return offered[kind].load()  # type: ignore[no-any-return]


def bundled() -> dict[str, Bundled]:
    """All bundled checkpoints by name."""
    return {entry.name: entry.load() for entry in sorted(entry_points(group=PIPELINES), key=lambda e: e.name)}


def bundled_names() -> list[str]:
    """Names of the bundled checkpoints, without importing their packages."""
    return sorted({entry.name for entry in entry_points(group=PIPELINES)})


def find_bundled(name: str) -> Bundled:
    """Raises PipelineNotFound with the nearest names."""
    known = bundled()
    if name not in known:
        here = importlib.util.find_spec(CHECKPOINTS.replace("-", "_")) is not None
        brings = "" if here else f"`pip install {CHECKPOINTS}` brings emoji-sd and others that run offline. "
        raise PipelineNotFound(
            f"{name!r} is no bundled pipeline{nearest(name, known)} "
            f"Bundled: {', '.join(known) or 'none'}. {brings}"
            "Otherwise give a folder that exists or a Hub id 'owner/name'."
        )
    return known[name]


def bundled_of(name: str | os.PathLike[str]) -> Bundled | None:
    """The bundled checkpoint of this name; None for a folder (which goes first) or a Hub id."""
    text = os.fspath(name)
    return find_bundled(text) if text in bundled_names() and not os.path.isdir(name) else None
