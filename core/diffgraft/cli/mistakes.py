"""What goes wrong on a command line, in one line: our own errors, and those of the libraries below, with the option that they are about."""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from diffgraft.kernel.errors import DiffgraftError, ForeignError, OutputError

TRACEBACK = "DIFFGRAFT_TRACEBACK"
"""Environment variable: set to anything, errors of other libraries come with their traceback."""
CALLED = {"steps": "num_inference_steps", "prompt": "prompt_embeds", "num_images": "num_images_per_prompt", "class_label": "class_labels"}
"""What an option is called in diffusers, where it has another name."""
MEMORY = (
    "the memory is full: make smaller pictures (--height, --width) or fewer at a time (--batch 1, --num-images 1), take --dtype float16 "
    "or bfloat16, or another --device"
)

T = TypeVar("T")


class Command(TyperCommand):
    """Shows an error as one message in red, exit code 2, no traceback. A fault of our own code keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:  # typer has click within it from 0.16 on
        try:
            return super().invoke(ctx)
        except DiffgraftError as error:
            shown = error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK) or not is_foreign(error):
                raise
            shown = translated(error, options_given(ctx))
        typer.secho(f"{type(shown).__name__}: {shown}", fg="red", err=True)
        raise typer.Exit(2) from None


def is_foreign(error: Exception) -> bool:
    """Whether it comes from a library or the system and not from a line of diffgraft or of a plugin."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not is_ours(frames[-1].filename)


def is_ours(file: str) -> bool:
    """Whether a file belongs to diffgraft or a plugin. A checkout may be called diffgraft too, and hold the libraries in its .venv."""
    parts = Path(file).parts
    if "site-packages" in parts:
        parts = parts[len(parts) - parts[::-1].index("site-packages") :]
    return any(re.fullmatch(r"diffgraft(_\w+)?", part) for part in parts[:-1])


def options_given(ctx: typer.Context) -> dict[str, str]:
    """The options that somebody gave, as they are written, by the name of the parameter."""
    found = {}
    for parameter in ctx.command.params:
        if parameter.name and getattr(ctx.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE":
            written = next((o for o in parameter.opts if o.startswith("--")), parameter.name.upper())
            value = ctx.params.get(parameter.name)
            found[parameter.name] = " ".join([written, *map(str, value if isinstance(value, (list, tuple)) else [value])])
    return found


def translated(error: Exception, options: dict[str, str]) -> DiffgraftError:
    """An error of another library in our words: what it says, the options that it is about (all that were given, if it names none)."""
    said = " ".join(str(error).split()) or "no reason given"
    if is_memory(error):
        return ForeignError(f"{MEMORY} ({said[:120]})")
    if isinstance(error, OSError) and error.filename is not None:
        return OutputError(f"{error.filename}: {error.strerror or said}")
    words = set(re.findall(r"\w+", said))
    meant = {name: text for name, text in options.items() if {name, CALLED.get(name, name)} & words}
    meant = meant or {name: text for name, text in options.items() if name not in ("pipeline", "prompt", "out")} or options
    library = origin(error)
    return ForeignError(
        f"{', '.join(meant.values()) or 'this call'}: {library} refused: {said[:300]} ({type(error).__name__}; {TRACEBACK}=1 shows where)"
    )


def is_memory(error: Exception) -> bool:
    """Whether memory ran out: on an accelerator, or where torch or Python asked the system for more."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(text in said for text in ("out of memory", "can't allocate memory", "not enough memory"))


def origin(error: Exception) -> str:
    """The package whose line raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else "Python"


def kept(write: Callable[[Path], T], path: Path) -> T:
    """``write(path)``; where that fails, what took long to make goes to a temporary folder, and the error says where.

    Raises:
        OutputError: it could not be written to ``path``.
    """
    try:
        return write(path)
    except OSError as error:
        why = error.strerror or str(error)
        try:
            place = Path(tempfile.mkdtemp(prefix="diffgraft-")) / path.name
            write(place)
        except OSError as second:
            raise OutputError(f"--out {path}: {why}; nor can a temporary folder take it ({second}): it is lost") from error
        raise OutputError(f"--out {path}: {why}; the result is kept in {place.parent}") from error
