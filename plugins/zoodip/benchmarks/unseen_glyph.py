"""A glyph that the bundled model has never seen, learned in forward passes on an int8 model, and by textual inversion with a backward pass.

    python plugins/zoodip/benchmarks/unseen_glyph.py --steps 2000 --ti-steps 300 --out unseen.json

Renders --pictures scenes of the glyph with captions, learns its row in both ways from the same pictures and the same initial row, and
makes pictures of prompts that were not among the captions. For each row: the cosine of the judge's features between each made picture and
a rendered scene of the glyph with the same background, size and place (mean and its standard error over the pictures); the same for the
initial row; for rendered scenes of another seed (the most that can be reached); the loss on --looks fixed draws of timestep and noise; CPU
seconds; and bytes of a step: the U-Net's weights as they lie in memory, and the most that was allocated over that while it ran.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import diffgraft
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffgraft import load_pipeline, unload
from diffgraft.cli.values import load_bare
from diffgraft.kernel.defaults import filled
from diffgraft.lab.pictures import draw_grid, encode
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.examples import Example
from diffgraft.methods.files import write_atomic
from diffgraft.methods.fitting import FitPlan, Loader, beginning, fit, loss_of
from diffgraft.methods.inputs import CallSettings, call_arguments
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale
from diffgraft_checkpoints.emoji import judge, scenes
from diffgraft_zoodip import ZOODiP
from diffgraft_zoodip.fitter import ZerothOrder
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

TOKEN = "<zoodip>"
SAID = (("big", "center", "blue"), ("big", "center", "gray"), ("big", "left", "green"), ("small", "right", "yellow"))


def prompt_of(size: str, place: str, color: str) -> str:
    """What asks for the glyph like that."""
    return f"a {size} {TOKEN} {scenes.PLACE_PHRASES[place]} on {'an' if color[0] in 'aeiou' else 'a'} {color} background"


PROMPTS = tuple(prompt_of(*said) for said in SAID)


class Backprop(ZerothOrder):
    """The same loss of the same draws, with its own gradient: textual inversion."""

    def loss(self, session: Any, batch: Any) -> Tensor:
        return self.asked(session, batch)(self.trained.row)[0]

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.rate)


class Inversion(ZOODiP):
    fitting = Backprop


class Stored(nn.Module):
    """A linear or convolution that keeps its weight in a byte a number, and has it in floats only while it computes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        grid = UniformAffine(8, "channel", symmetric=True)
        scale = nearest_scale(layer.weight.detach(), grid)
        self.register_buffer("codes", grid.quantise(layer.weight.detach(), scale).to(torch.int8))
        self.register_buffer("delta", scale.delta)
        self.bias = layer.bias
        conv = isinstance(layer, nn.Conv2d)
        self.how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups} if conv else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes.to(x.dtype) * self.delta.to(x.dtype)
        return F.linear(x, weight, self.bias) if self.how is None else F.conv2d(x, weight, self.bias, **self.how)


def stored(model: nn.Module) -> nn.Module:
    """A copy whose linears and convolutions are :class:`Stored`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, nn.Conv2d):
                setattr(parent, name, Stored(child))
    return model.requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that torch had allocated during ``work`` over what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return int(np.cumsum([each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]).max())


def scene_of(size: str, place: str, color: str, seed: int) -> Any:
    """A rendered picture of that."""
    labels = scenes.Labels(object=TOKEN, background=color, size=size, place=place)
    return scenes.render(scenes.sample_scene(labels, np.random.default_rng(seed)))


def data(pictures: int) -> list[Example]:
    """Scenes of the glyph with captions that say everything; none of them is one of :data:`SAID`."""
    found: list[Example] = []
    rng = np.random.default_rng(5)
    while len(found) < pictures:
        said = tuple(str(rng.choice(list(each))) for each in (scenes.SIZES, scenes.PLACES, scenes.BACKGROUNDS))
        if said not in SAID:
            found.append(Example(prompt_of(*said), scene_of(*said, len(found))))
    return found


def one_step(pipe: Any, plugin: ZOODiP, examples: Sequence[Example], knobs: dict[str, Any]) -> int:
    """The peak of a step, the second one."""
    fitter, settings, plan = type(plugin).fitting(plugin, **knobs), CallSettings(), FitPlan(2, 1)

    def call(work: Any) -> Any:
        return work(**call_arguments(work, [examples[0].sample(0)], CallSettings(steps=1)))

    with beginning(pipe, plugin, fitter, call, settings, 0) as (stack, _), Loader(stack.pipe, fitter, examples, plan) as load:
        loss_of(stack, fitter, load(0), plan).backward()
        batch = load(1)
        return peak_bytes(lambda: loss_of(stack, fitter, batch, plan).backward())


def main(
    glyph: Annotated[str, typer.Option(help="Code point of the glyph, in hexadecimal.")] = "1F345",
    steps: Annotated[int, typer.Option(min=1, help="Of ZOODiP.")] = 2000,
    ti_steps: Annotated[int, typer.Option(min=1, help="Of textual inversion.")] = 300,
    rate: Annotated[float, typer.Option(help="ZOODiP's learning rate.")] = 1e-2,
    ti_rate: Annotated[float, typer.Option(help="Textual inversion's.")] = 5e-3,
    initial: Annotated[str, typer.Option(help="Word with whose row both begin; empty: the mean of all.")] = "",
    directions: Annotated[int, typer.Option(min=1)] = 2,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    pictures: Annotated[int, typer.Option(min=1, help="To learn from.")] = 6,
    looks: Annotated[int, typer.Option(min=1)] = 48,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures made of each prompt.")] = 4,
    inference_steps: Annotated[int, typer.Option(min=1)] = 12,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON, and a picture beside it.")] = None,
) -> None:
    """Similarity and memory of a learned glyph."""
    console = Console()
    scenes.OBJECTS[TOKEN] = int(glyph, 16)
    pipe, _ = load_bare("emoji-sd", [], None, None)
    pipe.set_progress_bar_config(disable=True)
    examples, known = data(pictures), judge.load_bundled()
    settings = CallSettings(steps=inference_steps)
    plain = {"initial": initial, "token": TOKEN}

    def learn(plugin: ZOODiP, count: int, knobs: dict[str, Any]) -> tuple[Artefact, float]:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            artefact = fit(
                pipe, plugin, examples, settings, Path(folder) / "row.safetensors", FitPlan(count, batch), knobs={**plain, **knobs}
            )
        return artefact, time.process_time() - started

    def judged(pictures: Sequence[Any]) -> Tensor:
        """[prompts * seeds] cosines to rendered scenes with the same labels."""
        wanted = [scene_of(*said, 1000 + i) for said in SAID for i in range(seeds)]
        return F.cosine_similarity(known.features(list(pictures)), known.features(wanted))

    def made_with(artefact: Artefact | None, prompts: Sequence[str]) -> list[Any]:
        load_pipeline(pipe, plugins=[ZOODiP(artefact=artefact)])
        try:
            asked = {"num_inference_steps": inference_steps, "guidance_scale": 2.0, "num_images_per_prompt": seeds}
            return [
                each
                for i, prompt in enumerate(prompts)
                for each in pipe(prompt, generator=torch.Generator().manual_seed(i), **asked).images
            ]
        finally:
            unload(pipe)

    @torch.no_grad()
    def looked(artefact: Artefact) -> float:
        """The loss of a row on draws that are the same for all."""
        fitter = ZerothOrder(ZOODiP(), **plain, bits="w32a32")
        plan, found = FitPlan(looks, 1, seed=99), []

        def call(work: Any) -> Any:
            return work(**call_arguments(work, [examples[0].sample(0)], CallSettings(steps=1)))

        with beginning(pipe, ZOODiP(), fitter, call, CallSettings(), 0) as (stack, _), Loader(stack.pipe, fitter, examples, plan) as load:
            for step in range(looks):
                one = load(step)
                arguments = filled(stack.pipe, (), fitter.arguments(one))
                with stack.session(arguments, scheduler=fitter.probe.scheduler, generator=one.generator) as session:
                    found.append(float(fitter.asked(session, one)(artefact.tensors[TOKEN]).mean()))
        return math.fsum(found) / looks

    begun, _ = learn(Inversion(), 1, {"rate": 1e-12, "bits": "w32a32"})
    ways: dict[str, tuple[Artefact, float, int]] = {"initial row": (begun, 0.0, 0)}
    ways["textual inversion, float"] = (*learn(Inversion(), ti_steps, {"rate": ti_rate, "bits": "w32a32"}), ti_steps)
    ways["zoodip, int8"] = (*learn(ZOODiP(), steps, {"rate": rate, "directions": directions, "together": True}), steps)
    lines, rows = [], [(["rendered"], [scene_of(*said, 1000) for said in SAID])]
    for name, (artefact, seconds, count) in ways.items():
        made = made_with(artefact, PROMPTS)
        cosine = judged(made)
        rows.append(([name, f"similarity {cosine.mean():.3f}"], made[::seeds]))
        error = float(cosine.std() / math.sqrt(len(cosine)))
        row = {"way": name, "cosine": float(cosine.mean()), "error": error, "loss": looked(artefact), "seconds": seconds, "steps": count}
        lines.append({**row, "losses": artefact.facts["fit"]["losses"]})
    most = judged([scene_of(*said, i) for said in SAID for i in range(seeds)])
    lines.append({"way": "rendered scenes", "cosine": float(most.mean()), "error": float(most.std() / math.sqrt(len(most)))})

    memory, float_unet = {}, pipe.unet
    for name, unet, plugin in (
        ("textual inversion, float", float_unet, Inversion()),
        ("textual inversion, int8", stored(float_unet), Inversion()),
        ("zoodip, float", float_unet, ZOODiP()),
        ("zoodip, int8", stored(float_unet), ZOODiP()),
    ):
        pipe.register_modules(unet=unet)
        memory[name] = {"weights": weight_bytes(unet), "over": one_step(pipe, plugin, examples, {**plain, "bits": "w32a32"})}
    pipe.register_modules(unet=float_unet)

    table = Table(title=f"glyph {glyph}, {pictures} pictures, {len(PROMPTS) * seeds} made, {inference_steps} steps")
    for column in ("row", "steps", "CPU s", "loss", "cosine", "error"):
        table.add_column(column)
    for each in lines:
        figures = [str(each.get("steps", "")), f"{each.get('seconds', 0):.0f}", f"{each['loss']:.4f}" if "loss" in each else ""]
        table.add_row(each["way"], *figures, f"{each['cosine']:.4f}", f"{each['error']:.4f}")
    console.print(table)
    for name, found in memory.items():
        total = found["weights"] + found["over"]
        console.print(f"{name}: {total / 1e6:.1f} MB, of which weights {found['weights'] / 1e6:.1f}", highlight=False)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        asked = {"glyph": glyph, "rate": rate, "ti_rate": ti_rate, "initial": initial, "directions": directions, "batch": batch}
        grid = draw_grid(f"U+{glyph}, which the model has never seen", f"{inference_steps} steps", PROMPTS, rows, side=128)
        write_atomic(out.with_suffix(".png"), encode([grid], ".png"))
        out.write_text(json.dumps({**asked, **where, "pictures": pictures, "lines": lines, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
