"""From a plugin's knobs to what one can turn on a page, and back to values: pure, by the JSON schema of its ``Config``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffgraft.community.tables import knobs
from diffgraft.installed.errors import ConfigError
from diffgraft.installed.foreign import brief
from diffgraft.installed.plugin import Plugin

Kind = Literal["switch", "slider", "number", "choice", "text", "file", "pipeline", "fixed"]

NAMES = {"pipeline": "pipeline"} | dict.fromkeys(("artefact", "inversion", "search", "fit", "adapter", "weights", "encoder"), "file")
"""Kinds of needs that a name stands for; the others (a reward, a problem) are code or text with code in it, and are for Python."""
LONGEST = 4000
"""Characters of a text that a browser may send."""
SPAN = 1000
"""A slider has at most so many places for whole numbers; more are typed."""


@dataclass(frozen=True)
class Control:
    """One knob on the page.

    kind      "switch", "slider" (both bounds known), "number", "choice", "text" (read as JSON where it is some), "file" and "pipeline" (a
              name that `Access` must allow), "fixed" (an object: it is set in Python)
    default   as the page shows it; None: nothing
    whole     only whole numbers
    optional  nothing may be given
    allowed   range or choices in words
    """

    name: str
    kind: Kind
    default: Any
    description: str
    allowed: str
    low: float | None = None
    high: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()
    optional: bool = False

    @property
    def step(self) -> float:
        """A slider's step: 1, or a hundredth of the range in a round number."""
        if self.whole or self.low is None or self.high is None or self.high <= self.low:
            return 1
        return float(10.0 ** math.floor(math.log10((self.high - self.low) / 50)))


def controls_of(cls: type[Plugin]) -> list[Control]:
    """The controls of a plugin class, in the order of its knobs."""
    schemas = cls.Config.model_json_schema().get("properties", {})
    named = {need.knob: need.kind for need in cls.needs}
    found = []
    for knob in knobs(cls):
        default = None if knob.default == "required" else plain(knob.default)
        found.append(control(knob.name, schemas.get(knob.name, {}), default, knob.description, knob.allowed, named.get(knob.name)))
    return found


def control(name: str, schema: Mapping[str, Any], default: Any, description: str, allowed: str, need: str | None = None) -> Control:
    """One knob's JSON schema as a control."""
    forms = [form for form in schema.get("anyOf", [schema]) if form.get("type") != "null"]
    optional = len(forms) < len(schema.get("anyOf", [schema]))
    said = {"default": default, "description": description, "allowed": allowed, "optional": optional}
    if need is not None:
        return Control(name, NAMES.get(need, "fixed"), **said)  # type: ignore[arg-type]
    if len(forms) != 1:
        return Control(name, "text" if all(is_data(form) for form in forms) and forms else "fixed", **said)
    (form,) = forms
    if "enum" in form or "const" in form:
        return Control(name, "choice", choices=tuple(form.get("enum", [form.get("const")])), **said)
    kind = form.get("type")
    if kind == "boolean" and not optional:
        return Control(name, "switch", **said)
    if kind in ("integer", "number") and not optional:  # a field of numbers cannot be empty
        low, high = form.get("minimum", form.get("exclusiveMinimum")), form.get("maximum", form.get("exclusiveMaximum"))
        whole = kind == "integer"
        slides = None not in (low, high) and not (whole and high - low > SPAN)
        return Control(name, "slider" if slides else "number", low=low, high=high, whole=whole, **said)
    return Control(name, "text" if is_data(form) else "fixed", **said)


def is_data(form: Mapping[str, Any]) -> bool:
    """Whether values of a schema can be typed: numbers, words and lists of them."""
    kind = form.get("type")
    if kind == "array":
        inside = form.get("prefixItems") or [form.get("items") or {}]
        return all(is_data(each) for each in inside)
    if "anyOf" in form:
        return all(is_data(each) or each.get("type") == "null" for each in form["anyOf"])
    return kind in ("integer", "number", "string", "boolean") or "enum" in form or "const" in form


def plain(value: Any) -> Any:
    """A default as JSON has it; None for what has no such form."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def value_of(knob: Control, shown: Any) -> Any:
    """What the page says as a knob's value; the plugin's own check has the last word.

    Raises:
        ConfigError: what no knob takes (a number that is not finite, a text without end), or a knob that is set in Python.
    """
    if knob.kind == "fixed":
        raise ConfigError(f"{knob.name}: this knob takes an object: set it in Python")
    if shown is None or shown == "":
        return None
    if isinstance(shown, float) and not math.isfinite(shown):
        raise ConfigError(f"{knob.name} = {shown} is no finite number")
    if isinstance(shown, float) and knob.whole and shown.is_integer():
        return int(shown)
    if not isinstance(shown, str):
        return shown
    if len(shown) > LONGEST:
        raise ConfigError(f"{knob.name}: a text of {len(shown)} characters; at most {LONGEST}")
    return read(knob.name, shown) if knob.kind == "text" else shown


def read(name: str, text: str) -> Any:
    """A text as JSON reads it ([1, 2], 0.3, true), else the text itself.

    Raises:
        ConfigError: brackets too deep to be read, or a number of more digits than Python reads.
    """
    try:
        return json.loads(text, parse_constant=lambda constant: constant)
    except json.JSONDecodeError:
        return text
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{name} = {brief(text)}: {error}") from None


def set_knobs(cls: type[Plugin], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Of what the page shows of a plugin, the knobs that differ from their defaults.

    Raises:
        ConfigError: see `value_of`.
    """
    found = {}
    for knob in controls_of(cls):
        if knob.name in shown:
            value = value_of(knob, shown[knob.name])
            if value != knob.default or type(value) is not type(knob.default):
                if value is None and not knob.optional:
                    continue  # an emptied field: the default
                found[knob.name] = value
    return found


def typed(value: Any) -> str:
    """A value in a text field, from which `read` makes it again."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
