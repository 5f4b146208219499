"""Finding plugins, families, bundled pipelines and kinds of needs by name. Listing imports none of them (`offers.py`); what is named is
imported, checked, and refused with the package's name when it is not what it should be."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from diffgraft.installed.errors import BrokenPlugin, DiffgraftError, PipelineNotFound, PluginNotFound, Unsupported, choices, nearest
from diffgraft.installed.family import Bundled, Family
from diffgraft.installed.offers import ALLOW, API, FAMILIES, NEEDS, PIPELINES, PLUGINS, Offer, allow_list, blamed, offers, own_names

if TYPE_CHECKING:
    from diffgraft.installed.plugin import Plugin

__all__ = ["ALLOW", "PLUGINS", "Offer", "allow_list", "blamed", "offers"]
CHECKPOINTS = "diffgraft-checkpoints"
NO_FAMILY = "no pipeline family is installed, so nothing is known of any pipeline: `pip install diffgraft-families`"


def installed() -> dict[str, Offer]:
    """All installed plugins by name, from entry points and metadata; nothing is imported."""
    return by_name(PLUGINS)


def by_name(group: str, name: str | None = None) -> dict[str, Offer]:
    """The offers of a group (or that of one name) by name; where several packages claim one, its owner's, else a broken one."""
    found: dict[str, Offer] = {}
    for offer in offers(group, name):
        if offer.name not in found or (found[offer.name].broken and not offer.broken):
            found[offer.name] = offer
    return found


def named(name: str) -> Offer:
    """The offer of one plugin; nothing is imported.

    Raises:
        PluginNotFound: nothing of that name is installed.
    """
    info = by_name(PLUGINS, name).get(name)
    if info is None:  # no pip line: the name of a package is never made up from what somebody typed
        raise PluginNotFound(
            f"no plugin {name!r} is installed{choices(name, installed(), 'Installed')} `diffgraft search` lists those that are published."
        )
    return info


def find(name: str) -> type[Plugin]:
    """Import one plugin by name.

    Raises:
        PluginNotFound: not installed, or not on the allow-list.
        BrokenPlugin: it cannot be imported, is not a Plugin, or was written for another contract number.
    """
    info = named(name)
    loaded = info.load()
    check_class(loaded, str(info))
    if loaded.name != name:
        raise BrokenPlugin(f"{info} calls itself {loaded.name!r}; the two names must agree")
    return loaded  # type: ignore[no-any-return]


def check_class(cls: object, what: str) -> None:
    """Raises BrokenPlugin unless ``cls`` is a complete plugin class for this contract."""
    from diffgraft.installed.plugin import Plugin  # it brings pydantic, which a list does not need

    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        with blamed(f"{what} is not a subclass of diffgraft.Plugin, and"):
            words = repr(cls)
        raise BrokenPlugin(f"{what} is {words[:200]}, not a subclass of diffgraft.Plugin")
    if cls.api != API:
        newer = isinstance(cls.api, int) and cls.api > API
        raise BrokenPlugin(
            f"{what} was written for contract {cls.api!r}, this diffgraft speaks {API}; upgrade {'diffgraft' if newer else 'the plugin'}"
        )
    missing = [name for name in ("name", "paper", "families", "neutral") if not hasattr(cls, name)]
    if missing:
        raise BrokenPlugin(f"{what} does not declare {', '.join(missing)}")
    if strange := sorted(set(cls.neutral) - cls.Config.model_fields.keys()):
        raise BrokenPlugin(f"{what} is neutral at {', '.join(map(repr, strange))}, and has no such knob")
    if not cls.points() and cls.scheduler is None:
        raise BrokenPlugin(f"{what} implements no hook point")


# families ------------------------------------------------------------------------------------------------------------------------------


def load_families(*, ours: bool = False) -> tuple[dict[str, Family], dict[str, str]]:
    """(families by name, error by offer); only this project's when ``ours``. It imports no torch, and a broken one breaks no other."""
    return _load_families(ours, tuple(sys.path), os.environ.get(ALLOW))


@cache
def _load_families(ours: bool, path: tuple[str, ...], allow: str | None) -> tuple[dict[str, Family], dict[str, str]]:
    known: dict[str, tuple[Offer, Family]] = {}
    faults: dict[str, str] = {}
    for offer in offers(FAMILIES):
        if offer.allowed and (offer.ours or not ours):
            try:
                known[offer.name] = offer, checked(offer, offer.load(), Family)
            except BrokenPlugin as error:
                faults[str(offer)] = str(error)
    for pipeline in {name for _, family in known.values() for name in family.pipelines}:
        claim = [(offer, family) for offer, family in known.values() if pipeline in family.pipelines]
        for offer, _ in claim:
            if len(claim) > 1 and not offer.ours:
                others = " and ".join(str(other) for other, _ in claim if other is not offer)
                faults[str(offer)] = f"{offer} describes {pipeline}, and so does {others}; uninstall one"
    return {name: family for name, (offer, family) in known.items() if str(offer) not in faults}, faults


def checked(offer: Offer, made: Any, cls: type[Any]) -> Any:
    """What an offer stands for, if it is a ``cls`` of that name whose facts have the types that the class says.

    Raises:
        BrokenPlugin: it is not.
    """
    if not isinstance(made, cls):
        raise BrokenPlugin(f"{offer} is a {type(made).__name__}, not a diffgraft.{cls.__name__}")
    with blamed(f"{offer} is not a complete {cls.__name__}"):
        facts_of(cls).validate_python(asdict(made))  # type: ignore[arg-type]  # mypy takes a class for unhashable
    if made.name != offer.name:
        raise BrokenPlugin(f"{offer} calls itself {made.name!r}; the two names must agree")
    return made


@cache
def facts_of(cls: Any) -> Any:
    """What holds values against the types of a dataclass's fields."""
    from pydantic import TypeAdapter  # nothing of it is needed before something is loaded

    return TypeAdapter(cls)


def families() -> dict[str, Family]:
    """All families that could be loaded, by name."""
    return load_families()[0]


def family_of(names: list[str]) -> tuple[Family, str] | None:
    """(the family that describes the first of these pipeline classes that is known, its name). Other packages' are looked into, and so
    imported, only where this project's own know none."""
    for ours in (True, False):
        by_class = {name: family for family in load_families(ours=ours)[0].values() for name in family.pipelines}
        for name in names:
            if name in by_class:
                return by_class[name], name
    return None


def find_family(pipeline_class: type) -> Family:
    """The family of a pipeline class, or of the nearest class it inherits from.

    Raises:
        Unsupported: a package that such pipelines cannot run without is not installed; or no family knows it, and then the text lists
            what a family must say, or what to install when there is no family at all.
    """
    found = family_of([cls.__name__ for cls in pipeline_class.__mro__])
    if found is not None:
        if lacking := missing_packages(*found):
            raise Unsupported(
                f"{found[1]} cannot make a picture without {', '.join(lacking)}, which is not installed: `pip install {' '.join(lacking)}`"
            )
        return found[0]
    known, faults = load_families()
    if not known and not faults:
        raise Unsupported(f"{pipeline_class.__name__}: {NO_FAMILY}")
    by_class = [name for family in known.values() for name in family.pipelines]
    facts = ", ".join(field.name for field in fields(Family))
    broken = f" Families that could not be loaded: {'; '.join(faults.values())}." if faults else ""
    raise Unsupported(
        f"no family describes {pipeline_class.__name__}{nearest(pipeline_class.__name__, by_class)} A family is data: a "
        f"diffgraft.Family({facts}) registered through the entry-point group {FAMILIES!r}.{broken}"
    )


def missing_packages(family: Family, pipeline: str) -> list[str]:
    """The packages that this pipeline class cannot run without and that are not installed."""
    return [name for name, needy in family.packages.items() if pipeline in needy and importlib.util.find_spec(name) is None]


# bundled pipelines, kinds of needs -------------------------------------------------------------------------------------------------------


def find_named(group: str, name: str) -> Any:
    """What an offer of a group stands for; None where nothing of that name is offered.

    Raises:
        PluginNotFound, BrokenPlugin: it may not be loaded, or cannot.
    """
    offer = by_name(group, name).get(name)
    return None if offer is None else offer.load()


def find_need(kind: str, plugin: str) -> Callable[[Any, Any, Any, Any], Any]:
    """The function (plugin, need, value, target) -> thing that fetches and checks what plugins need of this kind.

    Raises:
        BrokenPlugin: nothing that is installed offers it, or what does is broken.
        PluginNotFound: it is not on the allow-list.
    """
    found = find_named(NEEDS, kind)
    if found is None:
        known = choices(kind, by_name(NEEDS), "Known")
        raise BrokenPlugin(f"plugin {plugin!r} needs something of an unknown kind {kind!r}{known}")
    if not callable(found):
        raise BrokenPlugin(f"{by_name(NEEDS, kind)[kind]} is a {type(found).__name__}, not callable")
    return found  # type: ignore[no-any-return]


def bundled() -> dict[str, Bundled]:
    """All bundled checkpoints that can be used, by name."""
    found = {}
    for name in bundled_names():
        try:
            found[name] = find_bundled(name)
        except DiffgraftError:  # `doctor` says what is wrong with it, and so does naming it
            continue
    return found


def bundled_names() -> list[str]:
    """Names of the bundled checkpoints, without importing their packages."""
    return [name for name, offer in by_name(PIPELINES).items() if offer.allowed and not offer.broken]


def find_bundled(name: str) -> Bundled:
    """One bundled checkpoint.

    Raises:
        PipelineNotFound: there is none of that name, with the nearest names.
        PluginNotFound, BrokenPlugin: it may not be loaded, or cannot.
    """
    offer = by_name(PIPELINES, name).get(name)
    if offer is not None:
        return checked(offer, offer.load(), Bundled)  # type: ignore[no-any-return]
    known = bundled_names()
    dist = own_names()[PIPELINES].get(name, CHECKPOINTS)
    here = importlib.util.find_spec(dist.replace("-", "_")) is not None
    brings = "" if here else f"`pip install {dist}` brings small ones that run offline. "
    raise PipelineNotFound(
        f"{name!r} is no bundled pipeline{nearest(name, known)} "
        f"Bundled: {', '.join(known) or 'none'}. {brings}"
        "Otherwise give a folder that exists or a Hub id 'owner/name'."
    )


def bundled_of(name: str | os.PathLike[str]) -> Bundled | None:
    """The bundled checkpoint of this name; None for a folder (which goes first) or a Hub id."""
    text = os.fspath(name)
    return find_bundled(text) if text in bundled_names() and not os.path.isdir(name) else None


def resolve(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder or Hub id behind a pipeline name: an existing folder, then a bundled name, then ``owner/name`` on the Hub."""
    if os.path.isdir(name):
        return name
    if (bundled := bundled_of(name)) is not None:
        return bundled.path
    text = os.fspath(name)
    if isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    return find_bundled(text).path  # raises PipelineNotFound
