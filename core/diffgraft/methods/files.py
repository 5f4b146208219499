"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffgraft.installed.errors import ConfigError
from diffgraft.stacks.atomic import write_atomic as write_atomic


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """The same for plain values as JSON."""
    write_atomic(Path(path), (json.dumps(value, indent=1) + "\n").encode())


def check_file(path: Path, suffixes: Collection[str], option: str = "--out") -> None:
    """Raises ConfigError for an output file that could not be written later, so that nothing is made in vain."""
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: the name must end in {'one of ' if len(suffixes) > 1 else ''}{', '.join(suffixes)}")
    check_folder(path.parent, option)
    if path.is_dir():
        raise ConfigError(f"{option} {path}: that is a folder")


def check_folder(path: Path, option: str = "--out") -> None:
    """Raises ConfigError when ``path`` can neither be used nor be made as a folder."""
    there = path
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{option}: {there} cannot be written to")


def partial_of(out: str | os.PathLike[str]) -> Path:
    """Where a long piece of work keeps what it has, until it is finished and ``out`` is written."""
    path = Path(out)
    return path.with_name(path.name + ".partial")


def work_digest(what: Mapping[str, Any]) -> str:
    """Tells one piece of work from another by all that its result follows from."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def claim(folder: Path, what: str, digest: str) -> None:
    """Begin a long piece of work in ``folder``, or go on with it there; ``digest`` tells one from another.

    Raises:
        ConfigError: the folder holds an unfinished one of something else.
    """
    path = folder / f"{what}.json"
    if not path.exists():
        write_json(path, {"digest": digest})
    elif json.loads(path.read_text(encoding="utf-8")).get("digest") != digest:
        raise ConfigError(
            f"{folder} holds an unfinished {what} with another model, other plugins, knobs, prompts or settings: finish that one, delete "
            "the folder, or choose another --out"
        )
