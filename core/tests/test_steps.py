"""Steps and ``scheduler.step`` calls: what a plan counts, what the scheduler does, and where run and schedule end."""

from __future__ import annotations

from typing import ClassVar

import diffusers
import pytest
from diffgraft import Schedule, load_pipeline
from diffgraft.kernel.facts import Pace
from probes import Probe, generate, tiny


class Places(Probe):
    """Writes down every Step at the step hook."""

    name = "places"
    seen: ClassVar[list] = []
    next: ClassVar[list] = []
    starts: ClassVar[list] = []

    def step(self, call, next):
        self.seen.append(call.step)
        self.next.append(call.step_at(1))
        self.starts.append([call.start_of(k) for k in range(call.step.total)])
        return next(call)


def places(name="StableDiffusionPipeline", scheduler=None, *before, options=None, **more):
    pipe, kwargs = tiny(name)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **(options or {}))
    for seen in (Places.seen, Places.next, Places.starts):
        seen.clear()
    load_pipeline(pipe, plugins=[*before, Places])
    generate(pipe, kwargs, **{"num_inference_steps": 6, "output_type": "latent", **more})
    return pipe, list(Places.seen)


PRK = {"skip_prk_steps": False}
PLMS = {"skip_prk_steps": True}
INDICES = [
    ("DDIMScheduler", None, [0, 1, 2, 3, 4, 5]),
    ("PNDMScheduler", PLMS, [0, 0, 1, 2, 3, 4, 5]),
    ("PNDMScheduler", PRK, [0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 5]),
    ("HeunDiscreteScheduler", None, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
    ("KDPM2DiscreteScheduler", None, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
    ("DPMSolverSinglestepScheduler", None, [0, 1, 2, 3, 4, 5]),
]


@pytest.mark.parametrize(("scheduler", "options", "indices"), INDICES)
def test_steps_are_counted_apart_from_calls(scheduler, options, indices):
    pipe, seen = places(scheduler=scheduler, options=options)
    n = len(indices)
    assert [s.index for s in seen] == indices
    assert [(s.call, s.calls, s.total, s.begin) for s in seen] == [(i, n, 6, 0) for i in range(n)]
    assert [s.stage for s in seen] == [indices[:i].count(k) for i, k in enumerate(indices)]
    assert [s.stages for s in seen] == [indices.count(k) for k in indices]
    assert [s.ends_step for s in seen] == [i + 1 == n or indices[i + 1] != k for i, k in enumerate(indices)]
    assert [s.is_last for s in seen] == [False] * (n - 1) + [True]
    assert [s.behind for s in seen] == list(range(n))[::-1]
    first = [next(float(s.t) for s in seen if s.index == k) for k in range(6)]
    assert all([float(s.t) for s in starts] == first for starts in Places.starts)
    assert pipe.plugins.report().steps == 6


@pytest.mark.parametrize(("scheduler", "options", "calls"), [
    ("DDIMScheduler", None, 3), ("PNDMScheduler", PLMS, 4), ("HeunDiscreteScheduler", None, 5), ("EulerDiscreteScheduler", None, 3),
])  # fmt: skip
def test_a_tail_of_a_schedule_counts_its_own_steps(scheduler, options, calls):
    _, seen = places("StableDiffusionImg2ImgPipeline", scheduler, options=options, strength=0.5)
    assert {(s.total, s.calls, s.begin) for s in seen} == {(3, calls, 3)}
    assert [s.call for s in seen] == list(range(calls))
    assert seen[0].index == 0
    assert seen[-1].index == 2
    assert seen[-1].ends_schedule


def test_one_step_of_plms_is_one_call():
    _, seen = places(scheduler="PNDMScheduler", options=PLMS, num_inference_steps=1)
    assert [(s.index, s.total, s.stage, s.stages) for s in seen] == [(0, 1, 0, 1)]


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_a_run_may_end_before_its_schedule(scheduler):
    pipe, seen = places("StableDiffusionXLPipeline", scheduler, denoising_end=0.5)
    last, behind = seen[-1], Places.next[-1]
    assert last.is_last
    assert not last.ends_schedule
    assert not any(s.ends_schedule for s in seen)
    assert float(behind.t) == float(pipe.scheduler.timesteps[last.call + 1])
    if last.sigma is not None:
        assert float(behind.sigma) == float(pipe.scheduler.sigmas[last.call + 1])
    _, whole = places("StableDiffusionXLPipeline", scheduler)
    assert whole[-1].ends_schedule
    assert whole[-1].is_last
    assert float(Places.next[-1].t) == float(whole[-1].t)  # behind the schedule's last comes itself


class Part(Probe):
    """Runs the schedule's first timesteps alone, or its last."""

    name = "part"
    which: ClassVar[slice] = slice(None)

    def schedule(self, call, next):
        timesteps, sigmas = next(call)
        begin, end, _ = self.which.indices(len(timesteps))
        return Schedule(timesteps[begin:end].data, None if sigmas is None else sigmas[begin : end + 1].data)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(("which", "ends"), [(slice(4), False), (slice(2, None), True), (slice(2, 5), False)])
def test_a_part_of_a_schedule_ends_where_the_schedule_does_or_not(scheduler, which, ends, monkeypatch):
    monkeypatch.setattr(Part, "which", which)
    _, seen = places("StableDiffusionPipeline", scheduler, Part)
    assert [s.is_last for s in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].ends_schedule is ends


class Early(Probe):
    """Asks where it is before the pipeline has said how many steps this run makes."""

    name = "early"
    totals: ClassVar[list] = []

    def schedule(self, call, next):
        made = next(call)
        self.totals.append(call.step_at(0).calls)
        return made


def test_the_number_of_an_earlier_run_is_not_taken_for_this_one():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Early])
    Early.totals.clear()
    for n in (7, 3):
        generate(pipe, kwargs, num_inference_steps=n)
    assert Early.totals == [7, 3]


@pytest.mark.parametrize("pace", [Pace(), Pace(later=2), Pace(first=2, steps=1), Pace(first=4, steps=3)])
def test_a_pace_inverts_itself(pace):
    for call in range(30):
        step = pace.step_of(call)
        assert pace.call_of(step) <= call < pace.call_of(step + 1)
        assert pace.is_start(call) == (pace.call_of(step) == call)
        assert pace.steps_in(call + 1) == step + 1
    assert pace.steps_in(0) == 0
