"""What goes wrong on a command line, in one line: our own errors, and those of the libraries below, with the option that they are about.

There is one boundary, `Command`, for every command; nothing else translates.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from diffgraft.installed.errors import ConfigError, DiffgraftError, ForeignError, OutputError
from diffgraft.installed.foreign import plain, said
from diffgraft.lab.terminal import say

TRACEBACK = "DIFFGRAFT_TRACEBACK"
"""Environment variable: set to anything, errors of other libraries come with their traceback."""
CALLED = {"steps": "num_inference_steps", "prompt": "prompt_embeds", "num_images": "num_images_per_prompt", "class_label": "class_labels"}
"""What an option is called in diffusers, where it has another name."""
MEMORY = (
    "the memory is full: make smaller pictures (--height, --width) or fewer at a time (--batch 1, --num-images 1), take --dtype float16 "
    "or bfloat16, or another --device"
)
LONGEST = 200
"""Characters of an option's value that an error repeats."""

T = TypeVar("T")


VERBOSE = re.compile(r"-v+|--verbose")
SYNONYMS = {
    **dict.fromkeys(("info", "describe", "about"), "show"),
    **dict.fromkeys(("ls", "plugins"), "list"),
    **dict.fromkeys(("generate", "draw", "sample"), "run"),
    **dict.fromkeys(("bench", "benchmark", "measure"), "compare"),
    **dict.fromkeys(("optimise", "optimize"), "tune"),
    **dict.fromkeys(("playground", "gui", "web", "serve"), "ui"),
    **dict.fromkeys(("create", "init"), "new"),
    **{"find": "search", "quantize": "quantise", "train": "fit", "replay": "again"},
}
"""What a command is called elsewhere. Names that are misspelt typer finds by itself."""


class Group(TyperGroup):
    """The whole command line. What a terminal has no letters for is written out: no picture is lost over how its report is printed."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and args[0] in SYNONYMS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {SYNONYMS[args[0]]!r}?")
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """Shows an error as one message in red, exit code 2, no traceback. A fault of our own code keeps its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With -v after the command as before it (`listen` in ``cli/__init__.py`` ends it)."""
        valued = {word for each in self.params for word in each.opts if not getattr(each, "is_flag", False)}
        end = args.index("--") if "--" in args else len(args)
        said = [i for i in range(end) if VERBOSE.fullmatch(args[i]) and not (i and args[i - 1] in valued)]
        logger = logging.getLogger("diffgraft")
        more = sum(1 if args[i] == "--verbose" else len(args[i]) - 1 for i in said)
        if more:
            logger.setLevel(max(logging.DEBUG, logger.getEffectiveLevel() - 10 * more))
        return super().parse_args(ctx, [word for i, word in enumerate(args) if i not in said])

    def invoke(self, ctx: Any) -> Any:  # typer has click within it from 0.16 on
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # who reads no more (`| head`) has not made a mistake
            raise
        except DiffgraftError as error:
            shown = error
        except Exception as error:
            if os.environ.get(TRACEBACK) or not is_foreign(error):
                raise
            shown = translated(error, options_given(ctx))
        say((f"{type(shown).__name__}: {shown}", "red"), err=True)
        raise typer.Exit(2) from None


def is_foreign(error: Exception) -> bool:
    """Whether it comes from a library or the system and not from a line of diffgraft or of a plugin.

    What compiled code raises has no line of its own, so its kind tells: diffgraft raises no RuntimeError and no OverflowError, and a kind
    that a library defines is that library's.
    """
    kind = type(error)
    if isinstance(error, (OSError, MemoryError, OverflowError, EOFError)) or kind in (RuntimeError, RecursionError):
        return True
    if kind.__module__ != "builtins":
        return not re.fullmatch(r"diffgraft(_\w+)?", kind.__module__.partition(".")[0])
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not is_ours(frames[-1].filename)


def is_ours(file: str) -> bool:
    """Whether a file belongs to a package of diffgraft or of a plugin. A checkout may be called diffgraft too, and hold anybody's files."""
    return any(re.fullmatch(r"diffgraft(_\w+)?", folder.name) and (folder / "__init__.py").exists() for folder in Path(file).parents)


def options_given(ctx: typer.Context) -> dict[str, str]:
    """The options that somebody gave, as they are written, by the name of the parameter."""
    found = {}
    for parameter in ctx.command.params:
        if parameter.name and getattr(ctx.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE":
            written = next((o for o in parameter.opts if o.startswith("--")), parameter.name.upper())
            value = ctx.params.get(parameter.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found[parameter.name] = " ".join([written, *(str(each)[:LONGEST] for each in values)])
    return found


def translated(error: Exception, options: dict[str, str]) -> DiffgraftError:
    """An error of another library in our words: what it says, the options that it is about (all that were given, if it names none)."""
    words = plain(error) or "no reason given"
    if is_memory(error):
        return ForeignError(f"{MEMORY} ({words[:120]})")
    if isinstance(error, OSError) and error.filename is not None:
        return OutputError(f"{error.filename}: {error.strerror or words}")
    if (refusing := refused_by(error)) is not None:
        return ConfigError(f"{refusing} refused the call: {words[:300]}")
    named = set(re.findall(r"\w+", words))
    meant = {name: text for name, text in options.items() if {name, CALLED.get(name, name)} & named}
    meant = meant or {name: text for name, text in options.items() if name not in ("pipeline", "prompt", "out")} or options
    return ForeignError(
        f"{', '.join(meant.values()) or 'this call'}: {origin(error)} refused: {words[:300]} "
        f"({type(error).__name__}; {TRACEBACK}=1 shows where)"
    )


def refused_by(error: Exception) -> str | None:
    """The class of the pipeline whose own check of its arguments raised it (a height that is no multiple of 8), or None."""
    if isinstance(error, (ValueError, TypeError)):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "check_inputs":
                return type(frame.f_locals.get("self")).__name__
    return None


def is_memory(error: Exception) -> bool:
    """Whether memory ran out: on an accelerator, or where torch or Python asked the system for more."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(text in words for text in ("out of memory", "can't allocate memory", "not enough memory"))


def origin(error: Exception) -> str:
    """The package whose line raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else "Python"


def kept(write: Callable[[Path], T], path: Path, other: str | None = None) -> T:
    """``write(path)``; where that fails, what took long to make goes to a temporary folder, and the error says where.

    Args:
        other: a suffix to fall back on where the one of ``path`` cannot hold it (a picture too large for WebP).

    Raises:
        OutputError: it could not be written to ``path``.
    """
    try:
        return write(path)
    except Exception as error:
        failed, why = error, getattr(error, "strerror", None) or said(error)
    reasons = []
    for name in dict.fromkeys((path.name, path.with_suffix(other or path.suffix).name)):
        try:
            place = Path(tempfile.mkdtemp(prefix="diffgraft-")) / name
            write(place)
        except Exception as error:
            reasons.append(said(error))
        else:
            raise OutputError(f"--out {path}: {why}; the result is kept in {place.parent}") from failed
    raise OutputError(f"--out {path}: {why}; nor can a temporary folder take it ({reasons[-1]}): it is lost") from failed
