"""Plugin knobs: a pydantic model per plugin, whose errors come out in our own tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from diffgraft.installed.errors import ConfigError, choices
from diffgraft.installed.foreign import brief


class PluginConfig(BaseModel):
    """Base of every plugin's ``Config``: immutable, unknown keys refused, defaults checked like given values.

    Each field's ``description`` names the paper's symbol and the unit or range; the CLI and the docs are generated from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def ensure_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Where numbers alone are meant, pydantic would take ``True`` for 1 and ``"3"`` for 3."""
        kinds = kinds_in(cls.model_fields[str(info.field_name)].annotation, isinstance(value, (list, tuple)))
        if kinds <= {int, float, NoneType, Ellipsis} and (wrong := [each for each in within(value) if is_disguised(each)]):
            raise ValueError(f"{brief(wrong[0])} is no number")
        return value


def kinds_in(annotation: Any, several: bool = False) -> set[Any]:
    """The types that a knob is made of: those inside its tuples and alternatives; ``several``: of those alternatives that are tuples."""
    if several and get_origin(annotation) in (Union, UnionType):
        return set().union(*map(kinds_in, [form for form in get_args(annotation) if get_origin(form) in (tuple, list)] or [annotation]))
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return set().union(*map(kinds_in, get_args(annotation))) or {annotation}


def is_disguised(value: Any) -> bool:
    """Whether pydantic would make a number of it: a truth value, a text with a number in it."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
    return isinstance(value, (bool, str))


def within(value: Any) -> Iterator[Any]:
    """A value, or what is in it."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from within(each)
    else:
        yield value


def build_config(plugin: str, model: type[PluginConfig], values: Mapping[str, Any]) -> PluginConfig:
    """``values`` as a ``model``; raises ConfigError that names every bad key, its value and what is allowed."""
    try:
        return model(**values)
    except ValidationError as error:
        lines = []
        for item in of_one_form(error.errors(), model):
            key = ".".join(str(part) for part in item["loc"])
            says = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]  # without "Value error, "
            if item["type"] == "extra_forbidden":
                lines.append(f"unknown knob {key!r}{choices(key, model.model_fields, 'Knobs')}")
            else:
                lines.append(f"{key} = {brief(item['input'])}: {says}" if key else says)  # of the knobs together: it names them itself
        raise ConfigError(f"plugin {plugin!r}: " + " ".join(line if line.endswith(".") else f"{line}." for line in lines)) from None


def of_one_form(errors: Sequence[Any], model: type[PluginConfig]) -> Iterator[Mapping[str, Any]]:
    """Errors as of a value of one form. For a knob of several (a word, or numbers) pydantic gives those of each form.

    A value that is like none of them is told them all; numbers of which one is wrong are told that one.
    """
    for key, group in itertools.groupby(errors, lambda item: item["loc"][:1]):
        items = list(group)
        if not several_forms(model, key) or len(items[0]["loc"]) < 2:
            yield from items
        elif inside := [item for item in items if len(item["loc"]) > 2]:  # what follows the knob is the form's name
            yield from ({**item, "loc": (*key, *item["loc"][2:])} for item in inside)
        else:
            yield {**items[0], "loc": key, "type": "form", "msg": f"give {allowed(model, key[0])}"}


def several_forms(model: type[PluginConfig], key: tuple[Any, ...]) -> bool:
    """Whether a knob's value may be of several types, none aside."""
    field = model.model_fields.get(key[0]) if key else None
    if field is None or get_origin(field.annotation) not in (Union, UnionType):
        return False
    return len([form for form in get_args(field.annotation) if form is not NoneType]) > 1


def is_at(config: PluginConfig, settings: Mapping[str, Any]) -> bool:
    """Whether these are a config's settings, in whatever form they are written: one number where it holds a tuple, say."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    try:
        there = type(config)(**{**given, **settings})
    except ValidationError:  # not beside the other knobs
        return False
    return all(getattr(config, name) == getattr(there, name) for name in settings)


def allowed(model: type[PluginConfig], key: str) -> str:
    """The range or choices of a knob in words, for tables (``"integer, >= 1 or none"``)."""
    schema = model.model_json_schema()["properties"][key]
    options = [in_words(option) for option in schema.get("anyOf", [schema])]
    return " or ".join(dict.fromkeys(option for option in options if option))


def in_words(schema: Mapping[str, Any]) -> str:
    """One JSON schema of a value in words."""
    if schema.get("type") == "null":
        return "none"
    if "enum" in schema:
        words = [" | ".join(repr(choice) for choice in schema["enum"])]
    elif "const" in schema:
        words = [repr(schema["const"])]
    else:
        words = [str(schema["type"])] if "type" in schema else []
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return ", ".join([*words, *(f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema)])
