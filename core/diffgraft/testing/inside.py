"""What happens inside a run beside the plugin: schedulers with several calls a step, further denoiser calls, stops, other pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.methods.conditioning import sibling
from diffgraft.testing.case import check
from diffgraft.testing.runs import counting
from diffgraft.testing.setting import USUAL, Setting, under
from diffgraft.testing.subject import Subject
from diffgraft.testing.tiny import denoisers
from diffgraft.testing.watch import plan_reader

PACES = (("DDIM", "PNDM", "Heun", "KDPM2"), ("FlowMatchEuler", "FlowMatchHeun"))
"""Schedulers: one whose steps take one call, and others whose steps take more."""
FURTHER: dict[str, dict[str, Any]] = {
    "skip": {"skip_guidance_layers": (0,), "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
    "uncond_stg": {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": (1,)},
}
"""Arguments that ask for the denoiser calls which families name as ``guidance.extra``."""


def paces(s: Subject) -> tuple[str, ...]:
    """Those of :data:`PACES` that this pipeline runs under; nothing where there are none to compare."""
    found = (tuple(name for name in group if s.supports_scheduler(name)) for group in PACES)
    return next((names for names in found if len(names) > 1), ())


@check("kind", when=lambda s: "calibrated_run" not in s.plugin.effects.needs and bool(paces(s)))
def plan_in_steps(s: Subject) -> None:
    """A plan is one of the solver's steps: how often a step calls the scheduler does not move it (deepcache's key steps under PLMS)."""
    plans: dict[str, list[dict[str, int]]] = {}
    for name in paces(s):
        setting = under(name).but(num_inference_steps=9)
        pipe = s.make(setting)
        reader = plan_reader(s.plugin)
        try:
            s.attach(pipe).plugins.add(reader)
            s.run(pipe, setting)
        except Unsupported as error:
            s.note(f"refused under {name}: {error}")
            continue
        plans[name] = reader.plan
    for name, plan in plans.items():
        first, wanted = next(iter(plans.items()))
        assert plan == wanted, f"what it counts at the first call of each step is {plan} under {name}, {wanted} under {first}"


def further(s: Subject) -> Setting | None:
    """A call that asks for a denoiser call beyond guidance's branches, where the family has one."""
    names = [name for name, argument in s.family.guidance.extra if name in FURTHER and argument in s.facts.arguments]
    return USUAL.but(**FURTHER[names[0]]) if names else None


@check("main", when=lambda s: further(s) is not None)
def further_call(s: Subject) -> None:
    """A denoiser call of conditional rows alone (skip-layer guidance) is told apart, and its effect stays; or it is refused."""
    setting = further(s)
    assert setting is not None
    s.expect_neutral(setting, "with a further denoiser call a step")
    try:
        s.fresh(setting)
    except Unsupported as error:
        s.note(f"refused with a further denoiser call: {error}")
        return
    s.expect_effect(setting, USUAL, "the further denoiser call")


def at_step(number: int, action: Callable[[Any], None]) -> dict[str, Any]:
    """Call arguments that do something after one step."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == number:
            action(pipe)
        return tensors

    return {"callback_on_step_end": callback}


@check("kind", when=lambda s: s.facts.has_stop and "callback_on_step_end" in s.facts.arguments)
def stopped(s: Subject) -> None:
    """A user's stop (``pipe._interrupt``) ends the whole call: no denoiser runs after it, in no further pass either."""
    pipe = s.attach(s.make())
    seen: list[int] = []
    with counting(denoisers(pipe, s.family)) as work:

        def stop(running: Any) -> None:
            seen.append(work.calls)
            running._interrupt = True

        s.run(pipe, **at_step(0, stop))
    assert len(seen) == 1, f"the first step's callback was called {len(seen)} times"
    assert work.calls == seen[0], f"{work.calls - seen[0]} layer calls of the denoiser after the user's stop"
    s.expect_fresh(pipe, what="the run after the stopped one")


@check("kind", when=lambda s: "callback_on_step_end" in s.facts.arguments and "modules" not in s.plugin.points())
def shared_denoiser(s: Subject) -> None:
    """A plain pipeline on the same denoiser, run in a step callback, is no part of the run: both give what they give alone."""
    pipe = s.make()
    other = sibling(pipe)
    inside: list[Tensor] = []
    s.attach(pipe)
    output = s.run(pipe, **at_step(1, lambda running: inside.append(s.run(other))))
    s.expect(output, s.fresh().output, "the run with a plain pipeline's run on the same denoiser inside it")
    for picture in inside:
        s.expect(picture, s.baseline(), "the plain pipeline inside the run")
