"""The command line: ``diffgraft list | show | search | run | compare | tune | calibrate | evolve | invert | doctor | new | check``.

Torch is imported inside the commands that need it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffgraft import __version__
from diffgraft.cli import community as cli_community
from diffgraft.cli.catalogue import search
from diffgraft.community.quality import tier_of
from diffgraft.kernel import registry
from diffgraft.kernel.errors import ConfigError, DiffgraftError

BUNDLED_SAMPLES = 24
OTHER_SAMPLES = 6
BUNDLED_BATCH = 8
TUNE_SAMPLES = 6


class Group(TyperGroup):
    """Shows an error of our tree as one message in red, exit code 2, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffgraftError as error:
            typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Graft paper methods onto standard diffusers pipelines: one plugin per paper, stacked.",
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffgraft {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Graft paper methods onto standard diffusers pipelines: one plugin per paper, stacked."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints about optional packages are no news of ours
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


# options that several commands share

Pipeline = Annotated[str, typer.Argument(metavar="PIPELINE", help="A bundled name (emoji-sd), a folder, or a Hub id.")]
PluginNames = Annotated[
    list[str] | None,
    typer.Option("--plugin", "--plugins", "-p", metavar="NAME", help="A plugin; several: repeat or a,b. The first is outermost."),
]
KnobValues = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="PLUGIN.KNOB=VALUE", help="A plugin's knob: deepcache.interval=5.")
]
NegativePrompt = Annotated[str | None, typer.Option(help="What the picture should not show.")]
ClassLabels = Annotated[
    list[int] | None, typer.Option("--class-label", help="Class number, for class-conditional pipelines; repeat for several.")
]
ImagePath = Annotated[Path | None, typer.Option("--image", help="Input picture, for pipelines that take one.")]
PromptTexts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat for several.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="A text file with one prompt a line.")]
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# list and show ----------------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_plugins(
    as_json: AsJson = False, markdown: Annotated[bool, typer.Option(help="Print a Markdown table (imports the plugins).")] = False
) -> None:
    """List the installed plugins, without importing any."""
    if markdown:
        from diffgraft.community.tables import installed_table

        table, faults = installed_table()
        typer.echo(table, nl=False)
        for fault in faults:
            typer.secho(fault, fg="red", err=True)
        return
    rows = [
        {
            "name": info.name,
            "summary": info.summary,
            "version": info.version,
            "dist": info.dist,
            "tier": tier_of(info.entry.module),
            "allowed": info.allowed,
            "status": "broken" if info.broken else "ok" if info.allowed else "not allowed",
            "reason": info.broken or (None if info.allowed else f"not in {registry.ALLOW}"),
        }
        for info in registry.installed().values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no plugin is installed; `pip install diffgraft-deepcache` brings one")
        return
    from rich.table import Table

    from diffgraft.lab.terminal import console, escaped

    out = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "package", "tier", "status", "what it does"):
        out.add_column(column, overflow="fold")
    colours = {"ok": "green", "broken": "red", "not allowed": "yellow"}
    for row in rows:
        status = f"[{colours[str(row['status'])]}]{row['status']}[/]"
        what = row["summary"] if row["reason"] is None else row["reason"]
        out.add_row(str(row["name"]), str(row["version"]), str(row["dist"]), str(row["tier"] or ""), status, escaped(what))
    console().print(out)


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A plugin.")], as_json: AsJson = False) -> None:
    """Show one plugin: its paper, hook points, knobs, families and effects."""
    from diffgraft.community.tables import describe, knobs

    cls = registry.find(name)
    facts = describe(cls, registry.installed()[name])
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    from rich.table import Table

    from diffgraft.lab.terminal import console, escaped

    paper = facts["paper"]
    lines = {
        "package": f"{facts['dist']} {facts['version']}",
        "tier": facts["tier"],
        "paper": f"{paper['title']}, arXiv:{paper['arxiv']}" if paper["arxiv"] else paper["title"],
        "implemented": paper["implemented"],
        "omitted": paper["omitted"],
        "licence": paper["licence"],
        "hook points": ", ".join(facts["hook_points"]),
        "effects": facts["effects"],
        "families": "all" if "*" in facts["families"] else ", ".join(facts["families"]),
        "pipelines": ", ".join(facts["pipelines"]),
        "changes nothing at": ", ".join(f"{k}={json.dumps(v, default=str)}" for k, v in facts["neutral"].items()) or "no setting",
    }
    title = f"{name} - {facts['summary']}"
    about = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    about.add_column(style="cyan", no_wrap=True)
    about.add_column(overflow="fold")
    for key, text in lines.items():
        if text:
            about.add_row(key, escaped(text))
    console().print(about)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("knob", "allowed", "default", "what it is"):
        table.add_column(column, overflow="fold")
    for knob in knobs(cls):
        table.add_row(knob.name, escaped(knob.allowed), escaped(str(knob.default)), escaped(knob.description))
    console().print()
    console().print(table if knobs(cls) else "it has no knobs")


# run --------------------------------------------------------------------------------------------------------------------------------


@app.command()
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


# compare ----------------------------------------------------------------------------------------------------------------------------


@app.command()
def compare(
    pipeline: Pipeline,
    plugins: PluginNames = None,
    always: Annotated[
        list[str] | None,
        typer.Option("--always", metavar="NAME", help="A plugin of the list that is part of every arm: what do the others add to it?"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.png and compare.json.")] = Path("out"),
    option: KnobValues = None,
    prompt: PromptTexts = None,
    prompts: PromptFile = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures for the fidelity figures and the judge (default: one a prompt; without prompts 24 for a bundled pipeline).",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, 0,1,2: every prompt with every seed (default: picture i has seed i).")] = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    class_label: ClassLabels = None,
    image: ImagePath = None,
    arg: Extra = None,
    reference_steps: Annotated[
        int | None,
        typer.Option(min=2, help="Hold pictures against the plain pipeline's with so many steps, not against the baseline's (solvers)."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Latency rounds.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Warm-up calls of every arm.")] = 2,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures in one call for the fidelity figures (default: 8 for a bundled pipeline, else 1).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = None,
) -> None:
    """Measure plugins against the plain pipeline: each alone, the stack, and fewer steps at equal time."""
    from diffgraft.cli.values import (
        bundled_of,
        call_settings,
        load_bare,
        parse_assignments,
        parse_seeds,
        plugin_specs,
        read_prompts,
        refusals,
    )

    specs = plugin_specs(plugins, option)
    if not specs:
        raise ConfigError("nothing to compare: give --plugins a,b")
    extra = parse_assignments(arg, "-a")
    texts = read_prompts(prompt, prompts)
    seed_list = parse_seeds(seeds)
    from diffgraft.lab.pictures import check_folder

    check_folder(out, "--out")
    from diffgraft.lab.compare import CompareSettings, load_judge
    from diffgraft.lab.compare import compare as measure
    from diffgraft.lab.compare_view import print_comparison, write_comparison
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import default_steps, make_samples

    bundled = bundled_of(pipeline)
    call = call_settings(bundled, None, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    asked: list[Any] = texts or list(class_label or ())
    examples = list(bundled.prompts) if bundled else []
    chosen = choose_samples(asked or examples, bool(asked), seed_list, num_prompts, bundled is not None)
    samples = make_samples(
        pipe,
        [seed for _, seed in chosen],
        [text for text, _ in chosen if isinstance(text, str)],
        [label for label, _ in chosen if isinstance(label, int)],
    )
    settings = CompareSettings(
        samples=tuple(samples),
        steps=steps or (bundled.steps if bundled else default_steps(pipe)),
        call=call,
        repeats=repeats,
        warmup=warmup,
        batch=batch or (BUNDLED_BATCH if bundled else 1),
        reference_steps=reference_steps,
    )
    judge = load_judge(bundled) if bundled else None
    with progress() as on_progress, refusals(pipe):
        result = measure(pipe, built, settings, always=always or (), judge=judge, on_progress=on_progress, attention_backend=backend)
    write_comparison(result, pipeline, out)
    print_comparison(result)
    typer.echo(f"wrote {out / 'compare.png'} and {out / 'compare.json'}")


def choose_samples(asked: list[Any], given: bool, seeds: list[int] | None, number: int | None, bundled: bool) -> list[tuple[Any, int]]:
    """(prompt or class label or None, seed) of every picture."""
    number = number or (len(asked) if given else BUNDLED_SAMPLES if bundled else OTHER_SAMPLES)
    asked = asked or [None]
    if seeds is not None:
        return [(item, seed) for seed in seeds for item in asked[:number]]
    return [(asked[i % len(asked)], i) for i in range(number)]


# tune -------------------------------------------------------------------------------------------------------------------------------


@app.command()
def tune(
    pipeline: Pipeline,
    target: Annotated[str, typer.Option("--target", help="What to reach: psnr=30 (dB), ssim=0.95 or judge=0.9 (share right).")],
    budget: Annotated[str | None, typer.Option(help="When to end: 90s, 30m, 1h30m; what an interrupted run spent counts.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many candidates are measured.")] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option("--plugin", "--plugins", "-p", metavar="NAME", help="A candidate (default: all that say what to tune and fit)."),
    ] = None,
    option: KnobValues = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for tune.json and tune.png; OUT.partial is for going on.")] = Path("out"),
    prompt: PromptTexts = None,
    prompts: PromptFile = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Pictures that a candidate is judged on; the end takes twice as many.")
    ] = TUNE_SAMPLES,
    steps: Annotated[int | None, typer.Option(min=1, help="The most steps that are tried (default: the pipeline's).")] = None,
    reference_steps: Annotated[
        int | None, typer.Option(min=1, help="psnr and ssim are to the plain pipeline's pictures with so many steps (default: --steps).")
    ] = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    class_label: ClassLabels = None,
    image: ImagePath = None,
    arg: Extra = None,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the noise; picture i has seed + i.")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures in one call (default: 8 for a bundled pipeline, else 1).")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the fastest stack, settings and number of steps that reach a fidelity; an interrupted run goes on where it stopped."""
    from diffgraft.cli.values import bundled_of, call_settings, load_bare, parse_assignments, plugin_specs, read_prompts, refusals
    from diffgraft.lab.tune import tune as look
    from diffgraft.lab.tune.goal import Goal, TuneSettings, parse_budget
    from diffgraft.lab.tune.space import find_plugins
    from diffgraft.lab.tune.study import imported
    from diffgraft.lab.tune.view import print_tuning, write_plot

    for module in ("optuna", "matplotlib.figure"):  # said before anything is loaded
        imported(module)
    goal, seconds = Goal.parse(target), None if budget is None else parse_budget(budget)
    specs = plugin_specs(plugins or list(registry.installed()), option)
    extra = parse_assignments(arg, "-a")
    texts = read_prompts(prompt, prompts)
    from diffgraft.lab.pictures import check_folder

    check_folder(out, "--out")
    from diffgraft.kernel.loading import build_plugin
    from diffgraft.lab.compare import load_judge
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import default_steps, make_samples

    named = [build_plugin(spec) for spec in specs] if plugins else None
    bundled = bundled_of(pipeline)
    call = call_settings(bundled, None, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, _ = load_bare(pipeline, [], device, dtype)
    found, left_out = (named, {}) if named else find_plugins(pipe, {name: knobs for name, knobs in specs if knobs})
    asked: list[Any] = texts or list(class_label or ()) or (list(bundled.prompts) if bundled else [None])
    chosen = [(asked[i % len(asked)], seed + i) for i in range(3 * num_prompts)]
    samples = make_samples(
        pipe,
        [number for _, number in chosen],
        [text for text, _ in chosen if isinstance(text, str)],
        [label for label, _ in chosen if isinstance(label, int)],
    )
    settings = TuneSettings(
        goal=goal,
        samples=tuple(samples[:num_prompts]),
        held_out=tuple(samples[num_prompts:]),
        steps=steps or (bundled.steps if bundled else default_steps(pipe)),
        call=call,
        reference_steps=reference_steps,
        budget=seconds,
        trials=trials,
        batch=batch or (BUNDLED_BATCH if bundled else 1),
        seed=seed,
    )
    judge = load_judge(bundled) if bundled and goal.measure == "judge" else None
    command = shlex.join(["diffgraft", *sys.argv[1:]])
    with progress() as on_progress, refusals(pipe):
        result = look(
            pipe, found, settings, out, name=pipeline, judge=judge, left_out=left_out, command=command, on_progress=on_progress
        )
    write_plot(result, pipeline, out)
    print_tuning(result)
    typer.echo(f"wrote {out / 'tune.png'} and {out / 'tune.json'}")


# calibrate --------------------------------------------------------------------------------------------------------------------------


@app.command()
def calibrate(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin that needs an artefact.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
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
) -> None:
    """Measure what a plugin needs to know of a model; an interrupted calibration goes on where it stopped."""
    from diffgraft.cli.values import bundled_of, call_settings, load_bare, parse_assignments, plugin_specs, read_prompts, refusals

    specs = plugin_specs([plugin], option)
    texts = read_prompts(prompt, prompts)
    if not texts:
        raise ConfigError("nothing to calibrate on: give --prompts FILE with one prompt a line, or --prompt TEXT")
    extra = parse_assignments(arg, "-a")
    path = out or Path(f"{plugin}.safetensors")
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out {path}: an artefact is a .safetensors file")
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.calibration import calibrate as measure
    from diffgraft.methods.inputs import make_samples

    call = call_settings(bundled_of(pipeline), steps, guidance_scale, negative_prompt, height, width, None, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    samples = make_samples(pipe, [seed + i for i in range(len(texts))], texts)
    with progress() as on_progress, refusals(pipe):
        artefact = measure(pipe, built[0], samples, call, path, on_progress=on_progress)
    made = artefact.made_for
    typer.echo(f"wrote {path}: for {made.pipeline}, {made.scheduler}, {made.steps} steps, latents {made.shape}, from {len(texts)} prompts")


# evolve -----------------------------------------------------------------------------------------------------------------------------


@app.command()
def evolve(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin whose settings can be searched for.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
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
) -> None:
    """Find a plugin's settings for one pipeline and number of steps by evolution; an interrupted search goes on where it stopped."""
    from diffgraft.cli.values import (
        bundled_of,
        call_settings,
        load_bare,
        make_fitness,
        parse_assignments,
        plugin_specs,
        read_prompts,
        refusals,
    )

    specs = plugin_specs([plugin, *(beside or [])], option)
    texts = read_prompts(prompt, prompts)
    if not texts:
        raise ConfigError("nothing to judge the candidates on: give --prompts FILE with one prompt a line, or --prompt TEXT")
    if steps is None:
        raise ConfigError("what is found holds for one number of steps: give --steps K")
    knobs, extra = parse_assignments(searcher, "--set"), parse_assignments(arg, "-a")
    path = out or Path(f"{plugin}.json")
    if path.suffix != ".json":
        raise ConfigError(f"--out {path}: what a search finds is a .json file")
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import make_samples
    from diffgraft.methods.search import Plan
    from diffgraft.methods.search import search as find_settings

    plan = Plan.of(population, epochs=epochs, top=top, mutations=mutations, crossovers=crossovers, seed=seed)
    judged = make_fitness(fitness, reward, features, reference, reference_steps, bundled_of(pipeline))
    call = call_settings(bundled_of(pipeline), steps, guidance_scale, negative_prompt, height, width, None, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    samples = make_samples(pipe, [seed + i for i in range(len(texts))], texts)
    with progress() as on_progress, refusals(pipe):
        found = find_settings(
            pipe, built[0], samples, call, path, judged, plan=plan, knobs=knobs, beside=built[1:], batch=batch, on_progress=on_progress
        )
    loss = found.facts["fitness"]
    typer.echo(f"{found.facts['judged']} candidates: {loss['name']} {loss['loss_of_start']:.6g} at the start, {loss['loss']:.6g} now")
    typer.echo(f"wrote {path}: for {found.made_for.pipeline}, {found.made_for.scheduler}, {found.made_for.steps} steps")


# invert -----------------------------------------------------------------------------------------------------------------------------


@app.command()
def invert(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="A plugin that can walk from a picture back to noise.")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="A bundled name, a folder, or a Hub id.")],
    image: Annotated[Path, typer.Option("--image", help="The picture.")],
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; the same prompt makes it again.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: PLUGIN-code.safetensors).")] = None,
    option: KnobValues = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    arg: Extra = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Walk from a picture back to the noise that it comes from; `run` with the code makes it again, or edits it."""
    from diffgraft.cli.values import bundled_of, call_settings, load_bare, parse_assignments, plugin_specs, refusals

    specs = plugin_specs([plugin], option)
    extra = parse_assignments(arg, "-a")
    path = out or Path(f"{plugin}-code.safetensors")
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out {path}: the code of a picture is a .safetensors file")
    from dataclasses import replace

    from diffgraft.methods.inputs import make_samples
    from diffgraft.methods.inversion import invert as walk_back

    settings = call_settings(bundled_of(pipeline), steps, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    [sample] = make_samples(pipe, [0], [prompt] if prompt is not None else [])
    with refusals(pipe):
        code = walk_back(pipe, built[0], settings.image, sample, replace(settings, image=None), path)
    typer.echo(f"wrote {path}: {code.made_for.pipeline}, {code.made_for.steps} steps, latents {code.made_for.shape}")
    typer.echo(f"make it again, or with another prompt edit it: diffgraft run {pipeline} -p {plugin} -o {plugin}.start={path} ...")


# doctor -----------------------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this installation: versions, devices, and every plugin, family and bundled pipeline. Exit code 1 when something is broken."""
    from diffgraft.lab.doctor import diagnose

    found = diagnose()
    if as_json:
        typer.echo(json.dumps({**asdict(found), "ok": not found.broken}, indent=2))
        raise typer.Exit(1 if found.broken else 0)
    machine = found.machine
    typer.echo("versions    " + ", ".join(f"{name} {number or 'not installed'}" for name, number in found.versions.items()))
    typer.echo(f"machine     {machine['system']}, {machine['processor']}, {machine['cpus']} CPUs, {machine['threads']} torch threads")
    typer.echo("devices     " + ", ".join(["cpu", *machine["accelerators"]]))
    typer.echo("attention   " + ", ".join(found.backends))
    allowed = "all plugins may load" if found.allowed is None else f"only {', '.join(found.allowed) or 'none'}"
    typer.echo(f"allow-list  {registry.ALLOW}: {allowed}")
    for title, checks in (("plugins", found.plugins), ("families", found.families), ("pipelines", found.pipelines)):
        for i, check in enumerate(checks):
            colour = {"ok": "green", "broken": "red"}.get(check.status, "yellow")
            typer.echo(f"{title if i == 0 else '':<12}" + typer.style(f"{check.status:<12}", fg=colour) + f"{check.name}: {check.detail}")
        if not checks:
            typer.echo(f"{title:<12}none")
    if found.broken:
        typer.secho(f"broken: {', '.join(check.name for check in found.broken)}", fg="red", err=True)
        raise typer.Exit(1)
    typer.secho("all is well", fg="green")

cli_community.register(app)

# from other modules -----------------------------------------------------------------------------------------------------------------

app.command()(search)


if __name__ == "__main__":
    app()
