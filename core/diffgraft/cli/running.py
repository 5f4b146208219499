"""``diffgraft run``: a picture with plugins; ``diffgraft again``: the same picture once more, from what its file says."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.options import (
    Backend,
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
    StackFile,
    Steps,
    Width,
)
from diffgraft.installed.errors import ConfigError, DiffgraftError, NeverFired, OutputError
from diffgraft.installed.foreign import said
from diffgraft.lab.terminal import say
from diffgraft.methods.files import check_file

if TYPE_CHECKING:
    from diffgraft.lab.recipes import Recipe, Record
    from diffgraft.methods.inputs import CallSettings, Pictures


def run(
    pipeline: Pipeline,
    prompt: Annotated[str | None, typer.Option(help="What the picture should show.")] = None,
    negative_prompt: NegativePrompt = None,
    plugin: PluginNames = None,
    option: KnobValues = None,
    stack: StackFile = None,
    out: Annotated[
        Path, typer.Option("--out", help="File to write: .png, .jpg, .webp, .gif. A video becomes an animation or a contact sheet.")
    ] = Path("out.png"),
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; picture i of several has seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures (or videos).")] = 1,
    height: Height = None,
    width: Width = None,
    class_label: ClassLabels = None,
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="A picture to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --image is redrawn, above 0 and at most 1.")] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="FILE", help="The part of --image to paint anew: white there, black elsewhere.")
    ] = None,
    controlnet: Annotated[str | None, typer.Option("--controlnet", metavar="NAME", help="A ControlNet: a folder or a Hub id.")] = None,
    control_image: Annotated[
        str | None, typer.Option("--control-image", metavar="FILE", help="The picture that the ControlNet follows.")
    ] = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = None,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Write into the file how it was made (prompt, seed, plugins, paths).")
    ] = True,
) -> None:
    """Run a pipeline with plugins and write the picture; with --image, --mask or --controlnet, its family's pipeline for those."""
    from diffgraft.cli.mistakes import kept
    from diffgraft.cli.values import parse_assignments, specs_for

    specs, extra = specs_for(pipeline, plugin, option, stack), parse_assignments(arg, "-a")
    from diffgraft.lab.pictures import STILL, save_pictures
    from diffgraft.lab.recipes import Recipe

    check_file(out, STILL)
    recipe = Recipe(
        pipeline=pipeline,
        prompt=prompt,
        negative_prompt=negative_prompt,
        plugins=specs,
        seed=seed,
        num_images=num_images,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        class_label=[*(class_label or [])],
        image=image,
        mask=mask,
        controlnet=controlnet,
        control_image=control_image,
        strength=strength,
        args=extra,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    made = make(recipe)
    records = [made.record.model_copy(update={"picture": i}) for i in range(num_images)] if metadata and made.record else []
    for path in kept(lambda place: save_pictures(made.pictures, place, records), out, ".png"):
        made.lines.append(f"wrote {path}")
    made.tell()


def again(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A picture that `diffgraft run` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: FILE-again beside FILE).")] = None,
    device: Device = None,
) -> None:
    """Make a picture once more from what its file says, and tell whether it is the same bit for bit: exit code 1 if not."""
    from diffgraft.cli.mistakes import kept
    from diffgraft.lab.pictures import STILL, encode, same_picture, to_images
    from diffgraft.lab.recipes import read_record, versions_of
    from diffgraft.methods.files import write_atomic
    from diffgraft.stacks.references import digest_of

    record = read_record(file)
    out = out or file.with_name(f"{file.stem}-again{file.suffix}")
    check_file(out, STILL)
    for path, digest in record.files.items():
        if not Path(path).is_file() or digest_of(Path(path)) != digest:
            raise ConfigError(f"{file} was made from {path}, which is not there any more or is another file now")
    say(record.line())
    recipe = record.recipe if device is None else record.recipe.model_copy(update={"device": device})
    made = make(recipe)
    frames = to_images(made.pictures[record.picture])
    anew = made.record.model_copy(update={"picture": record.picture}) if made.record else None
    kept(lambda place: write_atomic(place, encode(frames, place.suffix.lower(), anew)), out, ".png")
    made.tell()
    same = same_picture(file, encode(frames, file.suffix.lower()))
    changed = {name: old for name, old in record.versions.items() if versions_of([name]).get(name) != old}
    why = "".join(f"; made with {name} {old}, here {versions_of([name])[name]}" for name, old in changed.items())
    say(f"wrote {out}: " + ("the same, bit for bit" if same else f"not the same{why}"))
    raise typer.Exit(0 if same else 1)


@dataclass
class Made:
    """What came of a recipe. Nothing is printed and nothing is raised before the pictures are in their files.

    record  of their making, where it could be had
    lines   how the run went
    fault   what went wrong once the pictures were there
    """

    pictures: Pictures
    record: Record | None = None
    lines: list[str] = field(default_factory=list)
    fault: DiffgraftError | None = None

    def tell(self) -> None:
        """Say how it went; raises ``fault``."""
        for line in self.lines:
            say(line)
        if self.fault is not None:
            raise self.fault


def make(recipe: Recipe) -> Made:
    """The pictures of a recipe, and the record of their making."""
    from diffgraft.cli.values import prompt_of
    from diffgraft.installed import registry

    pipe, call = prepared(recipe)
    prompts, remark = prompt_of(recipe.prompt, registry.bundled_of(recipe.pipeline))
    made = drawn(pipe, recipe, call, prompts)
    if remark:
        made.lines.insert(0, remark)
    return made


def prepared(recipe: Recipe) -> tuple[Any, CallSettings]:
    """(the pipeline of a recipe with its plugins, the settings of its calls). What can be said before weights are read is said then."""
    from diffgraft.cli.pictures import check_controlnet, class_for, fitted, load_controlnet, read_given, strength_for
    from diffgraft.cli.values import load_bare
    from diffgraft.installed import registry
    from diffgraft.kernel.loading import load_pipeline
    from diffgraft.methods.variants import as_variant

    given = read_given(recipe.image, recipe.mask, recipe.control_image, recipe.controlnet, recipe.strength)
    bundled = registry.bundled_of(recipe.pipeline)
    call = call_of(recipe)
    cls = None
    if given:
        cls = class_for(registry.resolve(recipe.pipeline), given, recipe.controlnet)
        call = replace(call, strength=strength_for(cls, recipe.strength, call.steps or (bundled.steps if bundled else None)))
        if recipe.controlnet is not None:
            check_controlnet(recipe.controlnet)
    pipe, built = load_bare(recipe.pipeline, recipe.plugins, recipe.device, recipe.dtype)
    if cls is not None:
        pipe = as_variant(pipe, cls, None if recipe.controlnet is None else load_controlnet(recipe.controlnet, pipe))
        names = {"image": recipe.image, "control": recipe.control_image}
        call = fitted(given, names, pipe, call)
    return load_pipeline(pipe, built, attention_backend=recipe.backend), call


def call_of(recipe: Recipe) -> CallSettings:
    """The settings of a recipe's calls, its pictures aside."""
    from diffgraft.cli.values import call_settings

    return call_settings(
        recipe.steps,
        recipe.guidance_scale,
        recipe.negative_prompt,
        recipe.height,
        recipe.width,
        None,
        recipe.args,
    )


def drawn(pipe: Any, recipe: Recipe, call: CallSettings, prompts: list[str], origins: Origins | None = None) -> Made:
    """The pictures that a prepared pipeline makes of a recipe. ``origins``: where they are known, see `origins_of`."""
    import numpy as np

    from diffgraft.methods.inputs import as_array, make_pictures, make_samples

    samples = make_samples(pipe, [recipe.seed + i for i in range(recipe.num_images)], prompts, recipe.class_label)
    started = time.perf_counter()
    try:
        made = Made(make_pictures(pipe, samples, call))
    except NeverFired as error:
        if error.result is None:
            raise
        made = Made(as_array(error.result, len(samples)), fault=error)
    seconds = time.perf_counter() - started
    if empty := sum(not np.isfinite(picture).all() for picture in made.pictures):
        made.fault = made.fault or OutputError(
            f"{empty} of {len(samples)} pictures hold no numbers (NaN): lower --guidance-scale, or take --dtype float32"
        )
    try:
        made.lines.append(str(pipe.plugins.report()) if pipe.plugins.list() else f"no plugins, {seconds:.2f} s")
        made.record = record_of(pipe, recipe, call, samples[0].prompt, (made.pictures.shape[-2], made.pictures.shape[-3]), origins)
    except Exception as error:  # whatever it is, the pictures are written first
        made.fault = made.fault or OutputError(f"the picture is there, but says nothing of its making: {said(error)}")
    return made


def files_of(recipe: Recipe) -> dict[str, str]:
    """The files that go into a recipe's pictures: path -> SHA-256."""
    from diffgraft.stacks.references import digest_of

    knobs = [str(value) for _, given in recipe.plugins for value in given.values() if isinstance(value, (str, Path))]
    named = (recipe.image, recipe.mask, recipe.control_image, *knobs)
    return {path: digest_of(Path(path)) for path in named if path is not None and Path(path).is_file()}


@dataclass(frozen=True)
class Origins:
    """What pictures come from besides their recipe: files (path -> SHA-256) and packages (name -> version)."""

    files: dict[str, str]
    versions: dict[str, str]


def origins_of(pipe: Any, recipe: Recipe) -> Origins:
    """The origins of a pipeline's pictures. It reads every plugin's package: for thousands of pictures, ask once."""
    from diffgraft.installed import registry
    from diffgraft.lab.recipes import versions_of

    known = registry.installed()
    return Origins(files_of(recipe), versions_of([known[name].dist for name in pipe.plugins]))


def record_of(
    pipe: Any, recipe: Recipe, call: CallSettings, prompt: str | None, size: tuple[int, int], origins: Origins | None = None
) -> Record:
    """What the pictures' files will say of the run that is just over."""
    from diffgraft.kernel.defaults import own_defaults
    from diffgraft.lab.recipes import Record
    from diffgraft.methods.inputs import class_labels_of, default_steps, parameters

    guidance = call.guidance_scale
    if guidance is None:
        guidance, ran = own_defaults(pipe).get("guidance_scale"), getattr(pipe, "_guidance_scale", None)
        if ran is not None and ran != parameters(pipe)["guidance_scale"].default:  # a plugin has set it, an inversion's code for instance
            guidance = ran
    origins = origins or origins_of(pipe, recipe)
    told = {
        "prompt": prompt,
        "steps": call.steps or (default_steps(pipe) if "num_inference_steps" in parameters(pipe) else None),
        "guidance_scale": guidance,
        "strength": call.strength,
        "class_label": class_labels_of(pipe, recipe.class_label),
        "args": dict(call.extra),
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    return Record(
        recipe=recipe.model_copy(update=told),
        kind=type(pipe).__name__,
        scheduler=type(pipe.plugins.run_scheduler()).__name__,
        size=size,
        files=origins.files,
        versions=origins.versions,
    )
