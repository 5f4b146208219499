"""``diffgraft run``: a picture with plugins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.options import (
    Backend,
    ClassLabels,
    Device,
    Dtype,
    Extra,
    GuidanceScale,
    Height,
    ImagePath,
    KnobValues,
    NegativePrompt,
    Pipeline,
    PluginNames,
    Steps,
    Width,
)


def run(
    pipeline: Pipeline,
    prompt: Annotated[str | None, typer.Option(help="What the picture should show.")] = None,
    negative_prompt: NegativePrompt = None,
    plugin: PluginNames = None,
    option: KnobValues = None,
    out: Annotated[
        Path, typer.Option("--out", help="File to write: .png, .jpg, .webp, .gif. A video becomes an animation or a contact sheet.")
    ] = Path("out.png"),
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; picture i of several has seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="How many pictures (or videos).")] = 1,
    height: Height = None,
    width: Width = None,
    class_label: ClassLabels = None,
    image: ImagePath = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = None,
) -> None:
    """Run a pipeline with plugins and write the picture."""
    from diffgraft.cli.values import bundled_of, call_settings, open_pipeline, parse_assignments, plugin_specs, refusals

    specs = plugin_specs(plugin, option)
    extra = parse_assignments(arg, "-a")
    from diffgraft.lab.pictures import check_picture_path, save_pictures

    check_picture_path(out)
    from diffgraft.methods.inputs import make_pictures, make_samples

    bundled = bundled_of(pipeline)
    call = call_settings(bundled, steps, guidance_scale, negative_prompt, height, width, image, extra)
    pipe = open_pipeline(pipeline, specs, device, dtype, backend)
    prompts = [prompt] if prompt is not None else list(bundled.prompts[:1]) if bundled else []
    samples = make_samples(pipe, [seed + i for i in range(num_images)], prompts, class_label or ())

    with refusals(pipe):
        started = time.perf_counter()
        pictures = make_pictures(pipe, samples, call)
        seconds = time.perf_counter() - started
    if pipe.plugins.list():
        typer.echo(str(pipe.plugins.report()))
    else:
        typer.echo(f"no plugins, {seconds:.2f} s")
    for path in save_pictures(pictures, out):
        typer.echo(f"wrote {path}")
