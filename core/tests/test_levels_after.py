"""Where a step of a scheduler goes, held against the steps that diffusers' own schedulers make."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffgraft import Effects, Schedule, load_pipeline, unload
from diffgraft.methods.predictions import levels_after, levels_next, levels_of
from probes import Probe, tiny

SPACINGS = ("leading", "trailing", "linspace")


class Steps(Probe):
    """A denoiser that knows the clean sample, and what is said of each step beside what the scheduler made of it."""

    name = "steps"
    effects = Effects(edits=frozenset({"latents"}))  # so that they come before they are scaled
    schedule_of = None

    def __init__(self):
        super().__init__()
        self.clean, self.said = None, []

    def schedule(self, call, next):
        own = next(call)
        return own if self.schedule_of is None else self.schedule_of(own)

    def denoise(self, call, next):
        next(call)
        if self.clean is None:
            draws = torch.Generator().manual_seed(1)
            self.clean = torch.randn(call.latents.shape, generator=draws).sign().to(call.latents)  # of power 1, and never clipped
        a, s = levels_of(call)
        self.before = levels_after(call)  # the same from both hooks
        self.noise = (call.latents - a * self.clean) / s.clamp(min=1e-4)
        return self.noise

    def step(self, call, next):
        out = next(call)
        after = levels_after(call)
        assert torch.equal(torch.stack(after), torch.stack(self.before))
        known = torch.stack([self.clean.flatten(), self.noise.flatten()], 1).double()
        a, kept = torch.linalg.lstsq(known, out.sample.flatten()[:, None].double()).solution.flatten()
        drawn = out.sample.flatten() - known @ torch.stack([a, kept])
        s = (kept**2 + drawn.square().mean()).sqrt()
        self.said.append((*map(float, after), float(a), float(s), *map(float, levels_next(call))))
        return out


def walked(scheduler, n, steps=None, **more):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe.scheduler = scheduler
    steps = steps or Steps()
    pipe = load_pipeline(pipe, plugins=[steps])
    arguments = {**kwargs, "num_inference_steps": n, "guidance_scale": 1.0, "output_type": "latent", **more}
    pipe(**{**arguments, "height": 256, "width": 256, "generator": torch.Generator().manual_seed(0)})
    unload(pipe)
    return torch.tensor(steps.said, dtype=torch.float64)


def made(name, **more):
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    cls = getattr(diffusers, name)
    known = {key: value for key, value in {**settings, "clip_sample": False, **more}.items() if key in cls().config}
    return cls(**known)


@pytest.mark.parametrize("n", [7, 10])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"])
def test_levels_after_are_those_that_a_strided_step_goes_to(name, spacing, n):
    """The very levels: nothing is drawn. On most of these grids the schedule's next timestep is another one."""
    scheduler = made(name, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False)
    found = walked(scheduler, n)
    torch.testing.assert_close(found[:, :2], found[:, 2:4], rtol=2e-3, atol=2e-3)
    if spacing == "linspace":
        assert float((found[:, :2] - found[:, 4:]).abs().max()) > 0.01


@pytest.mark.parametrize("ends_at_one", [True, False])
@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_levels_after_of_schedulers_that_draw(name, ends_at_one):
    """DDPM draws too little noise for its level, so of it only the signal is compared."""
    found = walked(made(name, set_alpha_to_one=ends_at_one), 6)
    torch.testing.assert_close(found[:, 0], found[:, 2], rtol=0, atol=0.06)
    if name != "DDPMScheduler":
        torch.testing.assert_close(found[:, 1], found[:, 3], rtol=0, atol=0.06)
    torch.testing.assert_close(found[-1, :2], found[-1, 2:4], rtol=1e-3, atol=2e-3)


class Shares(Steps):
    """A denoiser that always says the same: how much of the first sample is left behind each step is a product of a' / a."""

    def denoise(self, call, next):
        next(call)
        if self.clean is None:
            self.clean = call.latents
            self.answer = torch.randn(call.latents.shape, generator=torch.Generator().manual_seed(1))
        return self.answer

    def step(self, call, next):
        out = next(call)
        known = torch.stack([self.clean.flatten(), self.answer.flatten()], 1).double()
        share = torch.linalg.lstsq(known, out.sample.flatten()[:, None].double()).solution[0, 0]
        self.said.append((float(levels_of(call).a), float(levels_after(call).a), float(share)))
        return out


@pytest.mark.parametrize("n", [7, 10])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("short", [True, False])
def test_levels_after_of_pndm(spacing, n, short):
    """Its second step is the first once more, told a time of T // N more; of its Runge-Kutta beginning each four begin where one does."""
    scheduler = made("PNDMScheduler", timestep_spacing=spacing, steps_offset=1, skip_prk_steps=short)
    now, after, share = walked(scheduler, n, Shares()).unbind(1)
    before = torch.cat([share.new_ones(1), share[:-1]])
    for i in range(len(share)):
        start = (0 if i == 1 else i) if short else i // 4 * 4 if i < len(scheduler.prk_timesteps) else i
        a = now[start]
        if short and i == 1:
            a = scheduler.alphas_cumprod[scheduler.timesteps[1] + 1000 // n].double().sqrt()
        torch.testing.assert_close(share[i] / before[start], after[i] / a, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_of_sigmas_they_are_the_schedules_next_ones(name):
    found = walked(made(name, timestep_spacing="linspace"), 7)
    assert torch.equal(found[:, :2], found[:, 4:])
    scale = (found[:, :1] ** 2 + found[:, 1:2] ** 2).sqrt()
    torch.testing.assert_close(found[:, :2] / scale, found[:, 2:4] / scale, rtol=5e-3, atol=5e-3)


def test_an_edited_schedule_of_ddim_is_followed():
    steps = Steps()
    steps.schedule_of = lambda own: Schedule(torch.tensor([900, 500, 421, 50]), None)
    found = walked(made("DDIMScheduler"), 4, steps)
    torch.testing.assert_close(found[:, :2], found[:, 2:4], rtol=2e-3, atol=2e-3)
    assert torch.equal(found[:, :2], found[:, 4:])
