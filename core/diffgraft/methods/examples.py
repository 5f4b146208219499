"""What a fit learns from: pictures with captions, prompts or classes; read from a folder, one batch at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffgraft.installed.errors import ConfigError
from diffgraft.installed.foreign import brief, said
from diffgraft.methods.inputs import Sample, parameters

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
METADATA = "metadata.jsonl"
CAPTIONS = ("text", "caption", "prompt")
"""Keys of a line of :data:`METADATA` that may hold the caption; the first that is there."""


@dataclass(frozen=True)
class Example:
    """One thing to learn from: a caption, a picture (a file or a PIL picture), a class; whatever there is of them.

    worse  of a preference pair the other picture of the same caption, which is liked less
    """

    prompt: str | None = None
    picture: Any = None
    class_label: int | None = None
    worse: Any = None

    def sample(self, seed: int) -> Sample:
        """The same as something that a pipeline can make."""
        return Sample(seed, self.prompt or "", self.class_label or 0)

    @property
    def label(self) -> str:
        """For people."""
        if isinstance(self.picture, (str, os.PathLike)):
            return os.fspath(self.picture)
        return repr(self.prompt) if self.prompt is not None else f"class {self.class_label}"


def read_examples(folder: str | os.PathLike[str], option: str = "--data") -> list[Example]:
    """The pictures of a folder with their captions: those that ``metadata.jsonl`` names (one JSON object a line, with ``file_name``, and
    ``text`` or ``label``), as Hugging Face's imagefolder has it, and ``worse`` for a picture that is liked less; without that file all
    pictures, the caption of a.png in a.txt.

    Raises:
        ConfigError: no such folder, no picture in it, or a line that names none.
    """
    home = Path(folder)
    if not home.is_dir():
        raise ConfigError(f"{option} {folder}: there is no such folder; it holds pictures, with {METADATA} or a .txt beside each")
    if (home / METADATA).is_file():
        lines = readable(home / METADATA, option).splitlines()
        found = [described(home, number, line, option) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        paths = sorted(path for path in home.rglob("*") if path.suffix.lower() in PICTURES)
        texts = [path.with_suffix(".txt") for path in paths]
        found = [Example(readable(t, option).strip() if t.is_file() else None, p) for p, t in zip(paths, texts, strict=True)]
    if not found:
        raise ConfigError(f"{option} {folder}: no picture there ({', '.join(sorted(PICTURES))})")
    return found


def described(home: Path, number: int, line: str, option: str) -> Example:
    """What a line of ``metadata.jsonl`` says."""
    where = f"{option} {home / METADATA}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {said(error)}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ConfigError(f"{where}: {brief(line)} says no file_name")
    path, worse = (found_in(home, key, row.get(key), where) for key in ("file_name", "worse"))
    label = row.get("label")
    text = next((row[key] for key in CAPTIONS if key in row), None)
    if not isinstance(text, str | None) or not isinstance(label, int | None):
        raise ConfigError(f"{where}: text = {brief(text)}, label = {brief(label)}: a text and a whole number")
    return Example(text, path, label, worse)


def found_in(home: Path, key: str, name: Any, where: str) -> Path | None:
    """The picture in ``home`` that a line names; None where it names none."""
    if name is None:
        return None
    path = home / str(name)
    if not (path.resolve().is_relative_to(home.resolve()) and path.suffix.lower() in PICTURES and path.is_file()):
        raise ConfigError(f"{where}: {key} = {brief(name)} is no picture in {home}")
    return path


def readable(path: Path, option: str) -> str:
    """The text of a file; raises ConfigError where it has none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {said(error)}") from None


def ensure_examples(pipe: Any, examples: Sequence[Example], wants: Collection[str], what: str) -> None:
    """Raises ConfigError where there is less than is wanted: "pictures", "prompts" (of a pipeline that takes no prompt, classes)."""
    flags = {"pictures": "--data FOLDER", "prompts": "--data FOLDER with captions, or --prompts FILE"}
    key = "prompt" if "prompt" in parameters(pipe) else "class_label"
    if key == "class_label":
        flags["prompts"] = "--class-label N, or --data FOLDER with a label for each picture"
    has = {"pictures": lambda each: each.picture is not None, "prompts": lambda each: getattr(each, key) is not None}
    if key not in parameters(pipe) and "class_labels" not in parameters(pipe):
        has["prompts"] = lambda each: True  # it makes whatever it likes
    for word in sorted(wants):
        if not examples:
            raise ConfigError(f"{what} learns from {word}, and there are none: give {flags[word]}")
        if missing := next((each for each in examples if not has[word](each)), None):
            raise ConfigError(f"{what} learns from {word}, and {missing.label} has none: give {flags[word]}")


def pixels_of(examples: Sequence[Example], height: int, width: int) -> Tensor | None:
    """Their pictures [batch, 3, height, width] in -1 to 1, float32, cut to that shape around the middle; None where there are none.

    Raises:
        ConfigError: a file that is no picture.
    """
    if any(each.picture is None for each in examples):
        return None
    return torch.stack([pixels(each.picture, height, width) for each in examples])


def pixels(picture: Any, height: int, width: int) -> Tensor:
    """One picture [3, height, width]."""
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{picture}: {said(error)}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def digest_of(examples: Sequence[Example]) -> str:
    """Tells one set of examples from another: by captions, and names and sizes of files."""
    digest = hashlib.sha256()
    for each in examples:
        pair = [] if each.worse is None else [told(each.worse)]
        digest.update(json.dumps([each.prompt, each.class_label, told(each.picture), *pair]).encode())
    return digest.hexdigest()


def told(picture: Any) -> str | None:
    """Tells one picture from another."""
    if isinstance(picture, Image.Image):
        return hashlib.sha256(picture.tobytes()).hexdigest()
    return None if picture is None else f"{Path(picture).name} {Path(picture).stat().st_size}"
