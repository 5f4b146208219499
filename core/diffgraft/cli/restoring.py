"""``diffgraft restore``: a picture from its measurement, by a plugin that solves inverse problems."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.options import (
    AsJson,
    ClassLabels,
    Device,
    Dtype,
    Extra,
    GuidanceScale,
    Height,
    KnobValues,
    NegativePrompt,
    Pipeline,
    PluginNames,
    Steps,
    Width,
)
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import console, say
from diffgraft.methods.files import check_file, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from diffgraft.methods.inputs import CallSettings


def restore(
    pipeline: Pipeline,
    problem: Annotated[
        str, typer.Option("--problem", metavar="TEXT", help='"downsample(4) @ blur(1.5) + noise(0.02)": how it was measured, blur first.')
    ],
    measurement: Annotated[
        Path | None,
        typer.Option("--measurement", metavar="FILE", help="What was measured: a picture, or a .npy or .safetensors file with one array."),
    ] = None,
    from_truth: Annotated[
        Path | None,
        typer.Option("--from-truth", metavar="FILE", help="A picture that is measured first, and compared with what is found."),
    ] = None,
    plugin: PluginNames = None,
    option: KnobValues = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    negative_prompt: NegativePrompt = None,
    out: Annotated[Path, typer.Option("--out", help="File to write: .png, .jpg, .webp.")] = Path("restored.png"),
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE", help="Write truth, measurement, pseudo-inverse and result side by side, too.")
    ] = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the run's noise; picture i of several has seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures are found for the one measurement.")] = 1,
    height: Height = None,
    width: Width = None,
    class_label: ClassLabels = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Find the picture that a measurement is of: one that explains it and that the pipeline finds likely.

    Tells how far A of the result is from the measurement (residual), and with --from-truth how near the result is (PSNR, SSIM), beside the
    pseudo-inverse, which needs no model.
    """
    from diffgraft.cli.mistakes import kept
    from diffgraft.cli.pictures import flat, open_picture, sized
    from diffgraft.cli.values import call_settings, load_bare, parse_assignments, prompt_of, specs_for
    from diffgraft.lab.pictures import STILL, encode, save_pictures

    if (measurement is None) == (from_truth is None):
        raise ConfigError("give --measurement FILE, what was measured, or --from-truth FILE, a picture to try it on; one of the two")
    specs, extra = specs_for(pipeline, plugin, option), parse_assignments(arg, "-a")
    solver, knob = the_solver([name for name, _ in specs])
    check_file(out, STILL)
    if sheet is not None:
        check_file(sheet, STILL, "--sheet")

    from diffgraft.installed.specs import build_plugin
    from diffgraft.kernel.loading import load_pipeline
    from diffgraft.lab import restoration as lab
    from diffgraft.methods.decoding import picture_channels
    from diffgraft.methods.inputs import make_pictures, make_samples
    from diffgraft.methods.problems import Problem, read_operator, simulated

    operator, noise = read_operator(problem)
    call = call_settings(steps, guidance_scale, negative_prompt, height, width, None, extra)
    y = None if measurement is None else read_measurement(measurement)
    picture = None if from_truth is None else flat(open_picture(str(from_truth), "--from-truth"), str(from_truth))
    pipe, built = load_bare(pipeline, specs, device, dtype)
    truth = None
    if picture is not None:
        colours = "L" if picture_channels(pipe, registry.find_family(type(pipe))) == 1 else "RGB"
        truth = lab.as_pixels(sized(picture, *wanted_size(pipe, call), str(from_truth), err=True).convert(colours))
    asked = simulated(operator, truth, noise, lab.draws(seed)) if truth is not None else Problem(operator, y, noise)
    call = in_size(call, asked.shape, pipe)
    built[[name for name, _ in specs].index(solver)] = build_plugin((solver, {**dict(specs)[solver], knob: asked}))
    pipe = load_pipeline(pipe, built)
    prompts, remark = prompt_of(prompt, registry.bundled_of(pipeline))
    made = make_pictures(pipe, make_samples(pipe, [seed + i for i in range(num_images)], prompts, class_label or []), call)
    found = lab.judged(asked, truth, made)

    written = [str(path) for path in kept(lambda place: save_pictures(made, place), out, ".png")]
    if sheet is not None:
        page = lab.sheet_of(asked, truth, made, f"{pipeline}, {solver}: {problem}")
        kept(lambda place: write_atomic(place, encode([page], place.suffix.lower())), sheet, ".png")
        written.append(str(sheet))
    if as_json:
        say(json.dumps({"problem": problem, "noise": asked.noise, "pictures": found, "written": written}))
        return
    if remark:
        say(remark)
    say(str(pipe.plugins.report()))
    console().print(lab.table_of(found, asked.noise))
    for path in written:
        say(f"wrote {path}")


def the_solver(names: list[str]) -> tuple[str, str]:
    """The plugin of those named that solves problems, and the knob that takes one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    from diffgraft.methods.named import those

    solvers = {name: need.knob for name in names for need in registry.find(name).needs if need.kind == "problem"}
    if len(solvers) == 1:
        return next(iter(solvers.items()))
    if solvers:
        raise ConfigError(f"--plugin {', '.join(solvers)}: each finds the picture by itself; keep one")
    able = those(lambda cls: any(need.kind == "problem" for need in cls.needs))
    given = f"--plugin {', '.join(names)}: no plugin of these" if names else "no --plugin is given that"
    raise ConfigError(f"{given} solves problems; installed are {', '.join(able) or 'none'}")


def read_measurement(path: Path) -> Tensor:
    """y [1, ...] of a file: a picture [1, 3 or 1, h, w] in [-1, 1], or the one array of a .npy or .safetensors file, as it is.

    Raises:
        ConfigError: nothing of the kind is there.
    """
    from diffgraft.cli.pictures import open_picture
    from diffgraft.lab.restoration import ARRAYS, as_pixels, read_array

    if path.suffix.lower() in ARRAYS:
        return read_array(path, f"--measurement {path}")
    try:
        image = open_picture(str(path), "--measurement")
    except ConfigError as error:
        raise ConfigError(f"{error}; give a picture, or a {' or '.join(ARRAYS)} file with one array") from None
    return as_pixels(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def wanted_size(pipe: Any, call: CallSettings) -> tuple[int, int]:
    """(height, width) of the pictures that are looked for."""
    from diffgraft.methods.variants import own_size

    size = (call.height, call.width) if call.height and call.width else own_size(pipe)
    if size is None:
        raise ConfigError(f"{type(pipe).__name__} does not tell the size of its pictures: give --height and --width")
    return size


def in_size(call: CallSettings, shape: tuple[int, ...], pipe: Any) -> CallSettings:
    """The call for pictures of the problem's shape.

    Raises:
        ConfigError: the call asks for another size, or the pipeline makes another and takes none.
    """
    from diffgraft.methods.inputs import parameters

    height, width = shape[-2:]
    if wanted_size(pipe, call) == (height, width):
        return call
    if call.height or "height" not in parameters(pipe):
        made = "x".join(map(str, reversed(wanted_size(pipe, call))))
        raise ConfigError(f"--measurement is of a picture of {width}x{height}, and this run makes {made}: measure one of that size")
    return replace(call, height=height, width=width)
