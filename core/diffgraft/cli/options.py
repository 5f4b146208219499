"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffgraft.installed import registry


def plugin_names(incomplete: str) -> list[str]:
    """For the shell's completion: the installed plugins, after what stands before the last comma."""
    before, comma, word = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name, offer in registry.installed().items() if name.startswith(word) and not offer.broken]


def pipeline_names(incomplete: str) -> list[str]:
    """For the shell's completion: the bundled pipelines."""
    return [name for name in registry.bundled_names() if name.startswith(incomplete)]


Pipeline = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A bundled name (emoji-sd), a folder, or a Hub id.", autocompletion=pipeline_names)
]
PluginNames = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        "--plugins",
        "-p",
        metavar="NAME",
        help="A plugin, or plugin:preset; several: repeat or a,b. The first is outermost.",
        autocompletion=plugin_names,
    ),
]
KnobValues = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="PLUGIN.KNOB=VALUE", help="A plugin's knob: deepcache.interval=5.")
]
StackFile = Annotated[
    str | None,
    typer.Option("--stack", metavar="FILE", help="A stack file (a path, or owner/name on the Hub); --plugin adds more, inside it."),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What the picture should not show.")]
ClassLabels = Annotated[
    list[str] | None,
    typer.Option("--class-label", metavar="CLASS", help="Number or name of a class, for class-conditional pipelines; repeat for several."),
]
ImagePath = Annotated[Path | None, typer.Option("--image", help="Input picture, for pipelines that take one.")]
PromptTexts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat for several.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="A text file with one prompt a line.")]
SampleCount = Annotated[int | None, typer.Option("--samples", min=1, help="Pictures to make (default: one a prompt, or a class).")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the pipeline's).")]
GuidanceScale = Annotated[float | None, typer.Option(help="Guidance scale (default: the pipeline's).")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default: the best that is there).")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16 (default: float32; on CUDA float16 for U-Nets, bfloat16 for transformers).")
]
Backend = Annotated[
    str | None, typer.Option(help="Attention backend of diffusers' dispatcher (native, xformers, flash...); `doctor` lists those at hand.")
]
Extra = Annotated[
    list[str] | None, typer.Option("--arg", "-a", metavar="NAME=VALUE", help="Any other argument of the pipeline's call: num_frames=16.")
]
Wide = Annotated[bool, typer.Option("--wide", help="All columns in full, however wide the terminal is.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the processor (default: the physical cores that are free).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
