"""Stand-ins for a pipeline in tests of batches: they draw at once, and die, fail or stop when a prompt says so.

Without torch, which would take each worker seconds to import.
"""

from __future__ import annotations

import io
import logging
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffgraft.batch.work import Drawn, Failed
from diffgraft.installed.errors import Unsupported
from diffgraft.lab.recipes import Record, save_options
from PIL import Image


@dataclass(frozen=True)
class Draws:
    """Opens nothing, and notes in ``notes`` who began which line."""

    notes: Path
    loading: str = ""

    def __call__(self):
        if self.loading == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.loading == "refuses":
            raise Unsupported("this pipeline cannot be had")
        return partial(draw, self.notes)


def draw(notes: Path, task):
    tries = len(begun(notes, task.number))
    (notes / f"{task.number}-{tries}-{os.getpid()}").touch()
    word = task.recipe.prompt
    if word == "die" or (word == "die once" and not tries):
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "stop" and not tries:
        raise KeyboardInterrupt
    if word == "warn":
        logging.getLogger("diffgraft.drawers").warning("line %d is a strange one", task.number)
    if word == "fail":
        return Failed("it would not")
    return Drawn(picture(task))


def picture(task) -> bytes:
    """A picture of the task's seed, with its record."""
    record = Record(recipe=task.recipe, kind="none", scheduler="none", size=(1, 1), versions={}, asked=task.asked)
    file = io.BytesIO()
    Image.new("RGB", (1, 1), (task.recipe.seed % 256, 0, 0)).save(file, "PNG", **save_options(record, ".png"))
    return file.getvalue()


def begun(notes: Path, number: int) -> list[str]:
    """The processes that began a line."""
    return [path.name.split("-")[2] for path in notes.iterdir() if path.name.startswith(f"{number}-")]
