"""Plugins with planted defects that show when something outside has a say: a callback, another scheduler or model, weights, a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffgraft import Calibrator, Effects, Need, Paper, PluginConfig, Unsupported
from diffgraft.methods.adapters import weighted
from diffgraft.methods.layouts import Layout
from diffgraft.methods.schema import Holds, Values
from diffusers import DDIMScheduler
from mutants import Kept, Reuse, Scaled
from pydantic import Field


def own_copy(memory: Kept, given: Any) -> Any:
    """The copy of ``given`` that was made when this very tensor came first."""
    if memory.result is None or memory.result[0] is not given:
        memory.result = given, given.clone()
    return memory.result[1]


class KeepsTheLatents(Scaled):
    """Goes on from its own copy of what it gave, when the same tensor comes back: what a callback wrote into it is lost."""

    State = Kept

    def step(self, call, next):
        kept = call.shared.result
        out = next(call.replace(sample=own_copy(call.shared, call.sample)) if kept is not None else call)
        own_copy(call.shared, out.sample)
        return out


class KeepsTheConditioning(Scaled):
    """Prepares the conditioning once for each tensor that comes: what a callback writes into it is lost."""

    State = Kept

    def denoise(self, call, next):
        given = call.get("encoder_hidden_states")
        return super().denoise(call if given is None else call.replace(encoder_hidden_states=own_copy(call.state, given)), next)


class HoldsTheScheduler(Scaled):
    """Reads the scheduler of its first check; the core checks again when there is another one."""

    scheduler_then: Any = None

    def check(self, target):
        self.scheduler_then = self.scheduler_then or target.pipe.scheduler

    def factor(self, call):
        return 1.0 + float(self.scheduler_then.timesteps[call.step.index % len(self.scheduler_then.timesteps)]) / 1e5


class CopiesTheDenoiser(Scaled):
    """Runs a copy of the denoiser made at its first check; the core checks again when there are other weights."""

    twin: Any = None

    def check(self, target):
        self.twin = self.twin or copy.deepcopy(next(iter(target.denoisers.values())))

    def denoise(self, call, next):
        x = self.twin(*call.args, **call.kwargs)[0]
        return x if call.config.interval == 1 else x * 1.01


class LoudDDIM(DDIMScheduler):
    """Passes for a scheduler of Euler's kind by the size of the noise that it starts from, so nothing translates for it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_noise_sigma = 1.001


class SpeaksItsOwnUnit(Scaled):
    """Its scheduler hands out variance-preserving latents, whatever the pipeline's own does."""

    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")
    effects = Effects(replaces=frozenset({"scheduler"}))
    scheduler = LoudDDIM

    def make_scheduler(self, old, family):
        return None if self.config.interval == 1 else LoudDDIM(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)


class FileKnobs(PluginConfig):
    interval: int = Field(1, ge=1, description="compute every so many steps, N")
    artefact: Any = Field(None, description="calibration file")


class Meter(Calibrator):
    """The mean square of every prediction."""

    name = "meter"
    paper = Paper("a probe", "0000.00000", "mean squares")
    Config = FileKnobs
    State = Kept

    def denoise(self, call, next):
        out = next(call)
        call.shared.result = [*(call.shared.result or []), out.square().mean()]
        return out

    def collect(self, call):
        return {"power": torch.stack(call.shared.result)}

    def summarise(self, records):
        return {"gain": torch.stack([record["power"] for record in records]).mean(0)}, {}


class TrustsTheFile(Scaled):
    """Says of its file that anything may be in it."""

    Config = FileKnobs
    needs = (Need("artefact", "artefact", holds=Holds({"gain": Values((...,), infinite=True)})),)
    calibration = Meter


class WeightKnobs(FileKnobs):
    weights: Any = Field(None, description="published weights")


class TakesAnyWeights(Scaled):
    """Ignores whatever it does not know in a published file."""

    Config = WeightKnobs
    needs = (Need("weights", "weights", holds=Layout({"a.weight": ("d",), "b.weight": ("d",)}, ignored=("*",), small={"d": 2})),)


class LoraKnobs(PluginConfig):
    lora: Path | dict[str, Path] | None = Field(None, description="a LoRA file, or one for each denoiser")


class Wears(Scaled):
    """Correct: shows its own LoRA in every second step."""

    name = "wears"
    Config = LoraKnobs
    neutral: ClassVar[dict[str, Any]] = {"lora": None}
    active: ClassVar[dict[str, Any]] = {}
    needs = (Need("adapter", "lora"),)

    def denoise(self, call, next):
        adapter = call.given("lora")
        if adapter is None or call.step.index % 2 == 1:
            return next(call)
        with weighted(call.model, {adapter.name: 1.0}):
            return next(call)


class NeedsTheLoop(Scaled):
    """Says that it works in a session, and sets in ``run`` what it scales by."""

    State = Kept
    sessions = True

    def run(self, call, next):
        call.shared.result = 1.5
        return next(call)

    def factor(self, call):
        return call.shared.result or 1.0


class RefusesWithoutSaying(Scaled):
    """Refuses a pipeline class at any settings, which nobody can know before the call."""

    def check(self, target):
        raise Unsupported(f"{self.name} does not work on this pipeline, for no reason that was declared")


class DecidesTogether(Reuse):
    """Correct: reuses where what comes in has hardly changed, as the first of all ranks sees it."""

    active: ClassVar[dict[str, Any]] = {"interval": 3}

    def due(self, call) -> bool:
        memory, x = self.memory(call), call["hidden_states"]
        last, memory.input = getattr(memory, "input", None), x
        if call.config.interval == 1 or last is None:
            return True
        return self.decided(call, bool((x - last).abs().mean() > 0.1 * call.config.interval * last.abs().mean()))

    def decided(self, call, computes: bool) -> bool:
        return call.agree(computes)


class DecidesAlone(DecidesTogether):
    """Each rank by its own tokens."""

    def decided(self, call, computes: bool) -> bool:
        return computes


class TakesOneKind(Reuse):
    """Correct: its hook for attention layers is for models of another kind, where it takes no blocks."""

    def select_attention(self, layers):
        return []

    def attention(self, call, next):
        return next(call)


class TakesNeither(TakesOneKind):
    """Takes no attention layers either where it takes no blocks."""

    def select_blocks(self, blocks):
        return []


class TakesWhatNeverRuns(TakesOneKind):
    """Answers for the one block whose attention layers it takes."""

    def select_attention(self, layers):
        return layers[-1:]

    def due(self, call):
        self.memory(call).result = call[call.info.stream]
        return False
