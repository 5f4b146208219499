"""What a pipeline of diffusers does, seen from outside, as the record of a family.

    python -m diffgraft_pipelines.observe FluxPipeline                        # one that has a tiny pipeline here
    python -m diffgraft_pipelines.observe LDMPipeline --tiny pictures:make    # one of yours: make(class_name, seed) -> Tiny

The pipeline runs a few times (as it is, with another condition, without guidance, with two conditions), watched by hooks of torch; no
source is read. What such runs cannot show is remarked on; the record then holds the default, or the likeliest reading.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import torch
import typer
from diffgraft import BlockGroup, Family, Guidance, Tiny
from diffgraft.methods.inputs import parameters
from torch import Tensor, nn

from diffgraft_pipelines.running_blocks import find_blocks
from diffgraft_pipelines.runs import Forward, Seen, embedded, first_axes, largest, parts_of, same, same_start, watch
from diffgraft_pipelines.tiny import make as make_known

SCALES = ("true_cfg_scale", "guidance_scale", "max_guidance_scale", "prior_guidance_scale", "decoder_guidance_scale")
"""Call arguments that scale guidance, the likeliest first."""
ACTIVE = "do_classifier_free_guidance"
OPTIONAL = (("perturbed", "pag_scale", "do_perturbed_attention_guidance"),)
"""Branches that run while a call argument is not 0, and the properties that say so."""
NEGATIVE = ("negative_prompt", "negative_prompt_embeds")


@dataclass
class Observed:
    """A record, and by the name of each fact that was not seen what is to be looked at."""

    family: Family
    remarks: dict[str, str]


# what is asked of it -------------------------------------------------------------------------------------------------------------------


def other_condition(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Another prompt, class, picture to go by or start picture."""
    if "prompt" in kwargs:
        return {"prompt": "two green dogs"}
    if "class_labels" in kwargs:
        return {"class_labels": [3]}
    if "image_embeds" in kwargs:
        return {"image_embeds": -kwargs["image_embeds"]}
    pictures = [name for name in ("example_image", "image") if hasattr(kwargs.get(name), "rotate")]
    return {name: kwargs[name].rotate(180) for name in pictures[:1]}


def doubled(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Two conditions for one."""
    found: dict[str, Any] = {key: [kwargs[key]] * 2 for key in ("prompt", "negative_prompt") if isinstance(kwargs.get(key), str)}
    found |= {"class_labels": list(kwargs["class_labels"]) * 2} if "class_labels" in kwargs else {}
    found |= {key: torch.cat([kwargs[key]] * 2) for key in ("image_embeds", "negative_image_embeds", "hint") if key in kwargs}
    return found or ({"batch_size": 2} if "batch_size" in kwargs else {})


class Observer:
    """The runs of one pipeline, made when they are asked for, and what they show."""

    def __init__(self, make: Callable[[], Tiny]) -> None:
        self.remarks: dict[str, str] = {}
        self.tiny = make()
        self.pipe: Any = self.tiny.pipe
        self.call = parameters(self.pipe)
        self.plain = self.bare = self.run()
        """As it is, and without guidance."""
        if not self.plain.steps:
            raise RuntimeError(f"{type(self.pipe).__name__} never calls scheduler.step: there is nothing to hook between its steps")
        self.denoisers = self.find_denoisers()
        self.first = self.plain.of(self.denoisers)[0]
        self.stepped = self.plain.steps[0]
        if self.plain.copies:  # each of one frame: what the denoiser gets is the whole
            sample, _ = self.find_sample()
            self.stepped = {**self.stepped, "sample": self.first.inputs[sample], "model_output": self.first.output}
            self.remarks.pop("sample", None)
        self.optional = self.leave_out_optional()

    def run(self, **changes: Any) -> Seen:
        return watch(self.tiny, **changes)

    def tried(self, fact: str, why: str, **changes: Any) -> Seen | None:
        """A run with other arguments; a remark where the pipeline does not take them."""
        try:
            return self.run(**changes)
        except Exception as error:  # whatever a pipeline does with what it was not made for
            self.remarks[fact] = f"{why} could not be tried ({type(error).__name__}: {str(error)[:80]})"
            return None

    def find_denoisers(self) -> tuple[str, ...]:
        """The components that run last before a step."""
        last: dict[str, None] = {}
        for number in range(len(self.plain.steps)):
            if before := [each for each in self.plain.forwards if each.step == number]:
                last[before[-1].component] = None
        more = [name for name in (f"{next(iter(last))}_2",) if name in self.pipe.components and name not in last]
        if more:
            self.remarks["denoisers"] = f"{more[0]} is a component that did not run here"
        return (*last, *more)

    # sample, timestep, latents

    def find_sample(self) -> tuple[str, int | None]:
        """The parameter that holds what is stepped, and the axis on which there is more of it."""
        sample = self.stepped["sample"]
        for name, value in self.first.inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and (found := embedded(sample, value)) is not None:
                return name, found[0]
        moving = self.later().inputs
        sizes = {name: value.numel() for name, value in self.first.inputs.items()
                 if isinstance(value, Tensor) and value.is_floating_point() and not same(value, moving.get(name))}  # fmt: skip
        self.remarks["sample"] = "no input of the denoiser holds what is stepped: the largest that changes with the steps is taken"
        return max(sizes, key=lambda name: sizes[name]), None

    def find_timestep(self, sample: str) -> tuple[str, float, float]:
        """The parameter that moves with the scheduler's time, and by what factor and offset."""
        later, straight = self.later(), None
        times = [largest(self.plain.steps[each.step]["timestep"]) for each in (self.first, later)]
        for name, value in self.first.inputs.items():
            if name == sample or not isinstance(value, (int, float, Tensor)) or isinstance(value, bool):
                continue
            ratios = [largest(each.inputs[name]) / time for each, time in zip((self.first, later), times, strict=True) if time]
            if ratios and ratios[0] > 0 and max(ratios) - min(ratios) <= 1e-4 * ratios[0]:
                if len(ratios) == 1 or same(value, later.inputs[name]):
                    self.remarks["timestep_scale"] = "the time did not move in these steps"
                return name, snapped(ratios[0]), 0.0
            if straight is None and (found := self.line(name)):
                straight = name, *found
        if straight is None:
            self.remarks["timestep"] = "no input of the denoiser is a multiple of the scheduler's time"
        return straight or ("timestep", 1.0, 0.0)

    def line(self, name: str) -> tuple[float, float] | None:
        """(slope, value at 0) of an input that lies on a straight line over the scheduler's time."""
        calls = [self.plain.of(self.denoisers, step)[0] for step in range(len(self.plain.steps)) if self.plain.of(self.denoisers, step)]
        points = [(largest(self.plain.steps[each.step]["timestep"]), largest(each.inputs[name])) for each in calls if name in each.inputs]
        (t, y), (end, last) = points[0], points[-1]
        if len(points) < 3 or t == end or y == last:
            return None
        slope = (last - y) / (end - t)
        offset = y - slope * t
        apart = max(abs(offset + slope * t - y) for t, y in points)
        return (snapped(slope), snapped(offset)) if apart < 1e-4 * abs(last - y) else None

    def find_latents(self) -> str:
        """The layout of the sample that is stepped."""
        sample = self.stepped["sample"]
        if sample.ndim == 3:
            return "packed"
        if sample.ndim == 4:
            return "bchw" if any(hasattr(part, "decode") for part in self.parts()) else "pixels"
        known = {getattr(self.model().config, name, None) for name in ("in_channels", "out_channels")}
        known |= {getattr(part.config, name, None) for part in self.parts() if hasattr(part, "decode") and hasattr(part, "config")
                  for name in ("latent_channels", "z_dim")}  # fmt: skip
        if (sample.shape[1] in known) == (sample.shape[2] in known):
            self.remarks["latents"] = f"which axis of {tuple(sample.shape)} holds the channels"
        return "bfchw" if sample.shape[2] in known and sample.shape[1] not in known else "bcfhw"

    def parts(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def model(self) -> Any:
        return getattr(self.pipe, self.denoisers[0])

    def find_branch_prediction(self, channels: int) -> str:
        """What the pipeline does to a branch's output."""
        out, stepped = self.first.output, self.stepped["model_output"]
        if not isinstance(out, Tensor):
            self.remarks["branch_prediction"] = "the denoiser's first output is no tensor"
            return "same"
        if out.ndim != stepped.ndim:
            self.remarks["branch_prediction"] = f"{tuple(out.shape)} comes to the scheduler as {tuple(stepped.shape)}"
            return "unpacked_tail"
        if out.shape[channels] == 2 * self.stepped["sample"].shape[channels]:
            return "drop_sigma"
        if out.ndim == 3 and out.shape[1] > stepped.shape[1]:
            return "first_tokens"
        if out.shape[1:] != stepped.shape[1:]:
            self.remarks["branch_prediction"] = f"{tuple(out.shape)} comes to the scheduler as {tuple(stepped.shape)}"
        return "same"

    def find_turned(self) -> bool:
        """Whether what is stepped without guidance points away from the denoiser's output."""
        out, stepped = self.bare.of(self.denoisers)[0].output, self.bare.steps[0]["model_output"]
        if not isinstance(out, Tensor) or out.ndim != stepped.ndim or self.plain.copies:
            return False
        for axis in range(out.ndim):
            out = out.narrow(axis, 0, min(out.shape[axis], stepped.shape[axis]))
        return out.shape == stepped.shape and float((out.float() * stepped.float()).sum()) < 0

    # conditions

    def find_conditioning(self, sample: str) -> tuple[str, ...]:
        """The inputs that another condition changes."""
        if self.other is None:
            return ()
        there, later = self.other.of(self.denoisers)[0].inputs, self.later().inputs
        others = {name: value for name, value in self.first.inputs.items() if name != sample}
        found = tuple(name for name, value in others.items() if not same(value, there.get(name)))
        still = [name for name, value in others.items()
                 if isinstance(value, (Tensor, dict)) and name not in found and same(value, later.get(name))]  # fmt: skip
        if still:
            self.remarks["conditioning"] = f"{', '.join(still)}: the same for every condition and step here"
        return found

    @cached_property
    def other(self) -> Seen | None:
        """A run under another condition."""
        if changes := other_condition(self.tiny.kwargs):
            return self.tried("conditioning", "another condition", **changes)
        self.remarks["conditioning"] = "there is nothing to condition on, or it could not be changed"
        return None

    def later(self) -> Forward:
        """The first forward of a step in the middle (the last may be at time 0)."""
        steps = sorted({each.step for each in self.plain.forwards if each.component in self.denoisers})
        return self.plain.of(self.denoisers, steps[len(steps) // 2])[0]

    @cached_property
    def twice(self) -> Seen | None:
        """A run under two conditions, with a start picture for both or, where the pipeline wants that, for each."""
        if not (changes := doubled(self.tiny.kwargs)):
            self.remarks["common"] = "two conditions at once could not be tried"
            return None
        pictures = {key: [value] * 2 for key, value in self.tiny.kwargs.items() if hasattr(value, "rotate")}
        found = self.tried("common", "two conditions", **changes)
        if found is None and pictures and (found := self.tried("common", "two conditions", **changes, **pictures)):
            self.remarks.pop("common")
        return found

    def find_common(self, sample: str) -> tuple[str, ...]:
        """Inputs that do not grow with the batch though their first axis could pass for it."""
        if (many := self.twice) is None:
            return ()
        both = many.of(self.denoisers)[0].inputs
        return tuple(name for name, value in self.first.inputs.items()
                     if name not in (sample, *self.find_layered()) and (heads := first_axes(value)) and heads == first_axes(both.get(name))
                     and all(isinstance(size, int) and size > 1 for size in heads))  # fmt: skip

    def find_layered(self) -> tuple[str, ...]:
        """Inputs whose second axis grows with the batch, not the first."""
        if (many := self.twice) is None:
            return ()
        both = many.of(self.denoisers)[0].inputs
        return tuple(name for name, value in self.first.inputs.items() if isinstance(value, Tensor) and value.ndim > 2
                     and value.shape[0] == both[name].shape[0] and 2 * value.shape[1] == both[name].shape[1])  # fmt: skip

    # guidance

    def leave_out_optional(self) -> tuple[tuple[str, str], ...]:
        """The branches that run for an argument of their own; they are left out of all further runs."""
        found: list[tuple[str, str]] = []
        for branch, argument, said in OPTIONAL:
            without = self.run(**{argument: 0.0}) if self.tiny.kwargs.get(argument) else self.plain
            if len(without.of(self.denoisers)[0].inputs[self.find_sample()[0]]) < self.rows(self.plain, self.find_sample()[0]):
                found.append((branch, said if hasattr(type(self.pipe), said) else argument))
                self.tiny.kwargs[argument] = 0.0
                self.plain = self.bare = without
                self.first, self.stepped = without.of(self.denoisers)[0], without.steps[0]
        return tuple(found)

    def find_guidance(self, sample: str) -> Guidance:
        """Which argument makes branches, how they run, in which order."""
        calls, rows = len(self.plain.of(self.denoisers)), self.rows(self.plain, sample)
        for scale, value in [(name, value) for name in SCALES if name in self.call for value in (1.0, 0.0)]:
            off = self.tried("guidance", f"{scale} = {value:g}", **{scale: value})
            if off is None or not off.steps:
                continue
            fewer, less = len(off.of(self.denoisers)), self.rows(off, sample)
            if fewer == calls and less == rows:
                continue
            layout = "sequential" if fewer < calls else "batched"
            many = calls // fewer if layout == "sequential" else rows // less
            own = isinstance(inspect.getattr_static(type(self.pipe), ACTIVE, None), property) and self.is_live(scale, value, sample)
            second = next((name for name in (f"{scale}_2",) if name in self.call and len(self.denoisers) > 1), None)
            twice = len(self.stepped["sample"]) > len(off.steps[0]["sample"])
            self.bare = off
            order = (*self.find_order(layout, many, sample), *(branch for branch, _ in self.optional))
            return Guidance(layout, order, scale, ACTIVE if own else None, self.find_required(calls, rows, sample), second_scale=second,
                            doubled=twice, over="uncond" if value else "cond", optional=self.optional,
                            bound=bool(self.optional))  # type: ignore[arg-type] # fmt: skip
        if named := [name for name in SCALES if name in self.call]:
            self.remarks["guidance"] = f"{', '.join(named)} changed no number of calls or rows: off here, or an input of the model"
        return Guidance("none")

    def is_live(self, scale: str, off: float, sample: str) -> bool:
        """Whether guidance that is cut off in mid-run stops, or breaks what was made for it: a pipeline may ask only once."""
        names = [name for name in vars(self.pipe) if name.endswith(f"_{scale}")] or ["_guidance_scale"]  # of a sound, too

        def cut(pipe: Any, *_: Any) -> dict[str, Any]:
            vars(pipe).update(dict.fromkeys(names, off))
            return {}

        try:
            seen = self.run(callback_on_step_end=cut)
        except Exception:
            return True
        first, last = (seen.of(self.denoisers, step) for step in (0, len(seen.steps) - 1))
        stepped = len({len(step["model_output"]) for step in seen.steps})
        return len(first) != len(last) or len(first[0].inputs[sample]) != len(last[0].inputs[sample]) or stepped > 1

    def rows(self, seen: Seen, sample: str) -> int:
        return len(seen.of(self.denoisers)[0].inputs[sample])

    def find_order(self, layout: str, many: int, sample: str) -> tuple[str, ...]:
        """The branch that another condition changes is "cond"; of the others the one without a start picture is "uncond"."""
        if self.other is None:
            self.remarks["guidance"] = "the order of the branches: another condition could not be tried"
            return ("uncond", "cond")
        moved = [False] * many
        here, there = self.plain.of(self.denoisers), self.other.of(self.denoisers)
        if layout == "sequential":
            apart = [name for name, value in here[0].inputs.items()
                     if name != sample and not all(same(value, each.inputs.get(name)) for each in here[1:many])]  # fmt: skip
            for number in range(many):  # what all branches share (a ControlNet's output) tells none from another
                a, b = here[number].inputs, there[number].inputs
                moved[number] = any(not same(a.get(name), b.get(name)) for name in apart)
        else:
            for name, value in here[0].inputs.items():
                if name == sample or name in self.find_layered() or (a := parts_of(value, many)) is None:
                    continue
                if (b := parts_of(there[0].inputs[name], many)) is not None:
                    moved = [was or not same_start(x, y) for was, x, y in zip(moved, a, b, strict=True)]
        if sum(moved) != 1:
            self.remarks["guidance"] = f"the order of the branches: another condition changes {sum(moved)} of {many}"
            return ("uncond", "cond")
        if many == 2:
            return ("cond", "uncond") if moved[0] else ("uncond", "cond")
        names = ["cond" if each else "image" for each in moved]
        bare = [k for k, part in enumerate(here[0].inputs[sample].chunk(many)) if part.abs().flatten(1).eq(0).sum()]
        if len(bare) == 1:
            names[bare[0]] = "uncond"
        else:
            self.remarks["guidance"] = "which of the branches is the one without anything"
        return tuple(names)

    def find_required(self, calls: int, rows: int, sample: str) -> tuple[str, ...]:
        """Arguments of which one must be given for guidance to be on."""
        given = [name for name in NEGATIVE if self.tiny.kwargs.get(name) is not None]
        if not given:
            return ()
        without = self.tried("guidance", f"no {given[0]}", **dict.fromkeys(given))
        if without is None or (len(without.of(self.denoisers)) == calls and self.rows(without, sample) == rows):
            return ()
        return tuple(name for name in NEGATIVE if name in self.call)


def snapped(ratio: float) -> float:
    """0, 1, 1000 or one over it, or one of these with the other sign, where it is that."""
    for number in (1.0, 1000.0, 1 / 1000):
        if abs(abs(ratio) / number - 1) < 1e-3:
            return math.copysign(number, ratio)
    return 0.0 if abs(ratio) < 1e-6 else ratio


def observe(make: Callable[[], Tiny], name: str = "observed") -> Observed:
    """The record of a tiny pipeline's family.

    Raises:
        RuntimeError: it never calls ``scheduler.step``.
    """
    o = Observer(make)
    sample, longer = o.find_sample()
    timestep, factor, offset = o.find_timestep(sample)
    seen: dict[str, Any] = {
        "name": name,
        "pipelines": (type(o.pipe).__name__,),
        "denoisers": o.denoisers,
        "kind": "unet" if hasattr(o.model(), "down_blocks") else "dit",
        "blocks": find_blocks(o),
        "guidance": o.find_guidance(sample),
        "sample": sample,
        "timestep": timestep,
        "timestep_scale": factor,
        "timestep_offset": offset,
        "conditioning": tuple(each for each in o.find_conditioning(sample) if each != timestep),
        "prediction": prediction_of(o),
        "listed": tuple(name for name, value in o.first.inputs.items() if name in o.first.lists or is_ragged(value)),
        "layered": o.find_layered(),
        "emptied": tuple(sorted(o.first.emptied)),
        "copied_scheduler": o.plain.copies,
        "companion": o.plain.companion(o.first),
        "latents": o.find_latents(),
        "common": o.find_common(sample),
    }
    channels = Family(**seen).channel_axis % o.stepped["sample"].ndim
    if longer is not None:
        seen["appended"] = "channels" if longer == channels else "tokens"
    seen |= {"branch_prediction": o.find_branch_prediction(channels), "turned": o.find_turned()}
    o.remarks["least, extra, packages, one_each, unit_start, companion_scale"] = "cannot be seen in these runs"
    return Observed(Family(**seen), o.remarks)


def is_ragged(value: Any) -> bool:
    """Whether it is a list of tensors with rows of their own length."""
    return type(value) is list and bool(value) and all(isinstance(each, Tensor) and each.ndim == 2 for each in value)


def prediction_of(o: Observer) -> str:
    """What the scheduler takes the model's output for."""
    scheduler = o.pipe.scheduler
    if type(scheduler).__name__.startswith("CM"):
        return "consistency"
    flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"
    return "flow" if flow else "scheduler"


def written(value: Any, depth: int = 0) -> str:
    """A record as it stands in a family's file: what is the default is left out."""
    pad = "    " * (depth + 1)
    if isinstance(value, (Family, Guidance, BlockGroup)):
        rows = []
        for each in fields(value):
            here = getattr(value, each.name)
            if here != each.default and not (each.name == "packages" and not here):
                rows.append(f"{pad}{each.name}={written(here, depth + 1)},")
        return f"{type(value).__name__}(\n" + "\n".join(rows) + f"\n{'    ' * depth})"
    if isinstance(value, tuple) and any(isinstance(each, BlockGroup) for each in value):
        return "(\n" + "".join(f"{pad}{written(each, depth + 1)},\n" for each in value) + f"{'    ' * depth})"
    return repr(value).replace("0.001", "1 / 1000") if isinstance(value, float) else repr(value).replace("'", '"')


def main(
    name: Annotated[str, typer.Argument(help="A class of diffusers, or CLASS@VARIANT of a tiny pipeline.")],
    tiny: Annotated[str | None, typer.Option(help="module:function that makes it, as function(name, seed) -> Tiny")] = None,
) -> None:
    maker: Any = make_known
    if tiny is not None:
        module, _, attribute = tiny.partition(":")
        maker = getattr(importlib.import_module(module), attribute)
    torch.set_num_threads(1)
    found = observe(lambda: maker(name, 0), name.partition("@")[0].removesuffix("Pipeline").lower())
    for fact, why in found.remarks.items():
        print(f"# look at {fact}: {why}")
    print(f"family = {written(found.family)}")


if __name__ == "__main__":
    typer.run(main)
