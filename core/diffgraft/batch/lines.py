"""prompts.jsonl: one JSON object a line, read as a stream. A line that cannot be used is named, and stops no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffgraft.installed.errors import ConfigError, choices
from diffgraft.installed.foreign import brief

LEAST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1
"""Those of `methods/inputs.py`, which imports torch; whoever reads or waits needs none."""
LONGEST = 1_000_000
"""Bytes of a line."""
NUMBERED = "line-"
"""What the names of results begin with whose line has no id."""
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A name that is a file's name on every system."""


class PromptLine(BaseModel):
    """What a line may say; what it does not say is the command's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    id: Id | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(None, ge=LEAST_SEED, le=LARGEST_SEED)
    class_label: int | str | None = None
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    args: dict[str, Any] = {}


@dataclass(frozen=True)
class Broken:
    """A line that cannot be used, by its number in the file (from 1), and why."""

    number: int
    why: str


def check_prompts(path: Path) -> None:
    """Raises ConfigError for what is no file of prompts: it is read more than once, which a pipe cannot be."""
    if not path.is_file():
        fault = "that is no file" if path.exists() else "there is no such file"
    elif next(read_lines(path), None) is None:
        fault = "there is no line in it"
    else:
        return
    raise ConfigError(f'{path}: {fault}; write one JSON object a line: {{"prompt": "a big panda"}}')


def read_lines(path: Path) -> Iterator[tuple[int, PromptLine] | Broken]:
    """Each line that is not blank, with its number."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST:
                skip_rest(raw, file)
                yield Broken(number, f"longer than {LONGEST:,} bytes")
            elif raw := raw.removeprefix(b"\xef\xbb\xbf").strip():
                yield parsed(number, raw)


def skip_rest(raw: bytes, file: BinaryIO) -> None:
    """To the end of a line of which ``raw`` was read."""
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(LONGEST)


def parsed(number: int, raw: bytes) -> tuple[int, PromptLine] | Broken:
    """One line."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except json.JSONDecodeError as error:
        return Broken(number, f"no JSON: {error.msg} at character {error.pos + 1}")
    except UnicodeDecodeError:
        return Broken(number, "no UTF-8")
    except (ValueError, RecursionError) as error:
        return Broken(number, f"no JSON: {error}")
    if not isinstance(value, dict):
        return Broken(number, f'{brief(value)} is no object; write {{"prompt": "..."}}')
    try:
        line = PromptLine.model_validate(value)
    except ValidationError as error:
        return Broken(number, "; ".join(fault(each) for each in error.errors()[:3]))
    if (line.id or "").lower().startswith(NUMBERED):
        return Broken(number, f"id: {line.id!r} begins with {NUMBERED!r}, as the names of lines without an id do; choose another")
    return number, line


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number here")


def fault(error: Any) -> str:
    """One error of pydantic as "key = value: what is wrong"."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{brief(key)}: no key of a line{choices(key, PromptLine.model_fields, 'A line has')}"
    return f"{key} = {brief(error['input'])}: {error['msg']}"
