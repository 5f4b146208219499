"""Facts about diffusers that methods rest on, found by probes before they were relied on: where one ends, these tests say so first.

Those that the core itself makes true stand beside its own code: scheduler copies (test_now, test_frame_times), three guidance branches
(test_three_branches), answers from a record (test_starts), forwards that really ran and `now()` in exchanged modules (test_now).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import load_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from probes import Effects, Probe, generate, tiny

ITERATES = ("StableDiffusionPipeline", "PixArtAlphaPipeline", "DiTPipeline", "FluxPipeline", "DDPMPipeline", "LTXPipeline")


class Ahead(Probe):
    """Its scheduler moves the next time half-way to the present one, in place, as a solver that chooses its own steps does."""

    name = "ahead"
    effects = Effects(replaces=frozenset({"scheduler"}))
    seen: ClassVar[list[Any]] = []

    def make_scheduler(self, old, family):
        def step(scheduler, *args, **kwargs):
            out = super(cls, scheduler).step(*args, **kwargs)
            scheduler.done += 1
            if scheduler.done < len(scheduler.timesteps):
                after = scheduler.timesteps[scheduler.done :]
                after[0] = (scheduler.timesteps[scheduler.done - 1] + after[0]) / 2
            return out

        cls = type(type(old).__name__, (type(old),), {"step": step, "done": 0})
        return cls.from_config(old.config)

    def denoise(self, call, next):
        if call.branch != "uncond":
            self.seen.append((float(call.step.t), float(call.timestep.flatten()[0])))
        return next(call)


@pytest.mark.parametrize("name", ITERATES)
def test_times_rewritten_ahead_are_what_the_pipeline_goes_on_with(name):
    pipe, kwargs = tiny(name)
    generate(pipe, kwargs, num_inference_steps=4)
    expected = pipe.scheduler.timesteps.clone()
    for i in range(3):
        expected[i + 1] = (expected[i] + expected[i + 1]) / 2
    assert not torch.equal(expected, pipe.scheduler.timesteps)
    Ahead.seen.clear()
    load_pipeline(pipe, plugins=[Ahead])
    generate(pipe, kwargs, num_inference_steps=4)
    steps, asked = zip(*Ahead.seen, strict=True)
    assert steps == tuple(expected.tolist())
    assert asked == pytest.approx([t / 1000 for t in steps] if name == "FluxPipeline" else steps, rel=1e-6)


def test_wan_takes_a_time_for_each_token():
    pipe, _ = tiny("WanPipeline")
    model = pipe.transformer
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 2, 8, 8, generator=draw)
    hidden = torch.randn(1, 5, model.config.text_dim, generator=draw)
    tokens = 2 * (8 // model.config.patch_size[1]) * (8 // model.config.patch_size[2])
    t = torch.tensor([700.0])
    with torch.no_grad():
        one = model(x, t, hidden).sample
        each = model(x, t[:, None].expand(1, tokens), hidden).sample
        mixed = t[:, None].repeat(1, tokens)
        mixed[:, : tokens // 2] = 0
        apart = model(x, mixed, hidden).sample
    torch.testing.assert_close(each, one, rtol=0, atol=2e-6)
    assert not torch.allclose(apart, one, rtol=0, atol=2e-6)


def test_a_unet_without_time_projections_does_not_know_the_time():
    """So that a network which is trained without time loads into the stock class."""
    pipe, _ = tiny("StableDiffusionPipeline")
    hidden = torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def at(t: int) -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(x, t, hidden).sample

    assert not torch.equal(at(1), at(999))
    for module in pipe.unet.modules():
        if (projection := getattr(module, "time_emb_proj", None)) is not None:
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
    assert torch.equal(at(1), at(999))


def test_every_fifth_of_fifty_steps_is_the_grid_of_ten():
    """What a student of a trajectory's points needs; a flow scheduler that is given a count spaces the ends, and so misses it."""

    def unipc(steps: int) -> torch.Tensor:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas[:-1]

    def flow(steps: int, said: bool) -> torch.Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(**({"sigmas": np.linspace(1, 1 / steps, steps)} if said else {"num_inference_steps": steps}))
        return scheduler.sigmas[:-1]

    assert torch.equal(unipc(50)[::5], unipc(10))
    assert torch.equal(flow(50, True)[::5], flow(10, True))
    assert not torch.allclose(flow(50, False)[::5], flow(10, False), atol=1e-3)
