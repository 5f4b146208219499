"""What is to be drawn for a line, complete in itself: whoever draws it, and when, makes the same picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgraft.batch.lines import NUMBERED, Broken, PromptLine, read_lines
from diffgraft.lab.recipes import Recipe
from diffgraft.methods.files import work_digest


@dataclass(frozen=True)
class Task:
    """One line's picture: its number, the name of its file, how it is made, and what tells this from any other way to make it."""

    number: int
    name: str
    recipe: Recipe
    asked: str


@dataclass(frozen=True)
class Tasks:
    """The tasks of a file of prompts, read anew each time they are gone through.

    path     prompts.jsonl
    base     what all lines have in common
    suffix   of the results
    besides  what the pictures follow from besides their recipes: threads, digests of files
    """

    path: Path
    base: Recipe
    suffix: str
    besides: Mapping[str, Any]

    def __iter__(self) -> Iterator[Task | Broken]:
        taken: dict[str, int] = {}
        for found in read_lines(self.path):
            if isinstance(found, Broken):
                yield found
                continue
            number, line = found
            if line.id is not None:
                first = taken.setdefault(line.id.lower(), number)  # not all file systems tell A.png from a.png
                if first != number:
                    yield Broken(number, f"id: {line.id!r} is that of line {first}")
                    continue
            recipe = recipe_of(number, line, self.base)
            name = f"{line.id or f'{NUMBERED}{number:06}'}{self.suffix}"
            yield Task(number, name, recipe, work_digest({"recipe": recipe.model_dump(mode="json", exclude_defaults=True), **self.besides}))


def recipe_of(number: int, line: PromptLine, base: Recipe) -> Recipe:
    """The recipe of a line. A seed that it does not say follows from its number alone: ``base.seed`` for the first line, and so on."""
    said: dict[str, Any] = line.model_dump(exclude_none=True, exclude={"id", "args", "class_label"})
    labels = {} if line.class_label is None else {"class_label": [line.class_label]}
    return base.model_copy(update={"seed": base.seed + number - 1, **said, **labels, "args": {**base.args, **line.args}})
