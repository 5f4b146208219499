"""``diffgraft calibrate | quantise | evolve | invert | fit``: files that plugins need."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.options import (
    ClassLabels,
    Device,
    Dtype,
    Extra,
    GuidanceScale,
    Height,
    KnobValues,
    NegativePrompt,
    PromptFile,
    PromptTexts,
    SampleCount,
    Steps,
    Threads,
    Width,
)
from diffgraft.cli.steady import steady
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.lab.terminal import say
from diffgraft.methods.files import check_file, partial_of

if TYPE_CHECKING:
    from diffgraft.installed.plugin import Plugin


def calibrate(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin that needs an artefact.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    class_label: ClassLabels = None,
    samples: SampleCount = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN.safetensors).")] = None,
    option: KnobValues = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; prompt i has seed + i.")] = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Measure what a plugin needs to know of a model; an interrupted calibration goes on where it stopped."""
    asked = steps, guidance_scale, negative_prompt, height, width, arg
    path = out or Path(f"{plugin}.safetensors")
    measured(plugin, pipeline, option, (prompt, prompts, class_label, samples), seed, path, asked, (device, dtype, threads))


def quantise(
    pipeline: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name, a folder, or a Hub id.")],
    plugin: Annotated[
        str,
        typer.Option("--plugin", "-p", help="A plugin with the knob bits: vidit_q (transformers), q_diffusion, ptq4dm or tfmq (U-Nets)."),
    ],
    bits: Annotated[str, typer.Option(help="Bits of weights and activations: w8a8, w6a8, w4a8, w4a32.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    class_label: ClassLabels = None,
    samples: SampleCount = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN-BITS.safetensors).")] = None,
    option: KnobValues = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; prompt i has seed + i.")] = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Calibrate a plugin that quantises, and tell what its plan makes of the weights; interrupted, the same command goes on."""
    from diffgraft.methods.named import those
    from diffgraft.methods.quant.knobs import BitsConfig

    if not quantises(registry.find(plugin)):
        raise Unsupported(f"{plugin} quantises nothing after a calibration; installed plugins that do: {', '.join(those(quantises))}")
    asked = steps, guidance_scale, negative_prompt, height, width, arg
    path, options = out or Path(f"{plugin}-{bits}.safetensors"), [*(option or []), f"{plugin}.bits={bits}"]
    pipe, built = measured(plugin, pipeline, options, (prompt, prompts, class_label, samples), seed, path, asked, (device, dtype, threads))
    from diffgraft.cli.values import read_prompts
    from diffgraft.installed.anatomy import denoisers_of
    from diffgraft.kernel.loading import load_pipeline
    from diffgraft.methods.artefacts import assignments
    from diffgraft.methods.quant.layers import quantised_in
    from diffgraft.methods.quant.told import simulated

    idle = built.Config.of_calibration if issubclass(built.Config, BitsConfig) else ()
    knobs = {**{name: value for name, value in built.own_knobs.items() if name not in idle}, "artefact": str(path)}
    load_pipeline(pipe, plugins={plugin: knobs})
    denoisers = denoisers_of(pipe, registry.find_family(type(pipe)))
    told = simulated(denoisers, plugin, bits) if quantised_in(denoisers) else f"{bits}: no layer is quantised"
    said = {
        "steps": steps,
        "guidance-scale": guidance_scale,
        "negative-prompt": negative_prompt,
        "height": height,
        "width": width,
        "device": device,
        "dtype": dtype,
        "prompt": next(iter(read_prompts(prompt, prompts)), None),
        "class-label": class_label[0] if class_label else None,
    }
    words = ["diffgraft", "run", pipeline, "-p", plugin]
    words += [word for knob in assignments(plugin, knobs) for word in ("-o", knob)]
    words += [word for each in arg or [] for word in ("-a", each)]
    words += [word for name, value in said.items() if value is not None for word in (f"--{name}", str(value))]
    say(f"{told}; a run with it:\n{shlex.join(words)}")


def quantises(plugin: type[Plugin]) -> bool:
    """Whether a plugin puts layers on grids of so many bits, after a calibration."""
    from diffgraft.methods.quant.knobs import BitsConfig

    return issubclass(plugin.Config, BitsConfig) and plugin.calibration is not None


def measured(
    plugin: str,
    pipeline: str,
    option: list[str] | None,
    chosen: tuple[list[str] | None, Path | None, list[str] | None, int | None],
    seed: int,
    path: Path,
    asked: tuple[Any, ...],
    machine: tuple[str | None, str | None, int | None],
) -> tuple[Any, Plugin]:
    """(the bare pipeline, the plugin with its knobs), after the calibration is written to ``path``.

    Args:
        chosen: prompts, a file of them, class labels, how many samples.
        asked: steps, guidance scale, negative prompt, height, width, further arguments of the call as they were typed.
        machine: device, dtype, threads.
    """
    from diffgraft.cli.values import asked_for, call_settings, load_bare, parse_assignments, read_prompts, specs_for
    from diffgraft.methods.named import declared

    specs = specs_for(pipeline, [plugin], option)
    declared(registry.find(plugin), "calibration")  # before the pipeline is loaded
    texts, file, classes, samples = chosen
    number, words = asked_for(read_prompts(texts, file), classes, samples, "calibrate")
    steps, guidance_scale, negative_prompt, height, width, arg = asked
    extra = parse_assignments(arg, "-a")
    check_file(path, [".safetensors"])
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.calibration import calibrate as measure
    from diffgraft.methods.inputs import make_samples

    settings = call_settings(steps, guidance_scale, negative_prompt, height, width, None, extra)
    device, dtype, threads = machine
    pipe, built = load_bare(pipeline, specs, device, dtype)
    made_of = make_samples(pipe, [seed + i for i in range(number)], **words)
    with steady(threads, timed=False), progress() as on_progress:
        try:
            artefact = measure(pipe, built[0], made_of, settings, path, on_progress=on_progress)
        except KeyboardInterrupt:
            if (kept := partial_of(path)).exists():
                say(f"stopped; what is done lies in {kept}, and the same command goes on from there", err=True)
            raise
    made = artefact.made_for
    kind = ("prompt" if words.get("prompts") else "sample") + ("s" if number > 1 else "")
    say(f"wrote {path}: for {made.pipeline}, {made.scheduler}, {made.steps} steps, latents {made.shape}, from {number} {kind}")
    return pipe, built[0]


def evolve(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin whose settings can be searched for.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    class_label: ClassLabels = None,
    samples: SampleCount = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN.json).")] = None,
    steps: Steps = None,
    fitness: Annotated[str, typer.Option(help="trajectory, reward or frechet: see docs of diffgraft.methods.fitness.")] = "trajectory",
    reward: Annotated[str | None, typer.Option(help="For --fitness reward: emoji_judge, or package.module:name.")] = None,
    features: Annotated[
        str | None, typer.Option(help="For --fitness frechet: package.module:name of (images) -> rows (default: the bundled judge's).")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="For --fitness frechet: a folder of pictures (default: the pipeline's own, with many steps).")
    ] = None,
    reference_steps: Annotated[int, typer.Option(min=1, help="Steps of the many-step reference.")] = 50,
    population: Annotated[int, typer.Option(min=1, help="Candidates of a generation.")] = 50,
    epochs: Annotated[int, typer.Option(min=1, help="Generations.")] = 10,
    top: Annotated[int | None, typer.Option(min=1, help="Best candidates that have children (default: a fifth).")] = None,
    mutations: Annotated[int | None, typer.Option(min=0, help="Mutations of a generation (default: half).")] = None,
    crossovers: Annotated[int | None, typer.Option(min=0, help="Crossovers of a generation (default: a fifth).")] = None,
    searcher: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="A knob of the search itself: mutation=0.1.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option("--beside", metavar="NAME", help="A plugin that every candidate runs with: a solver; repeat or a,b.")
    ] = None,
    option: KnobValues = None,
    seed: Annotated[int, typer.Option(help="Seed of the evolution and of the noise; prompt i has seed + i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one call.")] = 16,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Find a plugin's settings for one pipeline and number of steps by evolution; an interrupted search goes on where it stopped."""
    from diffgraft.cli.values import (
        asked_for,
        call_settings,
        load_bare,
        make_fitness,
        parse_assignments,
        read_prompts,
        specs_for,
    )
    from diffgraft.methods.named import declared

    specs = specs_for(pipeline, [plugin, *(beside or [])], option)
    made_by = declared(registry.find(plugin), "search")  # before the pipeline is loaded
    if why := made_by.not_by.get(fitness):
        raise ConfigError(f"--fitness {fitness}: {why}")
    bred = {"--top": top, "--mutations": mutations, "--crossovers": crossovers}
    if not made_by.breeds and (idle := [f"{name} {value}" for name, value in bred.items() if value is not None]):
        raise ConfigError(f"{', '.join(idle)}: the search of {plugin} breeds nothing; leave it out")
    if made_by.own_noise and seed:
        raise ConfigError(f"--seed {seed}: each candidate of {plugin} says which noise it draws; leave it out")
    number, words = asked_for(read_prompts(prompt, prompts), class_label, samples, "judge the candidates")
    if steps is None:
        raise ConfigError("what is found holds for one number of steps: give --steps K")
    knobs, extra = parse_assignments(searcher, "--set"), parse_assignments(arg, "-a")
    path = out or Path(f"{plugin}.json")
    check_file(path, [".json"])
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import make_samples
    from diffgraft.methods.search import Plan
    from diffgraft.methods.search import search as find_settings

    plan = Plan.of(population, epochs=epochs, top=top, mutations=mutations, crossovers=crossovers, seed=seed)
    judged = make_fitness(fitness, reward, features, reference, reference_steps, registry.bundled_of(pipeline))
    call = call_settings(steps, guidance_scale, negative_prompt, height, width, None, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    made_of = make_samples(pipe, [seed + i for i in range(number)], **words)
    with steady(threads, timed=False), progress() as on_progress:
        found = find_settings(
            pipe, built[0], made_of, call, path, judged, plan=plan, knobs=knobs, beside=built[1:], batch=batch, on_progress=on_progress
        )
    loss = found.facts["fitness"]
    say(f"{found.facts['judged']} candidates: loss ({loss['name']}) {loss['loss_of_start']:.6g} at the start, {loss['loss']:.6g} now")
    if not found.tells_apart:
        say(f"all {len(found.facts['ranking'])} have the same loss: the fitness does not tell them apart, and their order says nothing")
    say(f"wrote {path}: for {found.made_for.pipeline}, {found.made_for.scheduler}, {found.made_for.steps} steps")


def invert(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin that can walk from a picture back to noise.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    image: Annotated[Path, typer.Option("--image", help="The picture.")],
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; the same prompt makes it again.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN-code.safetensors).")] = None,
    option: KnobValues = None,
    steps: Steps = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale of the walk; the code keeps it for the way back (default: 1, no guidance).")
    ] = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
    check: Annotated[bool, typer.Option("--check", help="Make the picture again and tell how near it comes.")] = False,
) -> None:
    """Walk from a picture back to the noise that it comes from; `run` with the code makes it again, or edits it."""
    from diffgraft.cli.values import call_settings, load_bare, parse_assignments, specs_for
    from diffgraft.methods.named import declared

    specs = specs_for(pipeline, [plugin], option)
    declared(registry.find(plugin), "inversion")  # before the pipeline is loaded
    extra = parse_assignments(arg, "-a")
    path = out or Path(f"{plugin}-code.safetensors")
    check_file(path, [".safetensors"])
    from dataclasses import replace

    from diffgraft.methods.inputs import make_samples, parameters
    from diffgraft.methods.inversion import invert as walk_back
    from diffgraft.methods.inversion import round_trip
    from diffgraft.methods.variants import own_size

    settings = call_settings(steps, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    [sample] = make_samples(pipe, [0], [prompt] if prompt is not None else [])
    picture, settings = settings.image, replace(settings, image=None)
    code = walk_back(pipe, built[0], picture, sample, settings, path)
    near = round_trip(pipe, built[0], picture, sample, settings, code) if check else None
    made = code.made_for
    whole = code.facts["steps"]
    walked = f"{made.steps} of {whole} steps" if whole and made.steps < whole else f"{made.steps} steps"
    guidance = "" if (scale := code.facts["guidance_scale"]) is None else f", guidance {scale:g}"
    say(f"wrote {path}: {made.pipeline}, {walked}{guidance}, latents {made.shape}")
    if near is not None:
        say(f"PSNR to the picture: {near[0]:.2f} dB through the autoencoder alone, {near[1]:.2f} dB made again from the code")
    # the guidance scale comes with the code; the size is said where the pipeline would take another by itself
    own = code.facts["size"] == own_size(pipe) or "height" not in parameters(pipe)
    height, width = (None, None) if own else code.facts["size"]
    words = ["diffgraft", "run", pipeline, "-p", plugin]
    words += [word for knob in [*(option or []), f"{plugin}.start={path}"] for word in ("-o", knob)]
    words += [word for each in arg or [] for word in ("-a", each)]
    said = {"steps": whole, "height": height, "width": width, "negative-prompt": negative_prompt, "device": device, "dtype": dtype}
    words += [word for name, value in {**said, "prompt": prompt}.items() if value is not None for word in (f"--{name}", str(value))]
    say(f"make it again, or edit it with another prompt:\n{shlex.join(words)}")


def fit(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin that learns what it needs.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="A folder of pictures, with metadata.jsonl (file_name, text) or a .txt beside each.")
    ] = None,
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    class_label: ClassLabels = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN.safetensors).")] = None,
    option: KnobValues = None,
    fitter: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="A knob of the fit itself, where the plugin has some.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples in one step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    keep_every: Annotated[float, typer.Option(min=0, help="Seconds after which the state is written, to go on from.")] = 60.0,
    inference_steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the calls that it is for.")] = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16 of the pipeline.")] = "float32",
    threads: Threads = None,
) -> None:
    """Learn what a plugin needs by gradient descent, the pipeline's weights stay; an interrupted fit goes on where it stopped."""
    from diffgraft.cli.values import call_settings, load_bare, parse_assignments, read_prompts, specs_for
    from diffgraft.methods.named import declared

    specs = specs_for(pipeline, [plugin], option)
    learns = declared(registry.find(plugin), "fitting")  # before the pipeline is loaded
    path = out or Path(f"{plugin}.safetensors")
    check_file(path, [".safetensors"])
    texts = read_prompts(prompt, prompts)
    if sum(map(bool, (data, texts, class_label))) > 1:
        raise ConfigError("--data, --prompts and --class-label: give one of them; pictures bring their own captions and labels")
    knobs, extra = parse_assignments(fitter, "--set"), parse_assignments(arg, "-a")
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.examples import Example, read_examples
    from diffgraft.methods.fitting import FitPlan
    from diffgraft.methods.fitting import fit as learn
    from diffgraft.methods.inputs import class_labels_of

    plan = FitPlan(steps, batch, seed, keep_every)
    examples = [*map(Example, texts)] if data is None else read_examples(data)
    if learns.wants and not (examples or class_label):
        wanted = " and ".join(sorted(learns.wants))
        raise ConfigError(f"{plugin} learns from {wanted}: give --data FOLDER; or --prompts FILE, --class-label N where they do")
    call = call_settings(inference_steps, guidance_scale, negative_prompt, height, width, None, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    examples += [Example(class_label=label) for label in class_labels_of(pipe, class_label or [])]
    with steady(threads, timed=False), progress() as on_progress:
        found = learn(pipe, built[0], examples, call, path, plan, knobs=knobs, on_progress=on_progress)
    losses = found.facts["fit"]["losses"]
    told = learns.told(found.facts) or f"loss {losses[0]:.6g} at the start, {losses[-1]:.6g} at the end"
    say(f"{steps} steps of {batch} examples: {told}")
    say(f"wrote {path}: for {found.made_for.pipeline}, {found.made_for.scheduler}, {found.made_for.steps} steps")
