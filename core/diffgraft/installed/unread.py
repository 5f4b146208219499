"""Why diffusers could not read a pipeline, and the way out."""

from __future__ import annotations

import os
import re
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def pickles_instead(folder: str | os.PathLike[str], error: BaseException) -> list[str]:
    """The pickled weights that are all there is where safetensors were looked for; none where the fault is another one.

    Of the part of a folder that the error names this is seen; of a Hub id diffusers lists the files that it found.
    """
    if "SafetensorError" in kinds_of(error):
        return []  # a file was there, and is damaged
    if not os.path.isdir(folder):
        listed = str(error).partition("safetensors` weights in")[2]
        return sorted(word for word in re.findall(r"'([^']+)'", listed) if word.endswith(PICKLES))
    found = []
    for part in Path(folder).iterdir():
        names = [path.name for path in part.iterdir()] if part.is_dir() and f"{part}." in str(error) else []
        if not any(name.endswith(".safetensors") for name in names):
            found += [f"{part.name}/{name}" for name in sorted(names) if name.endswith(PICKLES)]
    return found


def kinds_of(error: BaseException | None) -> set[str]:
    """Class names of an error and of those behind it: diffusers tells of a cache miss, and not of what happened on the way there."""
    kinds: set[str] = set()
    while error is not None:
        kinds |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return kinds


def why_not_loaded(error: BaseException, lacks: str = "model_index.json, so it is no diffusers pipeline") -> str:
    """What kept a library from reading something, and the way out; ``lacks`` is what is not there where the Hub has no such entry."""
    first, kinds = str(error).strip().partition("\n")[0], kinds_of(error)
    if "SafetensorError" in kinds:
        return f"a file of weights is damaged, or not what its name says ({first}): fetch or save it again"
    if "GatedRepoError" in kinds:
        return "it is gated: accept its licence on its page on the Hub, then `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "the Hub has no such repository, or it is private: check the spelling, or `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "the repository has no such revision: check revision=..."
    if kinds & {"EntryNotFoundError", "RemoteEntryNotFoundError"} and "LocalEntryNotFoundError" not in kinds:
        return f"the repository has no {lacks}"
    if "HFValidationError" in kinds:
        return f"that is no Hub id: {first}"
    if "OfflineModeIsEnabled" in kinds:
        return "it is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or give a folder"
    if kinds & {"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "gaierror"}:
        return "it is not in the local cache, and the Hub cannot be reached: go online once, or give a folder"
    if "LocalEntryNotFoundError" in kinds:
        return "it is not in the local cache, and local_files_only=True or HF_HUB_OFFLINE forbids to fetch it"
    return first or type(error).__name__
