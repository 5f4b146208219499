"""Files that knobs name, as a stack file refers to them: where they lie, and the checksum that says which they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffgraft.installed.errors import ArtefactMismatch, ConfigError
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.installed.unread import why_not_loaded

FILE, FOLDER, HUB, SHA = "$file", "$folder", "$hub", "sha256"
KINDS = {"pipeline": (FILE, FOLDER), "encoder": (FILE, FOLDER), "reward": ()}
"""What the knob of a need may refer to, by the kind of the need; of any other kind files."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def hub_file(text: str) -> Path:
    """``owner/name/file`` of the Hub, from the local cache where it is there.

    Raises:
        ConfigError: it cannot be had, with the reason.
    """
    from huggingface_hub import hf_hub_download

    owner, name, file = text.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, ValueError) as error:  # the Hub's own errors are kinds of these
        raise ConfigError(f"{text} cannot be had from the Hub: {why_not_loaded(error, lacks=f'file {file}')}") from error


def is_hub_file(text: str) -> bool:
    """Whether a text may be ``owner/name/file`` on the Hub."""
    return text.count("/") >= 2 and not text.startswith((".", "/", "~")) and bool(Path(text).suffix) and ".." not in text.split("/")


def referred(value: Any, kind: str | None) -> str | None:
    """Under which key a value of a knob is referred to; None for one that is no name of a file or folder.

    Args:
        kind: of the need whose knob it is; of any other knob only a ``Path`` is meant as one.
    """
    allowed = (FILE, FOLDER) if kind is None else KINDS.get(kind, (FILE,))
    if not isinstance(value, Path) and (kind is None or not isinstance(value, str) or not allowed):
        return None
    path, text = Path(value).expanduser(), os.fspath(value)
    if path.is_file() and (isinstance(value, Path) or path.suffix or os.sep in text):
        return FILE
    if path.is_dir() and FOLDER in allowed:
        return FOLDER
    return HUB if kind is not None and FILE in allowed and is_hub_file(text) else None


def refer(value: Any, key: str, home: Path) -> dict[str, str]:
    """The reference of a stack file in the folder ``home`` to what a knob names."""
    if key == HUB:
        return {HUB: os.fspath(value), SHA: digest_of(hub_file(os.fspath(value)))}
    path = Path(value).expanduser().resolve()
    try:
        there = os.path.relpath(path, home.resolve()).replace(os.sep, "/")
    except ValueError:
        raise ConfigError(f"{path} and {home} are on two drives: no path leads from one to the other; save beside it") from None
    return {key: there} if key == FOLDER else {FILE: there, SHA: digest_of(path)}


def resolved(value: Any, find: Callable[[str], Path], where: str) -> Any:
    """A value of a stack file with the paths of what it refers to in their places.

    Args:
        find: a relative path -> where that is here.
        where: which knob of what, for errors.

    Raises:
        ConfigError: a reference is malformed, or leads nowhere.
        ArtefactMismatch: what it leads to is another file.
    """
    if isinstance(value, Mapping):
        if not any(isinstance(key, str) and key.startswith("$") for key in value):
            return {key: resolved(each, find, where) for key, each in value.items()}
        return str(followed(value, find, where))
    return [resolved(each, find, where) for each in value] if isinstance(value, list) else value


def followed(reference: Mapping[Any, Any], find: Callable[[str], Path], where: str) -> Path | str:
    """Where one reference leads; see :func:`resolved`."""
    key = next((key for key in (FILE, FOLDER, HUB) if key in reference), "")
    name, sha = reference.get(key), reference.get(SHA)
    known = {key} if key == FOLDER else {key, SHA}
    if set(reference) != known or not all(isinstance(each, str) for each in reference.values()):
        raise ConfigError(f"{where} = {brief(dict(reference))}: a reference is {{$file: PATH, sha256: ...}}, {{$hub: owner/name/file, "
                          "sha256: ...}} or {{$folder: PATH}}")  # fmt: skip
    assert isinstance(name, str)
    if key == HUB:
        if not is_hub_file(name):
            raise ConfigError(f"{where}: {brief(name)} is no file on the Hub: write owner/name/file")
        path = hub_file(name)
    else:
        if os.path.isabs(name) or "\\" in name or "\0" in name:
            raise ConfigError(f"{where}: {brief(name)}: a path in a stack file is relative to it, with / between its parts")
        path = find(name)
    try:
        if key == FOLDER and not path.is_dir():
            raise ConfigError(f"{where}: there is no folder {plain(path)}; the stack file goes together with what it names")
        if key != FOLDER and not path.is_file():
            raise ConfigError(f"{where}: there is no file {plain(path)}; the stack file goes together with the files that it names")
        if key != FOLDER and (found := digest_of(path)) != sha:
            raise ArtefactMismatch(
                f"{where}: {plain(path)} is not the file that the stack was saved with (its sha256 is {found[:12]}..., the stack file says "
                f"{plain(sha)[:12]}...): get that one, or put this one on by its name and save the stack anew"
            )
    except OSError as error:
        raise ConfigError(f"{where}: {plain(path)} cannot be read: {said(error)}") from error
    return name if key == HUB else path
