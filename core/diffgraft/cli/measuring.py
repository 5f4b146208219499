"""``diffgraft compare | tune``: what a stack costs and changes, and which one is worth it."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from diffgraft.cli.mistakes import kept
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
    PromptFile,
    PromptTexts,
    StackFile,
    Steps,
    Threads,
    Width,
)
from diffgraft.cli.steady import steady, tell
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.terminal import say
from diffgraft.methods.extras import imported
from diffgraft.methods.files import check_folder

BUNDLED_SAMPLES = 24
OTHER_SAMPLES = 6
BUNDLED_BATCH = 8
TUNE_SAMPLES = 6


def compare(
    pipeline: Pipeline,
    plugins: PluginNames = None,
    always: Annotated[
        list[str] | None,
        typer.Option("--always", metavar="NAME", help="A plugin of the list that is part of every arm: what do the others add to it?"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.png and compare.json.")] = Path("out"),
    option: KnobValues = None,
    stack: StackFile = None,
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
    plugin_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the arms with plugins, for solvers that need fewer (default: as the baseline).")
    ] = None,
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
    threads: Threads = None,
) -> None:
    """Measure plugins against the plain pipeline: each alone, the stack, and fewer steps at equal time."""
    from diffgraft.cli.values import (
        call_settings,
        load_bare,
        parse_assignments,
        parse_seeds,
        read_prompts,
        specs_for,
    )

    specs = specs_for(pipeline, plugins, option, stack)
    if not specs:
        raise ConfigError("nothing to compare: give --plugins a,b or --stack FILE")
    imported("torchmetrics", "`diffgraft compare`")  # said before anything is loaded
    extra = parse_assignments(arg, "-a")
    texts = read_prompts(prompt, prompts)
    seed_list = parse_seeds(seeds)
    check_folder(out)
    from diffgraft.lab.compare import compare as measure
    from diffgraft.lab.compare_view import keep_unfinished, print_comparison, write_comparison
    from diffgraft.lab.judging import load_judge
    from diffgraft.lab.results import CompareSettings
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import default_steps, make_samples

    bundled = registry.bundled_of(pipeline)
    call = call_settings(None, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, built = load_bare(pipeline, specs, device, dtype)
    asked = texts or list(class_label or ())
    examples = list(bundled.prompts) if bundled else []
    chosen = choose_samples(asked or examples, bool(asked), seed_list, num_prompts, bundled is not None)
    words = [word for word, _ in chosen if word is not None]
    samples = make_samples(pipe, [seed for _, seed in chosen], **{"prompts" if texts or not class_label else "class_labels": words})
    settings = CompareSettings(
        samples=tuple(samples),
        steps=steps or default_steps(pipe),
        call=call,
        repeats=repeats,
        warmup=warmup,
        batch=batch or (BUNDLED_BATCH if bundled else 1),
        reference_steps=reference_steps,
        plugin_steps=plugin_steps,
    )
    judge = load_judge(bundled) if bundled else None
    with steady(threads) as warning, progress() as on_progress:
        result = measure(
            pipe,
            built,
            settings,
            always=always or (),
            judge=judge,
            attention_backend=backend,
            on_progress=on_progress,
            on_unfinished=lambda found: kept(lambda place: keep_unfinished(found, pipeline, place), out),
        )
    kept(lambda place: write_comparison(result, pipeline, place), out)
    print_comparison(result)
    tell(warning)
    say(f"wrote {out / 'compare.png'} and {out / 'compare.json'}")


def choose_samples(
    asked: list[str], given: bool, seeds: list[int] | None, number: int | None, bundled: bool
) -> list[tuple[str | None, int]]:
    """(prompt or class label or None, seed) of every picture."""
    number = number or (len(asked) if given else BUNDLED_SAMPLES if bundled else OTHER_SAMPLES)
    items: list[str | None] = [*asked] or [None]
    if seeds is not None:
        return [(item, seed) for seed in seeds for item in items[:number]]
    return [(items[i % len(items)], i) for i in range(number)]


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
    out: Annotated[Path, typer.Option("--out", help="Folder for tune.json, .png and stack.yaml; OUT.partial is for going on.")] = Path(
        "out"
    ),
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
    threads: Threads = None,
) -> None:
    """Find the fastest stack, settings and number of steps that reach a fidelity; an interrupted run goes on where it stopped."""
    from diffgraft.cli.values import call_settings, load_bare, parse_assignments, read_prompts, specs_for

    specs = specs_for(pipeline, plugins or list(registry.installed()), option)
    from diffgraft.lab.tune import tune as look
    from diffgraft.lab.tune.goal import Goal, TuneSettings, parse_budget
    from diffgraft.lab.tune.space import find_plugins
    from diffgraft.lab.tune.view import print_tuning, write_plot, write_winner

    started = time.monotonic()
    for module in ("optuna", "matplotlib.figure", "torchmetrics"):  # said before anything is loaded
        imported(module, "`diffgraft tune`")
    goal, seconds = Goal.parse(target), None if budget is None else parse_budget(budget)
    extra = parse_assignments(arg, "-a")
    texts = read_prompts(prompt, prompts)
    check_folder(out)
    from diffgraft.installed.specs import build_plugin
    from diffgraft.lab.judging import load_judge
    from diffgraft.lab.terminal import progress
    from diffgraft.methods.inputs import default_steps, make_samples

    named = [build_plugin(spec) for spec in specs] if plugins else None
    bundled = registry.bundled_of(pipeline)
    call = call_settings(None, guidance_scale, negative_prompt, height, width, image, extra)
    pipe, _ = load_bare(pipeline, [], device, dtype)
    found, left_out = (named, {}) if named else find_plugins(pipe, {name: knobs for name, knobs in specs if knobs})
    asked = texts or list(class_label or ()) or (list(bundled.prompts) if bundled else [])
    words = {"prompts" if texts or not class_label else "class_labels": asked}
    samples = make_samples(pipe, [seed + i for i in range(3 * num_prompts)], **words)
    settings = TuneSettings(
        goal=goal,
        samples=tuple(samples[:num_prompts]),
        held_out=tuple(samples[num_prompts:]),
        steps=steps or default_steps(pipe),
        call=call,
        reference_steps=reference_steps,
        budget=seconds,
        trials=trials,
        batch=batch or (BUNDLED_BATCH if bundled else 1),
        seed=seed,
    )
    judge = load_judge(bundled) if bundled and goal.measure == "judge" else None
    more: dict[str, Any] = {"judge": judge, "left_out": left_out, "command": shlex.join(["diffgraft", *sys.argv[1:]]), "started": started}
    with steady(threads) as warning, progress() as on_progress:
        result = look(pipe, found, settings, out, name=pipeline, on_progress=on_progress, **more)
    kept(lambda place: write_plot(result, pipeline, place), out)
    stack = kept(lambda place: write_winner(result, pipeline, more["command"], place), out)
    print_tuning(result)
    tell(warning)
    say(f"wrote {out / 'tune.png'} and {out / 'tune.json'}" + (f", and the winner as a stack file: {stack}" if stack else ""))
