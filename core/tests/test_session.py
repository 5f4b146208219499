"""A session gives what a run gives, and leaves nothing."""

from __future__ import annotations

import copy
import gc
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffgraft import ConfigError, DiffgraftError, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.installed.plugin import INSIDE
from diffgraft.kernel.facts import Step
from diffgraft.methods.conditioning import own_conditioning
from diffgraft.testing import contract_cases
from diffusers import HeunDiscreteScheduler
from probes import Effects, Probe, tiny, trace

NAMES = ("StableDiffusionPipeline", "FluxPipeline", "WanPipeline", "DiTPipeline", "StableDiffusionXLPipeline")


@dataclass
class Old:
    features: dict = field(default_factory=dict)


class Caches(Probe):
    """A cache of blocks that refreshes every second step, an edit of attention, and noise: all that hooks of a denoiser can do."""

    name = "caches"
    State = Old
    effects = Effects(skips=frozenset({"blocks"}), edits=frozenset({"attention", "prediction"}), stochastic=True)

    def denoise(self, call, next):
        call.count(f"step {call.step.index} of {call.step.total}, guided {call.guided}")
        noise = torch.randn(call.sample.shape[1:], generator=call.generator)
        return next(call) * (1 + 0.1 * call.step.index) + 1e-3 * float(noise.mean())

    def block(self, call, next):
        old = call.state.features
        if call.step.index % 2 == 0 or call.info.order not in old:
            old[call.info.order] = next(call)
        return old[call.info.order]

    def attention(self, call, next):
        out = next(call)
        return tuple(x * 0.9 for x in out) if isinstance(out, tuple) else out * 0.9


def recorded(pipe, kwargs, **more):
    """(what a run's denoiser was called with, what it answered) of every call, in order; the scheduler as the run left it."""
    calls = []

    class Recorder(Probe):
        name = "recorder"

        def denoise(self, call, next):
            calls.append([call.step.call, call.branch, call.model_name, call.args, dict(call.kwargs)])
            calls[-1].append(next(call))
            return calls[-1][-1]

    load_pipeline(pipe, plugins=[Recorder, Caches])
    pipe(**kwargs, **more, generator=torch.Generator().manual_seed(0))
    pipe.plugins.remove("recorder")
    return calls, copy.deepcopy(pipe.scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_a_session_predicts_what_the_run_did(name):
    pipe, kwargs = tiny(name)
    kwargs = {**kwargs, "num_inference_steps": 4}
    calls, scheduler = recorded(pipe, kwargs)
    draws = torch.Generator().manual_seed(0)
    before = trace(pipe)
    drawn = calls[0][3][0] if calls[0][3] else calls[0][4]["hidden_states"]
    rows = 2 if calls[0][1] == "both" else 1
    torch.randn((drawn.shape[0] // rows, *drawn.shape[1:]), generator=draws)  # the pipeline's own draw of latents
    arguments = {key: value for key, value in kwargs.items() if "scale" in key or key == "negative_prompt"}
    if "guidance_scale" not in arguments and pipe.plugins.family.guidance.layout != "none":
        arguments["guidance_scale"] = 5.0
    with torch.no_grad(), pipe.plugins.session(arguments, scheduler=scheduler, generator=draws) as session:
        for number, branch, denoiser, args, given, answer in calls:
            session.at(number)
            out = session.model(*args, **given, branch=branch, denoiser=denoiser)
            assert torch.equal(out[0], answer), (number, branch)
        counts = session.report.plugins["caches"].counts
        forwards = session.report.forwards
    assert counts == pipe.plugins.report().plugins["caches"].counts
    assert sum(forwards.values()) == len(calls)
    assert trace(pipe) == before


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_contract_holds_a_plugin_that_draws_to_it(family):
    [case] = [case for case in contract_cases(Caches, [family]) if case.check.name == "session"]
    case.run()


def test_every_installed_plugin_with_hooks_of_the_denoiser_is_held_to_it():
    """Each either predicts in a session what it does in a run, or says that it needs the loop, and is refused there."""
    inside = {name for name in registry.installed() if INSIDE & set(registry.find(name).points())}
    assert {"deepcache", "superdiff"} <= inside
    for name in inside:
        assert "session" in {case.check.name for case in contract_cases(name)}, name


def test_a_session_counts_its_forwards_also_without_a_plugin():
    pipe, kwargs = tiny("FluxPipeline")
    load_pipeline(pipe)
    asked = own_conditioning(pipe, kwargs).whole["cond"]
    with torch.no_grad(), pipe.plugins.session() as session:
        for index in range(3):
            session.at(Step(index=index, total=3, t=torch.tensor(500.0), sigma=None))
            found = session.model(**asked)[0]
    assert session.report.forwards == session.report.denoiser_calls == {"cond": 3}
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**asked)[0], found)
    assert "forward" not in vars(pipe.transformer)


def test_steps_are_the_solvers(sd):
    pipe, _ = sd
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(3)
    seen = []

    class Looks(Probe):
        name = "looks"

        def denoise(self, call, next):
            seen.append((call.step.index, call.step.total, call.step.call, call.step.calls, float(call.step.t)))
            return next(call)

    load_pipeline(pipe, plugins=[Looks])
    x, hidden = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    with pipe.plugins.session() as session:
        for index in range(3):
            session.at(index)
            session.model(x, 1, hidden)
        session.at(Step(5, 9, torch.tensor(77.0), torch.tensor(0.5)))
        session.model(x, 77, hidden)
        for wrong in (3, -1):
            with pytest.raises(ConfigError, match=f"step {wrong} of a session whose scheduler is set to 3 steps"):
                session.at(wrong)
        with pytest.raises(ConfigError, match="branch='condd'; did you mean 'cond'"):
            session.model(x, 1, hidden, branch="condd")
        with pytest.raises(ConfigError, match="denoiser='unit'"):
            session.model(x, 1, hidden, denoiser="unit")
        with pytest.raises(ConfigError, match="branch='both' of 1 rows"):
            session.model(x, 1, hidden, branch="both")
    times = pipe.scheduler.timesteps
    assert seen[:3] == [(i, 3, 2 * i, 5, float(times[2 * i])) for i in range(3)]
    assert seen[3] == (5, 9, 0, 1, 77.0)


def test_gradients_flow_and_state_is_fresh(sd):
    pipe, _ = sd
    load_pipeline(pipe, plugins=[Caches])
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    hidden = torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    found = []
    for _ in range(2):
        with pipe.plugins.session(generator=torch.Generator().manual_seed(0)) as session:
            out = session.model(x, 1, hidden, return_dict=False)[0]
            found.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


def test_a_session_and_a_run_exclude_each_other(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Caches])
    with pipe.plugins.session():
        with pytest.raises(DiffgraftError, match="running already"):
            pipe(**kwargs)
        with pytest.raises(DiffgraftError, match="while it is running"):
            pipe.plugins.remove("caches")
        told = []

        def other() -> None:
            try:
                with pipe.plugins.session():
                    pass
            except DiffgraftError as error:
                told.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "while it is running" in told[0]
    pipe(**kwargs)


def test_a_plugin_that_needs_the_loop_is_refused(sd):
    pipe, _ = sd
    looped = type("Looped", (Caches,), {"name": "looped", "run": lambda self, call, next: next(call)})
    load_pipeline(pipe, plugins=[looped])
    with pytest.raises(Unsupported, match="looped: works around the pipeline's loop"), pipe.plugins.session():
        pass
    pipe.plugins.disable()
    with pipe.plugins.session():
        pass
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[type("Fine", (looped,), {"name": "fine", "sessions": True})])
    with pipe.plugins.session():
        pass


def test_a_session_that_was_lost_is_over(sd):
    """An interrupt between entering and the `with` block's first line: nobody can leave it any more."""
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Caches])
    lost = pipe.plugins.session()
    lost.__enter__()
    assert pipe.plugins._busy.locked()
    del lost
    gc.collect()
    pipe(**kwargs)
    with ExitStack() as held:
        held.enter_context(pipe.plugins.session())
        with pytest.raises(DiffgraftError, match="running already"):
            pipe(**kwargs)


def test_an_error_in_a_session_leaves_nothing(sd):
    pipe, kwargs = sd
    plain = pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]
    load_pipeline(pipe, plugins=[Caches])
    before: Any = trace(pipe)
    with pytest.raises(ZeroDivisionError), pipe.plugins.session(scheduler=copy.deepcopy(pipe.scheduler)):
        raise ZeroDivisionError
    assert trace(pipe) == before
    pipe.plugins.clear()
    assert torch.equal(torch.as_tensor(pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]), torch.as_tensor(plain))


def test_without_plugins_it_is_the_denoiser_itself(sd):
    pipe, _ = sd
    load_pipeline(pipe, plugins=[Caches])
    pipe.plugins.disable()
    x, hidden = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    with torch.no_grad(), pipe.plugins.session() as session:
        assert torch.equal(session.model(x, 1, hidden).sample, pipe.unet(x, 1, hidden).sample)
