"""The folder of a batch: a result is there, whole and with its record, or it is not; it is written once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffgraft.batch.lines import Broken
from diffgraft.batch.tasks import Task
from diffgraft.installed.errors import ConfigError, Conflict, OutputError
from diffgraft.installed.foreign import brief
from diffgraft.lab.recipes import Recipe, read_record
from diffgraft.methods.files import check_folder, write_atomic

METADATA, FAILED, LOCK = "metadata.jsonl", "failed.jsonl", ".batch.lock"
"""What the results are of, as ``datasets`` reads it beside pictures; the lines without a result, and why; who works here."""
HALF = re.compile(r"^\..*\.\d+\.part$")
"""What `write_atomic` leaves of a file when its process is killed in the middle."""


class Results:
    """The results in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Be the only one who writes here; the folder is made, and half files of a killed command go away.

        Raises:
            ConfigError: there can be no such folder.
            Conflict: another command is at work in it.
        """
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                for path in self.folder.iterdir():
                    if HALF.match(path.name):
                        path.unlink()
                yield
        except Timeout:
            raise Conflict(f"--out {self.folder}: another `diffgraft batch` is at work there; wait, or choose another folder") from None

    def has(self, task: Task) -> bool:
        """Whether the task's result is there.

        Raises:
            ConfigError: what is there under its name was made in another way.
        """
        path = self.folder / task.name
        if not path.exists():
            return False
        try:
            record = read_record(path)
        except ConfigError as error:
            raise ConfigError(f"line {task.number}: {error}; move it away, or choose another --out") from None
        if record.asked != task.asked:
            raise ConfigError(
                f"line {task.number}: {path} was made from another line, or with other settings, plugins or knobs "
                f"({'; '.join(differing(record.recipe, task.recipe)) or 'the files that they name, or --threads'}); give what it was made "
                "with, move it away, or choose another --out"
            )
        return True

    def write(self, task: Task, data: bytes) -> None:
        """Put a result into its file.

        Raises:
            OutputError: the folder cannot take it.
        """
        path = self.folder / task.name
        try:
            write_atomic(path, data)
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror or error}; what was written before is whole. Make room, and the same command goes on from there"
            ) from error

    def tell(self, tasks: Iterable[Task | Broken], failed: Mapping[int, str]) -> None:
        """Write what the results are of, in the order of the lines, and which lines have none."""
        there = (about(task) for task in tasks if isinstance(task, Task) and (self.folder / task.name).exists())
        write_atomic(self.folder / METADATA, as_lines(there))
        if failed:
            write_atomic(self.folder / FAILED, as_lines({"line": number, "why": failed[number]} for number in sorted(failed)))
        else:
            (self.folder / FAILED).unlink(missing_ok=True)


def differing(there: Recipe, here: Recipe) -> list[str]:
    """What of two recipes differs, in words. The one of a picture has the pipeline's own values where nothing was said: what is not said
    here is named only where nothing else tells them apart."""
    one, other = flat(there), flat(here)
    keys = [key for key in {**other, **one} if one.get(key) != other.get(key)]
    said = [key for key in keys if key in other or "." in key] or keys
    return [f"{key}: there {shown(one.get(key))}, here {shown(other.get(key))}" for key in said]


def flat(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, each plugin's knobs by themselves."""
    said = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"plugins"})
    plugins = {"plugins": [name for name, _ in recipe.plugins]} if recipe.plugins else {}
    return {**said, "seed": recipe.seed, **plugins, **{f"{name}.{knob}": v for name, knobs in recipe.plugins for knob, v in knobs.items()}}


def shown(value: Any) -> str:
    return "not said" if value is None else brief(value)


def about(task: Task) -> dict[str, Any]:
    """A row of the metadata."""
    recipe = task.recipe
    said = {"prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt, "class_label": next(iter(recipe.class_label), None)}
    return {"file_name": task.name, "line": task.number, "seed": recipe.seed, **{k: v for k, v in said.items() if v is not None}}


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
