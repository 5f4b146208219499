"""Frames at times of their own: SkyReels-V2, which steps a copy of its scheduler for each, and plugins that give Wan such times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.kernel.calls import StepOutput
from diffusers import DPMSolverMultistepScheduler
from probes import Effects, Everything, Probe, generate, tiny, trace

DF = "SkyReelsV2DiffusionForcingPipeline"
I2V, V2V = "SkyReelsV2DiffusionForcingImageToVideoPipeline", "SkyReelsV2DiffusionForcingVideoToVideoPipeline"
LONG = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
"""Five latent frames in windows of three, of which two are the window before."""
HOW: dict[str, tuple[str, dict[str, Any]]] = {
    "short": (DF, {}),
    "without guidance": (DF, {"guidance_scale": 1.0}),
    "asynchronous": (DF, {"ar_step": 2}),
    "blocks of frames": (DF, {"ar_step": 2, "num_frames": 13, "causal_block_size": 2}),
    "long": (DF, LONG),
    "long asynchronous": (DF, LONG | {"ar_step": 1}),
    "noise on the given frames": (DF, LONG | {"addnoise_condition": 20}),
    "window that slides": (DF, {"num_frames": 17, "base_num_frames": 17, "ar_step": 2}),
    "picture": (I2V, {}),
    "picture, long": (I2V, LONG),
    "video": (V2V, {}),
    "video, asynchronous": (V2V, {"ar_step": 1, "num_frames": 17}),
}


@dataclass
class Steps:
    seen: list[Any] = field(default_factory=list)
    asked: int = 0


class Watches(Probe):
    """Does nothing at every point but `guide`, which reaches no step of a copy, and `run`, which would keep its state for all windows."""

    name = "watches"
    State = Steps
    schedule, block, attention = Everything.schedule, Everything.block, Everything.attention
    modules, select_blocks = Everything.modules, Everything.select_blocks
    told: ClassVar[list[Any]] = []

    def denoise(self, call, next):
        call.shared.asked += 1
        self.told.append(("denoise", call.branch, call.step.index, call.step.total, tuple(call.timestep.shape), call.shared.asked))
        return next(call)

    def step(self, call, next):
        self.told.append(("step", call.copy, call.step.index, call.scheduler, call["timestep"], call.step))
        return next(call)


class Runs(Probe):
    """Does nothing around the whole call."""

    name = "runs"
    run = Everything.run


def steps_of(told: list[Any]) -> list[list[int]]:
    """The numbers of the copies that stepped, by denoiser iteration; those of a new window follow on."""
    groups: list[list[int]] = []
    for what, which, *_ in told:
        if what == "denoise" and which == "cond":
            groups.append([])
        elif what == "step":
            groups[-1].append(which)
    return groups


@pytest.mark.parametrize("how", HOW)
def test_an_idle_plugin_changes_nothing_and_leaves_nothing(how):
    name, more = HOW[how]
    pipe, kwargs = tiny(name)
    kwargs = {**kwargs, "output_type": "latent"} if name == DF else kwargs
    torch.manual_seed(0)  # `addnoise_condition` draws from the global generator
    plain, before = generate(pipe, kwargs, **more), trace(pipe)
    Watches.told.clear()
    load_pipeline(pipe, plugins=[Runs, Watches])
    torch.manual_seed(0)
    assert torch.equal(generate(pipe, kwargs, **more), plain)
    told, report = Watches.told, pipe.plugins.report()
    assert report.steps == sum(1 for what, branch, *_ in told if (what, branch) == ("denoise", "cond"))
    place = 0
    for what, which, index, *facts in told:
        if what == "denoise" and which == "cond":
            total, shape, asked = facts
            place = index and place + 1  # a window begins anew
            assert index == place < total
            assert shape[0] == 1 <= shape[1]
            assert asked == 1 or index > 0, "fresh state for each window"
        elif what == "step":
            scheduler, t, step = facts
            assert index == place
            assert scheduler is not pipe.scheduler
            assert int(t) == int(step.t), "each copy is where it is in its own schedule"
            assert torch.equal(step.sigma, scheduler.sigmas[len(scheduler.timesteps) - 1 - step.behind])
    for each in {id(entry[3]): entry[3] for entry in told if entry[0] == "step"}.values():
        assert not [name for name, value in vars(each).items() if callable(value)], "no method of theirs is ours"
    unload(pipe)
    assert trace(pipe) == before
    torch.manual_seed(0)
    assert torch.equal(generate(pipe, kwargs, **more), plain)


def test_which_copies_step_when():
    pipe, kwargs = tiny(DF)
    kwargs |= {"output_type": "latent", "num_inference_steps": 3}
    load_pipeline(pipe, plugins=[Watches])
    waves = [[1], [1, 2], [1, 2, 3], [2, 3], [3]]
    for more, expected in (({}, [[1, 2, 3]] * 3), ({"ar_step": 1}, waves), (LONG, [[1, 2, 3]] * 3 + [[3]] * 6)):
        Watches.told.clear()
        generate(pipe, kwargs, **more)
        assert steps_of(Watches.told) == expected


def test_another_scheduler_and_an_answer_without_it():
    class Frozen(Probe):
        """Keeps the second frame as it was drawn."""

        name = "frozen"

        def step(self, call, next):
            return StepOutput(call.sample) if call.copy == 2 else next(call)

    pipe, kwargs = tiny(DF)
    kwargs |= {"output_type": "latent"}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Watches])
    assert torch.equal(generate(pipe, kwargs), plain)
    pipe.plugins.add(Frozen)
    z = generate(pipe, kwargs)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z[:, :, 1], noise[:, :, 1])
    assert not torch.isclose(z[:, :, 0], noise[:, :, 0]).any()


def test_a_plugins_scheduler_is_copied_for_each_frame():
    class Solver(Probe):
        name = "solver"
        scheduler = DPMSolverMultistepScheduler
        effects = Effects(replaces=frozenset({"scheduler"}))

    (pipe, kwargs), (plain, _) = tiny(DF), tiny(DF)
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    load_pipeline(pipe, plugins=[Solver, Watches])
    for more in ({}, {"ar_step": 1}):
        assert torch.equal(generate(pipe, kwargs, output_type="latent", **more), generate(plain, kwargs, output_type="latent", **more))


@pytest.mark.parametrize("what", ["latents", "schedule", "guidance"])
def test_what_reaches_no_copy_is_refused_when_put_on(what):
    edits = frozenset({what} - {"guidance"})
    body = {"name": "edits", "effects": Effects(edits=edits), "step": Everything.step}
    plugin = type("Edits", (Probe,), body | ({"guide": Everything.guide} if what == "guidance" else {}))
    pipe, _ = tiny(DF)
    before = trace(pipe)
    with pytest.raises(Unsupported, match=f"edits works on the {what}, which does not reach the steps of {DF}"):
        load_pipeline(pipe, plugins=[plugin])
    assert trace(pipe) == before


# times for the frames of Wan --------------------------------------------------------------------------------------------------------------


class FrameTimes(Probe):
    """Each latent frame at its own time, ``shares`` of the run's: all tokens of a frame get it, and Euler steps each by its own length."""

    name = "frame_times"
    effects = Effects(edits=frozenset({"timestep"}))
    shares: ClassVar[tuple[float, ...]] = (1.0, 1.0)

    def denoise(self, call, next):
        height, width = call.sample.shape[-2:]
        t = call.step.t * torch.tensor(self.shares)
        _, p, q = call.model.config["patch_size"]
        return next(call.replace(timestep=t.repeat_interleave(height * width // (p * q))[None]))

    def step(self, call, next):
        here, after = call.step.sigma, call.scheduler.sigmas[call.step.call + 1]
        length = ((after - here) * torch.tensor(self.shares)).view(1, 1, -1, 1, 1)
        return StepOutput(torch.where(length == 0, call.sample, call.sample + length * call.model_output))


class Euler(Probe):
    """The same with one time for all."""

    name = "euler"

    def step(self, call, next):
        here, after = call.step.sigma, call.scheduler.sigmas[call.step.call + 1]
        return StepOutput(call.sample + (after - here) * call.model_output)


def test_a_plugin_may_give_each_frame_its_time():
    pipe, kwargs = tiny("WanPipeline")
    kwargs |= {"output_type": "latent"}
    load_pipeline(pipe, plugins=[Euler])
    one = generate(pipe, kwargs)
    unload(pipe)
    load_pipeline(pipe, plugins=[FrameTimes])
    torch.testing.assert_close(generate(pipe, kwargs), one, rtol=0, atol=2e-5)
    FrameTimes.shares = (0.0, 1.0)
    try:
        z = generate(pipe, kwargs)
    finally:
        FrameTimes.shares = (1.0, 1.0)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z[:, :, 0], noise[:, :, 0]), "a frame at time 0 is not touched"
    assert not torch.equal(z[:, :, 1], one[:, :, 1])
