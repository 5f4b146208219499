"""What a pipeline of diffusers does, seen from outside, as the record of a family.

    python -m diffgraft_pipelines.observe FluxPipeline                        # one that has a tiny pipeline here
    python -m diffgraft_pipelines.observe LDMPipeline --tiny pictures:make    # one of yours: make(class_name, seed) -> Tiny

The pipeline runs a few times (as it is, with another condition, without guidance, with two conditions), watched by hooks of torch; no
source is read. What such runs cannot show is remarked on; the record then holds the default, or the likeliest reading.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import typer
from diffgraft import BlockGroup, Family, Guidance, Tiny
from torch import Tensor, nn

from diffgraft_pipelines.runs import Forward, Seen, alike, embedded, first_axes, largest, same, tensors_of, watch
from diffgraft_pipelines.tiny import make as make_known

SCALES = ("true_cfg_scale", "guidance_scale", "max_guidance_scale", "prior_guidance_scale", "decoder_guidance_scale")
"""Call arguments that scale guidance, the likeliest first."""
ACTIVE = "do_classifier_free_guidance"
LAYERS = ("resnets", "attentions")
"""Of a U-Net's block, in running order; what changes the size comes last."""
NEGATIVE = ("negative_prompt", "negative_prompt_embeds")


@dataclass
class Observed:
    """A record, and by the name of each fact that was not seen what is to be looked at."""

    family: Family
    remarks: dict[str, str]


# what is asked of it -------------------------------------------------------------------------------------------------------------------


def other_condition(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Another prompt, class or start picture."""
    if "prompt" in kwargs:
        return {"prompt": "two green dogs"}
    if "class_labels" in kwargs:
        return {"class_labels": [3]}
    return {"image": kwargs["image"].rotate(180)} if hasattr(kwargs.get("image"), "rotate") else {}


def doubled(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Two conditions for one."""
    found = {key: [kwargs[key]] * 2 for key in ("prompt", "negative_prompt") if isinstance(kwargs.get(key), str)}
    if "class_labels" in kwargs:
        found["class_labels"] = list(kwargs["class_labels"]) * 2
    return found or ({"batch_size": 2} if "batch_size" in kwargs else {})


class Observer:
    """The runs of one pipeline, made when they are asked for, and what they show."""

    def __init__(self, make: Callable[[], Tiny]) -> None:
        self.remarks: dict[str, str] = {}
        self.tiny = make()
        self.pipe: Any = self.tiny.pipe
        self.call = inspect.signature(self.pipe.__call__).parameters
        self.plain = self.run()
        if not self.plain.steps:
            raise RuntimeError(f"{type(self.pipe).__name__} never calls scheduler.step: there is nothing to hook between its steps")
        self.denoisers = self.find_denoisers()
        self.first = self.plain.of(self.denoisers)[0]
        self.stepped = self.plain.steps[0]
        if self.plain.copies:  # each of one frame: what the denoiser gets is the whole
            sample, _ = self.find_sample()
            self.stepped = {**self.stepped, "sample": self.first.inputs[sample], "model_output": self.first.output}
            self.remarks.pop("sample", None)

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

    def find_timestep(self, sample: str) -> tuple[str, float]:
        """The parameter that moves with the scheduler's time, and by what factor."""
        later = self.later()
        times = [largest(self.plain.steps[each.step]["timestep"]) for each in (self.first, later)]
        for name, value in self.first.inputs.items():
            if name == sample or not isinstance(value, (int, float, Tensor)) or isinstance(value, bool):
                continue
            ratios = [largest(each.inputs[name]) / time for each, time in zip((self.first, later), times, strict=True) if time]
            if ratios and ratios[0] > 0 and max(ratios) - min(ratios) <= 1e-4 * ratios[0]:
                if len(ratios) == 1 or same(value, later.inputs[name]):
                    self.remarks["timestep_scale"] = "the time did not move in these steps"
                return name, snapped(ratios[0])
        self.remarks["timestep"] = "no input of the denoiser is a multiple of the scheduler's time"
        return "timestep", 1.0

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
        if out.shape[channels] == 2 * stepped.shape[channels]:
            return "drop_sigma"
        if out.ndim == 3 and out.shape[1] > stepped.shape[1]:
            return "first_tokens"
        if out.shape[1:] != stepped.shape[1:]:
            self.remarks["branch_prediction"] = f"{tuple(out.shape)} comes to the scheduler as {tuple(stepped.shape)}"
        return "same"

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
                     if name != sample and (heads := first_axes(value)) and heads == first_axes(both.get(name))
                     and all(isinstance(size, int) and size > 1 for size in heads))  # fmt: skip

    # guidance

    def find_guidance(self, sample: str) -> Guidance:
        """Which argument makes branches, how they run, in which order."""
        calls, rows = len(self.plain.of(self.denoisers)), self.rows(self.plain, sample)
        for scale in [name for name in SCALES if name in self.call]:
            off = self.tried("guidance", f"{scale} = 1", **{scale: 1.0})
            if off is None or not off.steps:
                continue
            fewer, less = len(off.of(self.denoisers)), self.rows(off, sample)
            if fewer == calls and less == rows:
                continue
            layout = "sequential" if fewer < calls else "batched"
            many = calls // fewer if layout == "sequential" else rows // less
            own = inspect.getattr_static(type(self.pipe), ACTIVE, None)
            second = next((name for name in (f"{scale}_2",) if name in self.call and len(self.denoisers) > 1), None)
            twice = len(self.stepped["sample"]) > len(off.steps[0]["sample"])
            return Guidance(layout, self.find_order(layout, many, sample), scale, ACTIVE if isinstance(own, property) else None,
                            self.find_required(calls, rows, sample), second_scale=second, doubled=twice)  # type: ignore[arg-type] # fmt: skip
        named = [name for name in SCALES if name in self.call]
        if named:
            self.remarks["guidance"] = f"{', '.join(named)} changed no number of calls or rows: off here, or an input of the model"
        return Guidance("none")

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
            for number in range(many):
                a, b = here[number].inputs, there[number].inputs
                moved[number] = any(not same(a[name], b.get(name)) for name in a if name != sample)
        else:
            for name, value in here[0].inputs.items():
                if name == sample or not isinstance(value, Tensor) or not value.ndim or len(value) % many or len(value) < many:
                    continue
                if value.shape == (b := there[0].inputs[name]).shape:
                    moved = [was or not same(x, y) for was, x, y in zip(moved, value.chunk(many), b.chunk(many), strict=True)]
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

    # blocks

    def find_blocks(self) -> tuple[BlockGroup, ...]:
        """The lists that run, in running order, with what flows through their blocks."""
        twice = self.twice.of(self.denoisers)[0].blocks if self.twice else None
        if twice is None:
            self.remarks["blocks"] = "what all rows of a batch share may be among what blocks take"
        ran: dict[str, list[int]] = {}
        for number, (path, _, _) in enumerate(self.first.blocks):
            ran.setdefault(path.partition(".")[0], []).append(number)
        groups = []
        unet = hasattr(self.model(), "down_blocks")
        for path, numbers in ran.items():
            if not unet and (len(numbers) < 2 or not all(alike(self.first.blocks[k]) for k in numbers)):
                continue
            if unet and path not in ("down_blocks", "mid_block", "up_blocks"):
                continue
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                self.remarks["blocks"] = f"{path} runs in turn with other lists"
            takes, returns = self.flow(path, numbers, twice)
            layers = lists_in(self.model(), path) if unet else ()
            groups.append(BlockGroup(path, kind_of(path, ran), takes, returns, layers, "none" if unet else self.joined(numbers[0])))
        return tuple(groups)

    def joined(self, number: int) -> Literal["none", "front", "behind"]:
        """Where in a block's stream the text is, by the outputs of the block before it or by the first block's inputs."""
        x = self.first.blocks[number][1].get("hidden_states")
        first = self.first.blocks[0][1].get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 3 or not isinstance(first, Tensor) or x.shape[1] == first.shape[1]:
            return "none"
        _, _, before = self.first.blocks[number - 1]
        texts = [value for value in (before if isinstance(before, tuple) else (before,)) if isinstance(value, Tensor)]
        texts = [value for value in texts if value.shape[1] == x.shape[1] - first.shape[1]]
        for text in texts:
            for place, part in (("front", x[:, : text.shape[1]]), ("behind", x[:, -text.shape[1] :])):
                if torch.equal(part, text):
                    return place  # type: ignore[return-value]
        path = self.first.blocks[number][0]
        self.remarks["blocks"] = f"{path} gets {x.shape[1]} tokens, the first block {first.shape[1]}: which are the sample's"
        return "none"

    def flow(self, path: str, numbers: list[int], twice: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the blocks of a list take (the most that one takes) and return."""
        takes: dict[str, None] = {}
        wide = max(numbers, key=lambda number: len(tensors_of(self.first.blocks[number][1])))
        widest = self.first.blocks[wide][1]
        for name in tensors_of(widest):
            if "rotary" not in name and (twice is None or first_axes(widest[name]) != first_axes(twice[wide][1].get(name))):
                takes[name] = None
        _, inputs, result = self.first.blocks[numbers[0]]
        results = result if isinstance(result, tuple) else (result,)
        returns = []
        for value in results:
            fits = [name for name in takes if isinstance(value, Tensor) and name not in returns and isinstance(inputs.get(name), Tensor)
                    and inputs[name].shape == value.shape]  # fmt: skip
            if isinstance(value, tuple):
                returns.append("res_samples")
            else:
                if len(fits) > 1 and len(results) > 1:
                    self.remarks["blocks"] = f"{path}: which output is which, as {' and '.join(fits)} have one shape"
                returns.append(fits[0] if fits else "hidden_states")
        return tuple(takes), tuple(returns)


def lists_in(model: nn.Module, path: str) -> tuple[str, ...]:
    """The lists of layers inside a U-Net's blocks."""
    part = getattr(model, path)
    found: dict[str, None] = {}
    for block in part if isinstance(part, nn.ModuleList) else [part]:
        found |= dict.fromkeys(name for name, child in block.named_children() if isinstance(child, nn.ModuleList))
    order = [*LAYERS, *(name for name in found if name not in LAYERS and not name.endswith("samplers"))]
    return tuple(sorted(found, key=lambda name: order.index(name) if name in order else len(order)))


def kind_of(path: str, ran: Mapping[str, Any]) -> str:
    """A short name for a list's blocks."""
    kind = path.removesuffix("s").removesuffix("block").replace("transformer", "").strip("_")
    return kind or ("double" if any(other.startswith("single") for other in ran) else "block")


def snapped(ratio: float) -> float:
    """1, or one over a whole number, where it is that."""
    for number in (1, 1000):
        if abs(ratio * number - 1) < 1e-3:
            return 1 / number
    return ratio


def observe(make: Callable[[], Tiny], name: str = "observed") -> Observed:
    """The record of a tiny pipeline's family.

    Raises:
        RuntimeError: it never calls ``scheduler.step``.
    """
    o = Observer(make)
    sample, longer = o.find_sample()
    timestep, factor = o.find_timestep(sample)
    seen: dict[str, Any] = {
        "name": name,
        "pipelines": (type(o.pipe).__name__,),
        "denoisers": o.denoisers,
        "kind": "unet" if hasattr(o.model(), "down_blocks") else "dit",
        "blocks": o.find_blocks(),
        "guidance": o.find_guidance(sample),
        "sample": sample,
        "timestep": timestep,
        "timestep_scale": factor,
        "conditioning": tuple(each for each in o.find_conditioning(sample) if each != timestep),
        "prediction": prediction_of(o),
        "copied_scheduler": o.plain.copies,
        "latents": o.find_latents(),
        "common": o.find_common(sample),
    }
    channels = Family(**seen).channel_axis % o.stepped["sample"].ndim
    if longer is not None:
        seen["appended"] = "channels" if longer == channels else "tokens"
    seen["branch_prediction"] = o.find_branch_prediction(channels)
    o.remarks["least, extra, packages, one_each, unit_start"] = "cannot be seen in these runs"
    return Observed(Family(**seen), o.remarks)


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
    return "1 / 1000" if value == 1 / 1000 else repr(value).replace("'", '"')


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
