"""The denoiser without the pipeline's loop: a session predicts what the run did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.plugin import INSIDE, Plugin
from diffgraft.kernel.calls import DenoiseCall
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.testing.case import check
from diffgraft.testing.subject import Subject, refused
from diffgraft.testing.watch import neighbour

Asked = tuple[int, str, str, Tensor, dict[str, Any], Tensor]
"""(scheduler call, branch, denoiser, state of the generator, arguments, answer) of a denoiser call."""


def tape(plugin: type[Plugin], asked: list[Asked]) -> Plugin:
    """To be put outermost beside ``plugin``: keeps what the pipeline asks of the denoiser, and what it is answered."""

    def denoise(self: Plugin, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        drawn = call.generator.get_state()
        answer = next(call)
        asked.append((call.step.call, call.branch or "cond", call.model_name, drawn, call.arguments(), answer))
        return answer

    return neighbour(plugin, "tape", ["denoise"], lambda point: denoise)


@check("kind", when=lambda s: bool(INSIDE & set(s.plugin.points())) and not s.family.guidance.bound)
def session(s: Subject) -> None:
    """The same denoiser calls through a session give the same predictions, bit for bit; a plugin that needs the loop is refused there.

    Not where the pipeline itself changes layers for the time of a run.
    """
    pipe = s.attach(s.make())
    if s.plugin.needs_loop():
        with refused(Unsupported, "a session took a plugin that needs the loop"), pipe.plugins.session():
            pass
        return
    own = [pipe.plugins[name] for name in pipe.plugins]
    asked: list[Asked] = []
    load_pipeline(unload(pipe), plugins=[tape(s.plugin, asked), *own])
    s.run(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    pipe.plugins.remove("tape")
    arguments = {s.family.guidance.scale: s.facts.kwargs.get(s.family.guidance.scale)} if s.has_guidance else {}
    apart, generator = [], torch.Generator()
    with torch.no_grad(), pipe.plugins.session(arguments, scheduler=scheduler, generator=generator) as entered:
        for number, branch, denoiser, drawn, given, answer in asked:
            entered.at(number)
            generator.set_state(drawn)  # the pipeline draws too, in between
            if not torch.equal(entered.predict(given, branch, denoiser), answer):
                apart.append((number, branch))
    assert not apart, f"{len(apart)} of {len(asked)} predictions of a session are not those of the run, first at {apart[0]}"
