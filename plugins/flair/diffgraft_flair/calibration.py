"""The model's flow-matching loss over t: what is measured, how it is kept, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from diffgraft import (
    Calibrator,
    ConfigError,
    DenoiseCall,
    Effects,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
)
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.predictions import levels_next, levels_of
from diffgraft.methods.restoring import latents_of, unit_noise
from diffgraft.methods.schema import Holds, Values
from diffgraft.methods.watching import made_for, watching
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_flair.knobs import PAPER, FlairConfig
from diffgraft_flair.schedules import ensure_flow, even


class Facts(TypedDict):
    """Of an artefact."""

    pictures: Annotated[int, Field(ge=1)]


def too_short(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the curve, or None."""
    return None if len(tensors["loss"]) > 1 else "the tensor 'loss' has one value: a curve from t = 1 to 0 has two at least"


HOLDS = Holds({"loss": Values(("T",), low=0)}, Facts, too_short)


@dataclass
class Asked:
    """Of one run: the clean sample, the noise on it at this step, and the losses so far."""

    clean: Tensor | None = None
    noise: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    again: bool = False
    """Whether this pass asks at all t: the one before made the clean sample."""


class Measure(Calibrator):
    """Runs the pipeline, and then once more over t = 1 ... 0 with new noise on the picture that came out, as many levels as steps.

    The velocity is the guided one, as the scheduler gets it.
    """

    name = "flair_calibration"
    paper = PAPER
    Config = FlairConfig
    State = Asked
    effects = Effects(
        replaces=frozenset({"scheduler"}), edits=frozenset({"latents", "schedule"}), needs=frozenset({"own_steps"}), stochastic=True
    )
    picture: ClassVar[Tensor | None] = None
    """[1, 3, h, w]: of which the losses are, where they are not of the pipeline's own."""

    def check(self, target: Target) -> None:
        ensure_flow("flair", target.family, target.pipe.scheduler, schedules=True)

    def run(self, call: RunCall, next: Any) -> Any:
        shared: Asked = call.shared
        result = None
        if self.picture is None:
            result = next(call)
        shared.again = True
        second = next(call)
        call.record(self.collect(call))
        return second if result is None else result

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        return even(call.scheduler, own, torch.linspace(1, 0, len(own.timesteps))) if call.shared.again else own

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        shared: Asked = call.shared
        if shared.again:
            if shared.noise is None:
                shared.noise = unit_noise(call)
                if self.picture is not None:
                    shared.clean = self._clean(call, shared.noise)
            assert shared.clean is not None
            t = levels_of(call).s
            call = call.with_latents(((1 - t) * shared.clean + t * shared.noise).to(call.latents.dtype))
        return next(call)  # type: ignore[no-any-return]

    def _clean(self, call: DenoiseCall, noise: Tensor) -> Tensor:
        """The latents of the given picture, one for each of the call's."""
        assert self.picture is not None
        clean = latents_of(call, self.picture.to(call.latents.device))
        if clean.shape[1:] != noise.shape[1:]:
            raise ConfigError(
                f"plugin 'flair': a picture of {list(self.picture.shape[1:])} has latents of {list(clean.shape[1:])}, and its call makes "
                f"{list(noise.shape[1:])}: give pictures of the size that the call says"
            )
        return clean.expand_as(noise)

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        shared: Asked = call.shared
        if not shared.again:
            shared.clean = out.sample.float()
            return out
        assert shared.clean is not None
        assert shared.noise is not None
        shared.losses.append((call.model_output.float() - (shared.noise - shared.clean)).square().mean())
        if call.step.is_last:
            return StepOutput(shared.clean.to(out.sample.dtype))
        t, shared.noise = levels_next(call).s, call.noise()
        return StepOutput(((1 - t) * shared.clean + t * shared.noise).to(out.sample.dtype))

    def collect(self, call: Any) -> dict[str, Tensor]:
        return {"loss": torch.stack(call.shared.losses)} if call.shared.losses else {}

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        curves = [record.get("loss", torch.zeros(0)) for record in records]  # of a call that was stopped none
        if len({len(curve) for curve in curves}) > 1 or len(curves[0]) < 2:
            raise ConfigError("plugin 'flair': losses are measured at as many t as a call has steps: give all calls the same, 2 at least")
        mean = torch.stack(curves).double().mean(0).float()
        if not bool(mean.isfinite().all()):
            raise ConfigError("plugin 'flair': the model's losses are not finite numbers")
        return {"loss": mean}, {"pictures": len(curves)}


def measured(plugin: Plugin, pipe: Any, pictures: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Artefact:
    """The artefact of real pictures, each with the arguments of a call; see ``measured_on``."""
    records, fits = [], None
    for picture, arguments in pictures:
        calibrator = type("Measure", (Measure,), {"picture": picture[None]})()
        with watching(pipe, plugin, calibrator) as stack:
            pipe(**arguments)
            records.append(stack.report().plugins[calibrator.name].records)
            fits = made_for(plugin, stack)
    if fits is None:
        raise ConfigError("plugin 'flair': the losses are measured on one picture at least; some dozens are worth something")
    return Artefact(fits, *calibrator.summarise(records))
