"""From what people ask for to the arguments of a ``pipe(...)`` call, and from its output to arrays.

For every kind of pipeline: text, a class label, a picture or nothing in; pictures or video out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffgraft.installed.errors import ConfigError, Unsupported, choices, nearest
from diffgraft.kernel.modular import call_plain, signature_of

Pictures = NDArray[np.float32]
"""Float arrays [n, frames, height, width, channels] in 0..1; a still picture has one frame."""

LEAST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1
"""What a torch generator takes."""
MADE_HERE = {"prompt": "--prompt", "generator": "--seed", "class_labels": "--class-label", "num_images_per_prompt": "--num-images"}
"""Arguments of a call that follow from the samples -> the option that says them."""
ARRAYS = ("np", "pil", "pt")
"""Values of ``output_type`` that are pictures."""


@dataclass(frozen=True)
class Sample:
    """One picture to make: what is asked for, and the seed of its noise. ``class_name``: what the pipeline calls the class."""

    seed: int
    prompt: str | None = None
    class_label: int | None = None
    class_name: str | None = None

    def __post_init__(self) -> None:
        if not LEAST_SEED <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed = {self.seed}: a seed is a whole number from {LEAST_SEED} to {LARGEST_SEED} (64 bits)")

    @property
    def wanted(self) -> str | None:
        """What is asked for in words, as a judge or a reward reads it."""
        return self.class_name if self.prompt is None else self.prompt

    @property
    def label(self) -> str:
        """A caption for people."""
        if self.wanted is not None:
            return self.wanted
        return "unconditional" if self.class_label is None else f"class {self.class_label}"


@dataclass(frozen=True)
class CallSettings:
    """What all samples of a call share; None leaves the pipeline's own default. ``extra``: any other argument of the call, by name."""

    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    image: Any = None
    mask_image: Any = None
    control_image: Any = None
    strength: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call."""
    return signature_of(pipe).parameters


def parameters_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """The parameters of the calls of a pipeline class."""
    return inspect.signature(cls.__call__).parameters  # type: ignore[operator]


def calling(pipe: Any) -> Callable[..., Any]:
    """What calls a pipeline as standard ones are called. A modular one's guider has the scale, and leaves ``guidance_scale=3`` unread until
    plugins are on the pipeline; this heeds it without any."""
    return partial(call_plain, type(pipe), pipe)


def default_steps(pipe: Any) -> int:
    """The number of steps that the pipeline takes when nobody says."""
    found = parameters(pipe).get("num_inference_steps")
    if found is None or not isinstance(found.default, int):
        raise Unsupported(f"{type(pipe).__name__} does not say how many steps it takes; give --steps")
    return found.default


def class_ids(pipe: Any) -> dict[str, int]:
    """The names that the pipeline has for its classes (``labels`` of a ``DiTPipeline``) -> their numbers; most pipelines have none."""
    return dict(getattr(pipe, "labels", None) or {})


def class_labels_of(pipe: Any, given: Sequence[int | str]) -> list[int]:
    """The numbers of classes that are given by number (also as text) or by name.

    Raises:
        ConfigError: no number, and no class of the pipeline is called so.
    """
    known = class_ids(pipe)
    found = []
    for label in given:
        text = str(label)
        if text not in known and not text.removeprefix("-").isdecimal():
            hint = nearest(text, known) if known else ": its classes have no names; give a number"
            raise ConfigError(f"class label = {text!r}: {type(pipe).__name__} knows none of that name{hint}")
        found.append(known[text] if text in known else int(text))
    return found


def make_samples(pipe: Any, seeds: Sequence[int], prompts: Sequence[str] = (), class_labels: Sequence[int | str] = ()) -> list[Sample]:
    """One sample a seed; prompts or labels (numbers, or names where the pipeline has some) are taken in turn.

    Raises:
        ConfigError: the pipeline needs a prompt and got none, takes none and got one, or knows no class of that name.
    """
    known = parameters(pipe)
    name = type(pipe).__name__
    if prompts and "prompt" not in known:
        raise ConfigError(f"{name} takes no prompt")
    if class_labels and "class_labels" not in known:
        raise ConfigError(f"{name} takes no class label")
    if "prompt" in known and not prompts:
        raise ConfigError(f"{name} needs a prompt: give --prompt TEXT")
    if "class_labels" not in known:
        return [Sample(seed, prompts[i % len(prompts)] if prompts else None) for i, seed in enumerate(seeds)]
    labels = class_labels_of(pipe, class_labels) or range(len(seeds))
    names = {number: text for text, number in reversed(class_ids(pipe).items())}  # of several names the first
    turn = [labels[i % len(labels)] for i in range(len(seeds))]
    return [Sample(seed, class_label=label, class_name=names.get(label)) for seed, label in zip(seeds, turn, strict=True)]


def call_arguments(pipe: Any, samples: Sequence[Sample], settings: CallSettings, several: bool = False) -> dict[str, Any]:
    """The keyword arguments of one call that makes ``samples``: lists for several, as a user would write it for one.

    ``several``: the caller keeps no pictures, so that the call may make more than one of each sample (``num_images_per_prompt``).

    Raises:
        ConfigError: a setting that this pipeline does not take, or an input that it needs and that is missing.
    """
    known = parameters(pipe)
    name = type(pipe).__name__
    one = len(samples) == 1
    arguments: dict[str, Any] = {}
    for key, value in settings.extra.items():
        if key in MADE_HERE and key in known and not (several and key == "num_images_per_prompt"):
            raise ConfigError(f"{key} = {value!r}: that is what {MADE_HERE[key]} says")
        if (key == "output_type" and value not in ARRAYS) or (key == "return_dict" and value is not True):
            raise ConfigError(f"{key} = {value!r}: pictures are asked for ({', '.join(ARRAYS)}); call the pipeline for anything else")
    given = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "image": settings.image,
        "mask_image": settings.mask_image,
        "control_image": settings.control_image,
        "strength": settings.strength,
        **settings.extra,
    }
    for key, value in given.items():
        if value is None:
            continue
        if key not in known:
            takes = [k for k in known if k not in ("self", "kwargs")]
            raise ConfigError(f"{name} takes no {key}{choices(key, takes, 'It takes')}")
        arguments[key] = value
    if "prompt" in known:
        arguments["prompt"] = samples[0].prompt if one else [s.prompt for s in samples]
        negative = arguments.get("negative_prompt")
        if isinstance(negative, str) and not one:
            arguments["negative_prompt"] = [negative] * len(samples)
    if "class_labels" in known:
        arguments["class_labels"] = [s.class_label for s in samples]
    if "batch_size" in known:
        arguments["batch_size"] = len(samples)
    for key in ("image", "mask_image", "control_image"):
        if not one and getattr(settings, key) is not None:
            arguments[key] = [getattr(settings, key)] * len(samples)
    generators = [torch.Generator().manual_seed(s.seed) for s in samples]  # on the CPU: the same noise on every device
    arguments["generator"] = generators[0] if one else generators
    arguments.setdefault("output_type", "np")
    missing = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in ("self", *arguments)
    ]
    if missing:
        flag = {"image": "--image FILE", "mask_image": "--mask FILE", "control_image": "--control-image FILE"}
        raise ConfigError(f"{name} needs {', '.join(missing)}: give " + ", ".join(flag.get(key, f"-a {key}=VALUE") for key in missing))
    return arguments


def make_pictures(pipe: Any, samples: Sequence[Sample], settings: CallSettings) -> Pictures:
    """Call the pipeline once; one picture or video a sample, as a float array [n, frames, height, width, 3] in 0..1."""
    return as_array(pipe(**call_arguments(pipe, samples, settings)), len(samples))


def as_array(output: Any, n: int) -> Pictures:
    """What a pipeline returned, as [n, frames, height, width, 3] in 0..1."""
    array = to_float(pictures_in(output))
    array = array.reshape(n, -1, *array.shape[-3:])
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def pictures_in(output: Any) -> Any:
    """The pictures or the video in what a pipeline returned; a modular one calls it ``videos``, and returns it among all that it knows."""
    return next(found for name in ("frames", "videos", "images") if (found := getattr(output, name, None)) is not None)


def to_float(found: Any) -> Pictures:
    """Arrays, tensors or PIL pictures, nested in lists, as one float array."""
    if isinstance(found, (list, tuple)):
        return np.stack([to_float(item) for item in found])
    if isinstance(found, torch.Tensor):
        found = found.float().cpu().numpy()
    array: NDArray[Any] = np.asarray(found)
    values: Pictures = array.astype(np.float32)
    return values / np.float32(255) if array.dtype == np.uint8 else values
