"""The denoiser without the pipeline's loop: a session predicts what the run did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.plugin import INSIDE, Paper, Plugin
from diffgraft.kernel.calls import DenoiseCall
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.testing.case import check
from diffgraft.testing.subject import Subject, refused


class Tape(Plugin):
    """Outermost: keeps what the pipeline asks of the denoiser, and what it is answered."""

    name = "tape"
    paper = Paper("a tape", "0000.00000", "nothing")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, str, str, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        answer = next(call)
        self.asked.append((call.step.call, call.branch or "cond", call.model_name, call.args, dict(call.kwargs), answer))
        return answer


@check("kind", when=lambda s: bool(INSIDE & set(s.plugin.points())) and not s.couples)
def session(s: Subject) -> None:
    """The same denoiser calls through a session give the same predictions, bit for bit; a plugin that needs the loop is refused there."""
    pipe, tape = s.attach(s.make()), Tape()
    if s.plugin.needs_loop():
        with refused(Unsupported, "a session took a plugin that needs the loop"), pipe.plugins.session():
            pass
        return
    own = [pipe.plugins[name] for name in pipe.plugins]
    load_pipeline(unload(pipe), plugins=[tape, *own])
    s.run(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    pipe.plugins.remove("tape")
    arguments = {s.family.guidance.scale: s.facts.kwargs.get(s.family.guidance.scale)} if s.has_guidance else {}
    apart = []
    with torch.no_grad(), pipe.plugins.session(arguments, scheduler=scheduler) as entered:
        for number, branch, denoiser, args, kwargs, answer in tape.asked:
            entered.at(number)
            if not torch.equal(entered.model(*args, **kwargs, branch=branch, denoiser=denoiser)[0], answer):
                apart.append((number, branch))
    assert not apart, f"{len(apart)} of {len(tape.asked)} predictions of a session are not those of the run, first at {apart[0]}"
