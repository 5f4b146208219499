"""The command line: ``diffgraft list | show | search | presets | run | batch | again | restore | compare | tune | calibrate |
quantise | evolve | invert | fit | weights | doctor | new | check | ui``.

Torch is imported inside the commands that need it.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from diffgraft import __version__
from diffgraft.cli.batching import batch
from diffgraft.cli.catalogue import search
from diffgraft.cli.community import check, new
from diffgraft.cli.listing import doctor, list_plugins, show
from diffgraft.cli.making import calibrate, evolve, fit, invert, quantise
from diffgraft.cli.measuring import compare, tune
from diffgraft.cli.mistakes import Command, Group
from diffgraft.cli.presets import presets
from diffgraft.cli.restoring import restore
from diffgraft.cli.running import again, run
from diffgraft.cli.ui import ui
from diffgraft.cli.weights import weights
from diffgraft.installed.foreign import plain
from diffgraft.lab.terminal import console, say

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Graft paper methods onto standard diffusers pipelines: one plugin per paper, stacked.",
)


def show_version(wanted: bool) -> None:
    if wanted:
        say(f"diffgraft {__version__}")
        raise typer.Exit


class Plain(logging.Formatter):
    """Messages hold what others wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), lines=True)


class Once(logging.Filter):
    """Each message once: a comparison attaches the same stack dozens of times."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        fresh = (text := record.getMessage()) not in self.seen
        self.seen.add(text)
        return fresh


def listen(ctx: typer.Context, verbose: int) -> None:
    """Show what the core's logger says while this command runs: warnings, with -v what it does, with -vv everything."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console(err=True), show_path=False, show_time=False)
    handler.setFormatter(Plain("%(message)s"))
    handler.addFilter(Once())
    logger, before = logging.getLogger("diffgraft"), logging.getLogger("diffgraft").level
    logger.addHandler(handler)
    logger.setLevel(max(logging.DEBUG, logging.WARNING - 10 * verbose))

    def stop() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    ctx.call_on_close(stop)


@app.callback()
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Say what is going on (plugins, files, notes); -vv also each run's report. Before or after COMMAND.",
        ),
    ] = 0,
) -> None:
    """Graft paper methods onto standard diffusers pipelines: one plugin per paper, stacked."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints about optional packages are no news of ours
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait give their core to whoever works; read when torch is imported
    listen(ctx, verbose)


app.command("list", cls=Command)(list_plugins)
COMMANDS = (
    *(show, run, batch, again, restore, compare, tune, calibrate, quantise),
    *(evolve, invert, fit, doctor, new, check, search, presets, ui),
)
for command in COMMANDS:
    app.command(cls=Command)(command)
app.add_typer(weights, name="weights")


if __name__ == "__main__":
    app()
