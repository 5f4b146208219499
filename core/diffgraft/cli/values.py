"""From the texts of a command line to values: knobs, seeds, prompts, devices, and the loaded pipeline."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, choices, nearest
from diffgraft.installed.foreign import brief
from diffgraft.stacks.presets import preset_for
from diffgraft.stacks.reading import class_at, read_stack

if TYPE_CHECKING:
    from diffgraft.installed.family import Bundled
    from diffgraft.installed.plugin import Plugin
    from diffgraft.methods.fitness import Fitness
    from diffgraft.methods.inputs import CallSettings


Spec = tuple[str, dict[str, Any]]
"""A plugin's name and its knobs."""


def parse_value(text: str) -> Any:
    """A value as JSON reads it (5, 0.3, true, null, [1, 2], "text"), also Python's (1, 2) and (1,) as lists, else the text itself.

    Raises:
        ConfigError: a number that nothing here can take (NaN, infinite, over 20 digits), or brackets too deep to be read.
    """
    listed = re.fullmatch(r"\((|.*,.*)\)", text, re.DOTALL)
    read = text if listed is None else f"[{listed[1].strip().removesuffix(',')}]"
    try:
        return json.loads(read, parse_constant=finite, parse_float=finite, parse_int=whole)
    except json.JSONDecodeError:
        return text
    except RecursionError:
        raise ConfigError("nested too deep") from None


def finite(text: str) -> float:
    """A number of a command line."""
    number = float(text)
    if not math.isfinite(number):
        raise ConfigError(f"{text} is no finite number")
    return number


def whole(text: str) -> int:
    """A whole number of a command line."""
    if len(text) > 20:
        raise ConfigError(f"a whole number of {len(text)} digits; seeds, the largest there are, have 20")
    return int(text)


def parse_assignments(items: list[str] | None, option: str) -> dict[str, Any]:
    """``name=value`` items; the last one of a name counts."""
    found = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {brief(item)}: write {option} name=value")
        try:
            found[name] = parse_value(value)
        except ConfigError as error:
            raise ConfigError(f"{option} {name}={brief(value)}: {error}") from None
    return found


def plugin_specs(names: list[str] | None, options: list[str] | None, stack: Sequence[Spec] = (), model: str = "") -> list[Spec]:
    """(plugin, knobs) in the order given, inside those of a stack file; ``name:preset`` brings the knobs of a preset, for ``model``.

    Raises:
        ConfigError: an option that is not ``plugin.knob=value``, or for a plugin that is not in the list; one that the stack file has too.
    """
    said = [name.strip().partition(":") for item in names or [] for name in item.split(",") if name.strip()]
    specs = [*stack, *((name, {**preset_for(name, preset, model).knobs} if colon else {}) for name, colon, preset in said)]
    listed = [name for name, _ in specs]
    if twice := {name for name, *_ in said} & {name for name, _ in stack}:
        raise ConfigError(f"--plugin {min(twice)}: it is in the stack file already; -o {min(twice)}.KNOB=VALUE changes its knobs")
    for key, value in parse_assignments(options, "-o").items():
        plugin, dot, knob = key.partition(".")
        if not dot or not plugin or not knob:
            raise ConfigError(f"-o {key}: write -o plugin.knob=value")
        if plugin not in listed:
            add = f" Or add --plugin {plugin}." if plugin in registry.installed() else ""
            raise ConfigError(f"-o {key}: plugin {plugin!r} is not in the list{choices(plugin, listed, 'In it')}{add}")
        for name, knobs in specs:
            if name == plugin:
                knobs[knob] = value
    return specs


def specs_for(pipeline: str, names: list[str] | None, options: list[str] | None, stack: str | None = None) -> list[Spec]:
    """As `plugin_specs`, of plugins that are installed and for a pipeline that is known: looked up before seconds go by in loading torch.

    Args:
        stack: a stack file; of its plugins those that are switched on.

    Raises:
        PluginNotFound, PipelineNotFound: nothing of that name is here.
        ConfigError, ArtefactMismatch, Unsupported: the stack file is none, of another family, or names a file that is not there as it was.
    """
    file = None if stack is None else read_stack(stack)
    own = [spec for spec in file.specs() if spec[0] not in file.disabled] if file else []
    specs = plugin_specs(names, options, [(name, {**knobs}) for name, knobs in own], pipeline)
    for name, _ in specs:
        registry.named(name)
    folder = registry.resolve(pipeline)
    if file is not None and (found := registry.family_of(class_at(folder))):
        file.ensure_for(*found)
    if file is not None:
        ensure_knobs_of(file.source, [spec for spec in specs if spec in own])
    return specs


def ensure_knobs_of(file: str, specs: list[Spec]) -> None:
    """Raises ConfigError that names the file where a knob is wrong that a stack file alone says."""
    from diffgraft.installed.specs import build_plugin

    for spec in specs:
        try:
            build_plugin(spec)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None


def parse_seeds(text: str | None) -> list[int] | None:
    """``0,1,2`` as numbers."""
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds:
        raise ConfigError(f"--seeds {text!r}: write whole numbers, 0,1,2")
    return seeds


def read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Prompts from the command line and from a file."""
    texts = list(prompts or [])
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            raise ConfigError(f"--prompts {file}: there is no such file; it holds one prompt a line. Or give --prompt TEXT") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {file}: {error}") from None
        if not any(lines):
            raise ConfigError(f"--prompts {file}: no prompt in it")
        texts += [line for line in lines if line]
    return texts


def prompt_of(prompt: str | None, bundled: Bundled | None) -> tuple[list[str], str]:
    """(the prompt as a list, or the first of a bundled pipeline's own; what is to be told of it: "" where it was given)."""
    if prompt is not None:
        return [prompt], ""
    own = list(bundled.prompts[:1]) if bundled else []
    return own, f"no --prompt was given: {own[0]!r}" if own else ""


def asked_for(prompts: list[str], class_labels: list[str] | None, number: int | None, what: str) -> tuple[int, dict[str, list[str]]]:
    """How many pictures a command works on, and of what: prompts, classes, or neither.

    Raises:
        ConfigError: nothing is said, or both prompts and classes.
    """
    if prompts and class_labels:
        raise ConfigError("--prompt and --class-label: a pipeline takes the one or the other")
    if not (number or prompts or class_labels):
        raise ConfigError(
            f"nothing to {what} on: give --prompts FILE with one prompt a line, or --prompt TEXT; for a class-conditional pipeline "
            "--class-label CLASS, for one that takes neither --samples N"
        )
    return number or len(prompts) or len(class_labels or ()), {"prompts": prompts} if prompts else {"class_labels": class_labels or []}


def parse_device(text: str | None) -> Any:
    """A device that is really there; without a name the best one."""
    import torch

    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"--device {text!r}: no such kind of device; cpu, cuda, cuda:1 or mps") from None
    there = {"cpu": True, "cuda": (device.index or 0) < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True):
        raise ConfigError(
            f"--device {text}: this machine (or this build of torch) has no such device; `diffgraft doctor` lists what is there"
        )
    return device


DTYPES = {"float32": ("fp32", "float", "32"), "float16": ("fp16", "half", "16"), "bfloat16": ("bf16",)}


def parse_dtype(text: str | None, device: Any, folder: Any) -> Any:
    """A torch dtype; without a name what suits device and model."""
    import torch

    if text is None:
        name = "float32" if device.type != "cuda" else "bfloat16" if is_transformer(folder) else "float16"
        return getattr(torch, name)
    for name, short in DTYPES.items():
        if text in (name, f"torch.{name}", *short):
            return getattr(torch, name)
    raise ConfigError(f"--dtype {text!r}: float32, float16 or bfloat16")


def is_transformer(folder: Any) -> bool:
    """Whether the pipeline at a folder or Hub id has a diffusion transformer, as its index file tells."""
    from diffusers import DiffusionPipeline

    try:
        name = DiffusionPipeline.load_config(folder).get("_class_name")
    except OSError:  # loading says why, in our words
        return False
    return any(family.kind == "dit" for family in registry.families().values() if name in family.pipelines)


def load_bare(name: str, specs: list[tuple[str, dict[str, Any]]], device: str | None, dtype: str | None) -> tuple[Any, list[Plugin]]:
    """(the pipeline on its device, the plugins built and planned but not attached).

    All names and knobs are checked before any weight is read.
    """
    from diffgraft.installed.registry import resolve
    from diffgraft.kernel.loading import load_pipeline, unload

    target = parse_device(device)
    folder = resolve(name)
    built = checked_plugins(specs)
    hide_bars()
    pipe = load_pipeline(name, dtype=parse_dtype(dtype, target, folder))
    if not sys.stderr.isatty():
        pipe.set_progress_bar_config(disable=True)
    return unload(pipe).to(target), built


def checked_plugins(specs: list[tuple[str, dict[str, Any]]]) -> list[Plugin]:
    """The plugins built and planned: their knobs are right, and they go together."""
    from diffgraft.installed.planner import Part, plan
    from diffgraft.installed.specs import build_plugin

    built = [build_plugin(spec) for spec in specs]
    plan([Part.of(plugin) for plugin in built]).ensure()
    return built


def hide_bars() -> None:
    """No loading bars of the libraries where nobody watches."""
    if not sys.stderr.isatty():
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def call_settings(
    steps: int | None,
    guidance_scale: float | None,
    negative_prompt: str | None,
    height: int | None,
    width: int | None,
    image: Path | None,
    extra: Mapping[str, Any],
) -> CallSettings:
    """The options of a call; what is not said is the pipeline's own."""
    from diffgraft.kernel.defaults import read_picture
    from diffgraft.methods.inputs import CallSettings

    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ConfigError(f"--guidance-scale {guidance_scale}: it must be a finite number")
    if (height is None) != (width is None):
        raise ConfigError("--height and --width go together: some pipelines silently ignore one without the other")
    picture = None if image is None else read_picture(image, f"--image {image}")
    return CallSettings(
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        image=picture,
        extra=extra,
    )


def make_fitness(
    name: str, reward: str | None, features: str | None, reference: Path | None, reference_steps: int, bundled: Bundled | None
) -> Fitness:
    """What a search minimises; a bundled pipeline brings its judge's features."""
    from diffgraft.lab.judging import load_judge
    from diffgraft.methods.fitness import FrechetFitness, RewardFitness, TrajectoryFitness, read_pictures

    if name == "trajectory":
        return TrajectoryFitness(reference_steps)
    if name == "reward":
        if reward is None:
            raise ConfigError("--fitness reward: give --reward NAME (emoji_judge, or package.module:name)")
        return RewardFitness(reward)
    if name == "frechet":
        used: Any = features or (getattr(load_judge(bundled), "features", None) if bundled else None)
        if used is None:
            raise ConfigError("--fitness frechet: give --features package.module:name, a callable (images) -> features [n, d]")
        return FrechetFitness(used, None if reference is None else read_pictures(reference), reference_steps)
    raise ConfigError(f"--fitness {name!r}: trajectory, reward or frechet{nearest(name, ('trajectory', 'reward', 'frechet'))}")
