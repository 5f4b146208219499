"""Plugin knobs: a pydantic model per plugin, whose errors come out in our own tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from diffgraft.errors import ConfigError, nearest


class PluginConfig(BaseModel):
    """Base of every plugin's ``Config``: immutable, unknown keys refused, defaults checked like given values.

    Each field's ``description`` names the paper's symbol and the unit or range; the CLI and the docs are generated from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True)


def build_config(plugin: str, model: type[PluginConfig], values: Mapping[str, Any]) -> PluginConfig:
    """Validate ``values`` against ``model``.

    Raises:
        ConfigError: naming every bad key, its value and what is allowed.
    """
    try:
        return model(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(the knobs together)"
            if item["type"] == "extra_forbidden":
                known = ", ".join(model.model_fields) or "none"
                lines.append(f"unknown knob {key!r}{nearest(key, model.model_fields)} (knobs: {known})")
            else:
                lines.append(f"{key} = {item['input']!r}: {item['msg']}")
        raise ConfigError(f"plugin {plugin!r}: " + "; ".join(lines)) from None


def allowed(model: type[PluginConfig], key: str) -> str:
    """The range or choices of a knob in words, for tables (``"int, >= 1"``)."""
    schema = model.model_json_schema()["properties"][key]
    parts = [schema["anyOf"][0] if "anyOf" in schema else schema][0]
    words = []
    if "enum" in parts:
        words.append(" | ".join(repr(choice) for choice in parts["enum"]))
    elif "const" in parts:
        words.append(repr(parts["const"]))
    elif "type" in parts:
        words.append(str(parts["type"]))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words += [f"{sign} {parts[name]:g}" for name, sign in bounds.items() if name in parts]
    if "anyOf" in schema and any(option.get("type") == "null" for option in schema["anyOf"]):
        words.append("or none")
    return ", ".join(words)
