"""How a stack is written down: the fields of a stack file and of a preset, their versions, and YAML that is only data.

A stack file::

    diffgraft_stack: 1
    family: sd
    pipeline: StableDiffusionPipeline
    diffgraft: 0.1.0
    plugins:
    - name: deepcache
      package: diffgraft-deepcache
      version: 0.1.0
      knobs: {interval: 2}

A file that a knob names stands there as ``{$file: PATH, sha256: ...}``, its path relative to the stack file, or as
``{$hub: owner/name/file, sha256: ...}``; a folder (a second pipeline) as ``{$folder: PATH}``, without a checksum.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from diffgraft.installed.errors import ConfigError
from diffgraft.installed.foreign import brief, plain, said

STACK = "diffgraft_stack"
PRESET = "diffgraft_preset"
"""The first key of such a file: the number of its schema."""
SCHEMA = 1
"""Number of both schemas. It goes up where an older diffgraft would misread a file, and only then."""
LARGEST = 2_000_000
"""Bytes that such a file may have."""

Line = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text of one line without control characters: it is printed on terminals."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*([_.-][a-z0-9]+)*$", max_length=60)]
Knobs = dict[Annotated[str, Field(max_length=100)], Any]
M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Member(Strict):
    """One plugin of a stack; ``knobs`` are those that were set."""

    name: Name
    package: Line | None = None
    version: Line | None = None
    enabled: bool = True
    knobs: Knobs = {}


class Measured(Strict):
    """What a stack was measured at, for whoever reads the file; nothing follows from it when it is loaded.

    pipeline  name, as ``load_pipeline`` takes it
    call      arguments of the calls, the number of steps among them
    figures   name -> number, or [middle, low, high]
    """

    pipeline: Line | None = None
    call: dict[str, Any] = {}
    figures: dict[str, float | tuple[float, float, float] | str] = {}
    command: Line | None = None
    versions: dict[str, str] = {}
    machine: Line | None = None


class StackFile(Strict):
    """A whole stack file, outermost plugin first. ``family`` None: for any that its plugins take."""

    diffgraft_stack: Literal[1] = 1
    family: Name | None = None
    pipeline: Line | None = None
    diffgraft: Line | None = None
    plugins: tuple[Member, ...] = Field((), max_length=200)
    measured: Measured | None = None

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [member.name for member in self.plugins]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands in it twice")
        return self


def compiles(pattern: str) -> str:
    """Raises ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


class Source(Strict):
    """Where a preset's settings come from: ``where`` names paper and place in it, repository and file, or what was measured."""

    kind: Literal["paper", "official", "measured"]
    where: Line
    command: Line | None = None

    @model_validator(mode="after")
    def _repeatable(self) -> Self:
        if self.kind == "measured" and self.command is None:
            raise ValueError("of our own measurement: name the command that repeats it")
        return self


class Preset(Strict):
    """Settings of one plugin for some models.

    models  regular expression that the whole of a model's Hub id, folder name or bundled name matches, in any case
    call    arguments of the pipeline's call that belong to them; told, not applied
    tested  whether it was run here on such a model
    """

    diffgraft_preset: Literal[1] = 1
    models: Annotated[str, Field(min_length=1, max_length=300), AfterValidator(compiles)]
    knobs: Knobs
    call: dict[str, Any] = {}
    source: Source
    tested: bool
    note: Line | None = None

    def is_for(self, model: str) -> bool:
        """Whether a model of this name is one of those that it was made for."""
        return re.fullmatch(self.models, model, re.IGNORECASE) is not None


class Loader(yaml.SafeLoader):
    """Plain data alone: no tags that make objects, no aliases (a short file can mean a huge one), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name): write it out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, Hashable) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {brief(key)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Texts with signs that YAML takes for line ends are quoted, so that they come back as they are."""

    def text(self, value: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


Dumper.add_representer(str, Dumper.text)


def parse(text: str, source: str, model: type[M], key: str) -> M:
    """The text of a file as a ``model``.

    Raises:
        ConfigError: no YAML, not such a file, of a newer schema, or with fields that are none: every one of them is named.
    """
    what = "stack file" if key == STACK else "preset"
    try:
        value = from_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source} is no {what}: {said(error)}") from None
    if not isinstance(value, dict) or key not in value:
        raise ConfigError(f"{source} is no {what}: its first line would be `{key}: {SCHEMA}`")
    number = value[key]
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"{source}: {key} = {brief(number)}: a number of a schema, 1 to {SCHEMA}")
    if number > SCHEMA:
        raise ConfigError(
            f"{source} was written by a newer diffgraft ({what}, schema {number}; this reads {SCHEMA}): `pip install --upgrade diffgraft`"
        )
    try:
        return model.model_validate(value)
    except (ValidationError, RecursionError) as error:
        found = error.errors(include_url=False) if isinstance(error, ValidationError) else []
        faults = [f"{'.'.join(map(str, one['loc'])) or 'file'} = {brief(one['input'])}: {plain(one['msg'])}" for one in found[:10]]
        raise ConfigError(f"{source} is no {what} of schema {SCHEMA}: {'; '.join(faults) or said(error)}") from None


def written(model: Strict) -> str:
    """The text of a file: what is not said stays out, the innermost lists and mappings in one line."""
    data = {**model.model_dump(mode="python", exclude_defaults=True)}
    key = STACK if isinstance(model, StackFile) else PRESET
    return as_yaml({key: SCHEMA, **data})


def as_yaml(value: Any) -> str:
    """Plain data as YAML, keys in their order."""
    return str(yaml.dump(listed(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120))


def from_yaml(text: str) -> Any:
    """And back; raises YAMLError, or ValueError (a date that is none)."""
    return yaml.load(text, Loader)  # a kind of SafeLoader


def listed(value: Any) -> Any:
    """The same with lists for tuples, which YAML has none of."""
    if isinstance(value, dict):
        return {key: listed(each) for key, each in value.items()}
    return [listed(each) for each in value] if isinstance(value, (list, tuple)) else value
