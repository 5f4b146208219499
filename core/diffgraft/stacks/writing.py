"""From live plugins to a stack file that gives the same plugins back, bit for bit: held against the plugins before it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, DiffgraftError
from diffgraft.installed.foreign import brief, said
from diffgraft.installed.offers import PLUGINS, core_version
from diffgraft.installed.plugin import Plugin
from diffgraft.stacks.atomic import write_atomic
from diffgraft.stacks.reading import SUFFIXES
from diffgraft.stacks.references import FILE, FOLDER, refer, referred
from diffgraft.stacks.schema import Measured, Member, StackFile, as_yaml, from_yaml, written

HEAD = "# A stack of diffgraft plugins: load_pipeline(..., plugins=THIS FILE), or `diffgraft run PIPELINE --stack THIS FILE`.\n"

Refer = Callable[[Any, str], Any]


def write_stack(
    path: str | os.PathLike[str],
    plugins: Sequence[tuple[Plugin, bool]],
    family: str | None,
    pipeline: str | None = None,
    *,
    measured: Measured | Mapping[str, Any] | None = None,
    copy_files: bool = False,
) -> Path:
    """Write plugins, outermost first, with the knobs that were set.

    Args:
        path: of the file, ending in .yaml or .yml.
        plugins: each with whether it is switched on.
        family, pipeline: what it was made for: a family's name, a pipeline class.
        measured: what it was measured at (the fields of `Measured`).
        copy_files: put the files that knobs name beside it, so that the folder can be handed on.

    Raises:
        ConfigError: a knob holds what no file can (a live pipeline, a tensor, a function), or a plugin is not of an installed package;
            nothing is written.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ConfigError(f"{path}: the name of a stack file ends in .yaml or .yml, and it is no folder")
    home, copies = path.parent, dict[Path, Path]()

    def refer_to(value: Any, key: str) -> dict[str, str]:
        if not copy_files or key not in (FILE, FOLDER):
            return refer(value, key, home)
        source = Path(value).expanduser().resolve()
        target = copies.setdefault(source, free_name(home, source, copies.values()))
        return {**refer(source, key, source.parent), key: target.name}

    members = [member_of(plugin, enabled, refer_to) for plugin, enabled in plugins]
    made = StackFile(family=family, pipeline=pipeline, diffgraft=core_version(), plugins=tuple(members), measured=as_measured(measured))
    text = HEAD + written(made)
    home.mkdir(parents=True, exist_ok=True)
    for source, target in copies.items():
        copied(source, target)
    write_atomic(path, text.encode())
    return path


def as_measured(measured: Measured | Mapping[str, Any] | None) -> Measured | None:
    """Raises ConfigError for what is none, or cannot be written."""
    if measured is None:
        return None
    try:
        facts = measured if isinstance(measured, Measured) else Measured.model_validate(dict(measured))
        as_yaml(facts.model_dump())
    except (ValidationError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"measured: {said(error)}; its fields: {', '.join(Measured.model_fields)}") from None
    return facts


def member_of(plugin: Plugin, enabled: bool, refer_to: Refer) -> Member:
    """One plugin as it stands in a stack file."""
    offer = registry.by_name(PLUGINS, plugin.name).get(plugin.name)
    if offer is None or registry.find(plugin.name) is not type(plugin):
        raise ConfigError(
            f"plugin {plugin.name!r} was given as a class that no installed package offers by this name; a stack file names plugins: "
            "put it into a package (`diffgraft new`), or take it off before saving"
        )
    kinds = {need.knob: need.kind for need in plugin.needs}
    knobs = {}
    for knob, value in plugin.own_knobs.items():
        where = f"plugin {plugin.name!r}: knob {knob!r}"
        try:
            knobs[knob] = stored(value, kinds.get(knob), refer_to)
        except TypeError as error:
            raise ConfigError(
                f"{where} holds {error}, which no file can hold: give it by a name (a path, a Hub id, a registered name), then save"
            ) from None
        except OSError as error:
            raise ConfigError(f"{where} = {brief(value)} cannot be read: {said(error)}") from error
    ensure_same(plugin, kinds)
    return Member(name=plugin.name, package=offer.dist, version=offer.version, enabled=enabled, knobs=knobs)


def stored(value: Any, kind: str | None, refer_to: Refer) -> Any:
    """A knob's value as plain data, with ``refer_to(value, key)`` in the place of each name of a file or folder.

    Raises:
        TypeError: it is something else; the text names what.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, (str, Path)):
        key = referred(value, kind)
        return os.fspath(value) if key is None else refer_to(value, key)
    if isinstance(value, BaseModel):
        return {name: stored(getattr(value, name), kind, refer_to) for name in type(value).model_fields if name in value.model_fields_set}
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) not in (str, int) or str(key).startswith("$")]:
            raise TypeError(f"a mapping with the key {brief(odd[0])}")
        return {key: stored(each, kind, refer_to) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [stored(each, kind, refer_to) for each in value]
    name = getattr(value, "__qualname__", "")
    raise TypeError(f"the function {name}" if callable(value) and name else f"a {type(value).__name__}")


def ensure_same(plugin: Plugin, kinds: Mapping[str, str]) -> None:
    """Raises ConfigError where the plugin would not come back from a file as it is: what YAML and the knobs' own types make of its values
    is held against them."""
    named: list[Any] = []

    def remember(value: Any, key: str) -> dict[str, int]:
        named.append(value)
        return {key: len(named) - 1}

    def recalled(value: Any) -> Any:
        if isinstance(value, dict):
            if len(value) == 1 and str(*value).startswith("$"):
                return named[next(iter(value.values()))]
            return {key: recalled(each) for key, each in value.items()}
        return [recalled(each) for each in value] if isinstance(value, list) else value

    plain = {knob: stored(value, kinds.get(knob), remember) for knob, value in plugin.own_knobs.items()}
    try:
        anew = type(plugin)(**recalled(from_yaml(as_yaml(plain)))).own_knobs
    except (DiffgraftError, yaml.YAMLError) as error:
        raise ConfigError(f"plugin {plugin.name!r}: its knobs cannot be written and read again: {error}") from error
    for knob, value in plugin.own_knobs.items():
        if not alike(value, anew.get(knob)):
            raise ConfigError(
                f"plugin {plugin.name!r}: knob {knob!r} = {brief(value)} would come back from a file as {brief(anew.get(knob))}: give it "
                "in a form that YAML has (numbers, texts, lists, mappings)"
            )


def alike(one: Any, other: Any) -> bool:
    """Whether two values are of the same type and equal all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return [*one] == [*other] and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def free_name(home: Path, source: Path, taken: Collection[Path]) -> Path:
    """Where a copy of a file goes: its own name beside the stack file, with a number where two have it."""
    names = (f"{source.stem}{f'-{i}' if i else ''}{source.suffix}" for i in range(len(taken) + 1))
    return next(path for name in names if (path := home / name) not in taken)


def copied(source: Path, target: Path) -> None:
    """The file or folder at another place too."""
    if target.exists() and target.samefile(source):
        return
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        os.replace(part, target)
