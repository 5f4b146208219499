"""What installed packages offer under diffgraft's entry-point groups, told from metadata and source text: nothing is imported.

Whatever is wrong with a package is written on its own offers and breaks nobody else's: unreadable or forged metadata, a malformed entry
point, a source that cannot be parsed, a requirement that is not met, a name that belongs to somebody else.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from email.parser import HeaderParser
from functools import cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from diffgraft.installed.errors import BrokenPlugin, PluginNotFound
from diffgraft.installed.foreign import plain, said

API = 1
"""Number of the plugin contract. It changes when a plugin written for it could break, and only then."""
PLUGINS = "diffgraft.plugins"
FAMILIES = "diffgraft.families"
PIPELINES = "diffgraft.pipelines"
NEEDS = "diffgraft.needs"
IN_WORDS = {PLUGINS: "plugin", FAMILIES: "family", PIPELINES: "bundled pipeline", NEEDS: "kind of need", "diffgraft.rewards": "reward"}
ALLOW = "DIFFGRAFT_PLUGINS"
"""Environment variable: a comma-separated list that narrows what may load, in every group. What this project's own packages bring
beside plugins (families, checkpoints, kinds of needs) always may."""
NAME = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*", re.ASCII)
DIST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII | re.IGNORECASE)
CONTRACT = re.compile(rb"^[ \t]+api\b.*=", re.MULTILINE)
LARGEST = 1_000_000
"""Bytes of a source, and characters of metadata, that are looked into."""
LONGEST = 400
"""Characters of a summary or an address that are kept."""


@dataclass(frozen=True)
class Offer:
    """One entry point of an installed package. ``broken`` says why it cannot be used, without importing it."""

    group: str
    name: str
    value: str
    dist: str
    version: str = "?"
    summary: str = ""
    homepage: str = ""
    allowed: bool = True
    broken: str | None = None
    distribution: Distribution | None = field(default=None, repr=False, compare=False)

    @property
    def module(self) -> str:
        """The module that it names; empty where it names none."""
        match = EntryPoint.pattern.match(self.value)
        return match.group("module") if match else ""

    @property
    def ours(self) -> bool:
        """Whether a package of this project brings it whose offers need no allowing."""
        return self.group != PLUGINS and self.dist in own_dists()

    def __str__(self) -> str:
        return f"{IN_WORDS.get(self.group, self.group)} {plain(self.name)!r} of {self.dist} {self.version}"

    def load(self) -> Any:
        """What it stands for, imported.

        Raises:
            PluginNotFound: it is not on the allow-list.
            BrokenPlugin: it cannot be used, or raises anything on import.
        """
        if not self.allowed:
            raise PluginNotFound(f"{self} is installed, but {ALLOW}={os.environ[ALLOW]!r} does not allow it; add {self.name} there")
        if self.broken:
            raise BrokenPlugin(f"{self} cannot be used: {self.broken}")
        with blamed(f"{self} fails to import", f"; `pip install --upgrade {self.dist}` or remove it"):
            return EntryPoint(self.name, self.value, self.group).load()


@contextmanager
def blamed(what: str, way_out: str = "") -> Iterator[None]:
    """Whatever somebody else's code raises, SystemExit included, is a BrokenPlugin that names it; only Ctrl-C comes through."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise BrokenPlugin(f"{what}: {said(error)}{way_out}") from error


def offers(group: str, name: str | None = None) -> list[Offer]:
    """Everything that is offered in a group (under one name), sorted; two packages that offer one name are both there, with what that
    means."""
    allow, versions = allow_list(), dict[str, str | None]()
    found = [made for dist, fault in installed_dists() for made in of_dist(dist, fault, group, name, versions)]
    found = [replace(one, allowed=one.ours or allow is None or one.name in allow) for one in found]
    return sorted((settled(one, found) for one in found), key=lambda one: (one.name, one.dist))


def settled(offer: Offer, among: list[Offer]) -> Offer:
    """An offer, refused where its name is somebody else's: a name of this project's belongs to one package, any other to one at most."""
    if offer.dist != (owner := owner_of(offer, among)):
        rivals = sorted({f"{one.dist}" for one in among if one.name == offer.name})
        why = f"the name belongs to {owner}" if owner else f"two installed packages offer it: {' and '.join(rivals)}; uninstall one"
        return replace(offer, broken=why)
    return offer


def owner_of(offer: Offer, among: list[Offer]) -> str | None:
    """The package that a name belongs to; None where several claim it."""
    claimed = {one.dist for one in among if one.name == offer.name}
    ours = own_names().get(offer.group, {}).get(offer.name) or next(iter(claimed & own_dists()), None)
    return ours or (offer.dist if len(claimed) == 1 else None)


@cache
def own_names() -> dict[str, dict[str, str]]:
    """Group -> name -> the package of this project that it belongs to, whether that is installed or not."""
    found: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    return found


@cache
def own_dists() -> frozenset[str]:
    """This project's packages that bring more than a plugin."""
    return frozenset(dist for group, names in own_names().items() if group != PLUGINS for dist in names.values())


def allow_list() -> frozenset[str] | None:
    """Names in ``DIFFGRAFT_PLUGINS``, or None when it is not set (all may load; an empty value allows none)."""
    value = os.environ.get(ALLOW)
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


# metadata ------------------------------------------------------------------------------------------------------------------------------


def installed_dists() -> Iterator[tuple[Distribution, str | None]]:
    """(every installed package once, what is wrong with it already); of two of one name the first on the path, as Python has it."""
    found: dict[str, list[Distribution]] = {}
    for dist in distributions():
        if (name := folder_name(dist)) is None:
            yield dist, None
        else:
            found.setdefault(name, []).append(dist)
    for name, dists in found.items():
        first = str(getattr(dists[0], "_path", ""))
        beside = {str(getattr(dist, "_path", "")) for dist in dists} - {first}
        if any(os.path.dirname(other) == os.path.dirname(first) for other in beside):
            fault = f"there are two folders of metadata of {name} beside each other; install it again"
            yield from ((dist, fault) for dist in dists)
        else:
            yield dists[0], None


def folder_name(dist: Distribution) -> str | None:
    """The name that a package's folder of metadata has, which pip holds against the rest and no text in it can forge."""
    stem, suffix = os.path.splitext(os.path.basename(str(getattr(dist, "_path", ""))))
    return canonicalize_name(stem.partition("-")[0]) if suffix in (".dist-info", ".egg-info") else None


def read_text(dist: Distribution, name: str) -> tuple[str, bytes | None]:
    """(a file of a package's metadata, None), or (what is wrong with it, its bytes as far as they could be had)."""
    try:
        return dist.read_text(name) or "", None
    except UnicodeDecodeError as error:
        return f"its {name} is no UTF-8", error.object
    except Exception as error:
        return f"its {name} cannot be read: {said(error)}", b""


def of_dist(dist: Distribution, fault: str | None, group: str, only: str | None, versions: dict[str, str | None]) -> Iterator[Offer]:
    """The offers of one package, or that of one name. Entry points that cannot be read are one line, in the group of plugins."""
    text, content = read_text(dist, "entry_points.txt")
    if content is not None:
        name = folder_name(dist) or "?"
        if group == PLUGINS and b"diffgraft." in content and only in (None, name):
            yield Offer(group, name, "", name, broken=text, distribution=dist)
        return
    entries = list(entries_of(text, group))
    if not any(only in (None, key) for key, _ in entries):
        return
    headers, broken = headers_of(dist)
    broken = fault or broken
    named = canonicalize_name(str(headers.get("Name", "")))
    name = folder_name(dist) or named
    if broken is None and (name != named or not DIST.fullmatch(name)):
        broken = f"its metadata calls it {plain(headers.get('Name', 'nothing'))!r}, its folder {name!r}"
    for key, value in entries:
        if only not in (None, key):
            continue
        yield Offer(
            group=group,
            name=plain(key)[:LONGEST],
            value=value,
            dist=plain(name)[:LONGEST] or "?",
            version=plain(headers.get("Version", "?"))[:LONGEST],
            summary=plain(headers.get("Summary", ""))[:LONGEST],
            homepage=homepage_of(headers),
            broken=broken or fault_of(key, value, group, headers, versions, sum(key == other for other, _ in entries)),
            distribution=dist,
        )


def entries_of(text: str, group: str) -> Iterator[tuple[str, str]]:
    """(name, value) of each line of one section of an ``entry_points.txt``, whatever the lines are."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line.strip("[]").strip()
        elif section == group and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def headers_of(dist: Distribution) -> tuple[Message, str | None]:
    """(a package's metadata without its long description, what is wrong with it). ``dist.metadata`` reads all of it each time."""
    for name in ("METADATA", "PKG-INFO"):
        text, content = read_text(dist, name)
        if content is not None:
            return Message(), text
        if text:
            head = text.partition("\n\n")[0]
            long = f"its {name} has more than {LARGEST} characters before the description" if len(head) > LARGEST else None
            return HeaderParser().parsestr("" if long else head), long
    return Message(), "it has no METADATA"


def homepage_of(headers: Message) -> str:
    """The homepage that a package's metadata names, or ""."""
    for line in headers.get_all("Project-URL") or ():
        label, _, url = str(line).partition(",")
        if label.strip().lower() == "homepage":
            return plain(url.strip())[:LONGEST]
    return plain(headers.get("Home-page", ""))[:LONGEST]


# faults that metadata and source text show -----------------------------------------------------------------------------------------------


def fault_of(name: str, value: str, group: str, headers: Message, versions: dict[str, str | None], times: int) -> str | None:
    """Why an entry point cannot be used, or None as far as can be seen without importing it."""
    try:
        if not NAME.fullmatch(name) or len(name) > 60:
            return "its name must be small letters and digits, joined by one _, - or ., a letter first, 60 at most"
        if times > 1:
            return "its own metadata names it twice"
        if why := unmet(headers, versions, every=group == PLUGINS):
            return why
        match = EntryPoint.pattern.match(value)
        if not match:
            return f"entry point {plain(value)!r} is not 'module:name'"
        if not match.group("attr"):
            return f"entry point {plain(value)!r} names a module; it must be 'module:{'PluginClass' if group == PLUGINS else 'name'}'"
        return source_fault(match.group("module"), match.group("attr"))
    except Exception as error:  # whatever a foreign package does to the libraries that look at it
        return said(error)


def unmet(headers: Message, versions: dict[str, str | None], every: bool) -> str | None:
    """The first requirement that does not hold here; where not ``every`` one counts, those on diffgraft itself."""
    python = str(headers.get("Requires-Python", ""))
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        return f"needs Python {python}, this is {platform.python_version()}"
    for text in map(str, headers.get_all("Requires-Dist") or ()):
        try:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(requirement.name)
            core = name in ("diffgraft", "diffgraft-core")  # both are released together
            if not (every or core):
                continue
            if name not in versions:
                versions[name] = core_version() if core else version_of(name)
            here = versions[name]
            if here is None:
                return f"needs {plain(name)}, which is not installed: `pip install {plain(name)}`"
            if not requirement.specifier.contains(here, prereleases=True):
                return f"needs {plain(name)} {requirement.specifier}, installed is {here}"
        except Exception as error:  # packaging's own kinds, and whatever an odd version or marker leads to
            return f"requirement {plain(text)!r} in its metadata: {said(error)}"
    return None


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return str(headers_of(distribution(name))[0].get("Version", "?"))
    except (PackageNotFoundError, ValueError):
        return None


@cache
def core_version() -> str:
    """The version of the core that runs."""
    return version("diffgraft-core")


def source_fault(module: str, attribute: str) -> str | None:
    """What is wrong with the module of an entry point as its file shows it."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except Exception as error:  # a broken finder, or a module that is half there
        return f"module {top!r}: {said(error)}"
    if spec is None:
        return f"module {top!r} is not installed"
    if module != top or not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        number = contract_in(spec.origin, attribute, os.stat(spec.origin).st_mtime_ns)
    except Exception as error:  # unreadable, no Python, nested too deep for the parser
        return said(error)
    if number in (None, API):
        return None
    older = "diffgraft" if number > API else "the plugin"
    return f"it was written for contract {number}, this diffgraft speaks {API}; upgrade {older}"


@cache
def contract_in(source: str, name: str, changed: int) -> int | None:
    """The contract number that a class names in its own text; a file's text is looked at once, which takes a list most of its time."""
    text = Path(source).read_bytes() if os.path.getsize(source) <= LARGEST else b""
    said_so = CONTRACT.search(text)
    if is_compiled(source) and not said_so:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(importlib.util.decode_source(text), source)
    for node in tree.body if said_so else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
                value = getattr(line, "value", None)
                if any(isinstance(one, ast.Name) and one.id == "api" for one in targets) and isinstance(value, ast.Constant):
                    return value.value if isinstance(value.value, int) else None
    return None


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
