"""Plugins with planted defects, one each, and two correct ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import Effects, Paper, Plugin, PluginConfig, StepOutput
from pydantic import ConfigDict, Field


class Knobs(PluginConfig):
    interval: int = Field(1, ge=1, description="compute every so many steps, N")


@dataclass
class Kept:
    result: Any = None


class Reuse(Plugin):
    """Correct: reuses the last block's output, computed every ``interval`` steps."""

    name = "reuse"
    paper = Paper("a probe", "0000.00000", "one block reused")
    families: ClassVar[tuple[str, ...]] = ("*",)
    Config = Knobs
    State = Kept
    neutral: ClassVar[dict[str, Any]] = {"interval": 1}
    active: ClassVar[dict[str, Any]] = {"interval": 2}
    effects = Effects(skips=frozenset({"blocks"}))

    def select_blocks(self, blocks):
        return [block for block in blocks if not block.is_layer][-1:]

    def memory(self, call):
        return call.state

    def due(self, call) -> bool:
        return call.step.index % call.config.interval == 0 or self.memory(call).result is None

    def block(self, call, next):
        memory = self.memory(call)
        if self.due(call):
            memory.result = next(call)
        else:
            call.count("skipped")
        return memory.result


class PlansInCalls(Reuse):
    """Plans in ``scheduler.step`` calls, of which Heun and PLMS need more than one a step."""

    def due(self, call) -> bool:
        return call.step.call % call.config.interval == 0 or self.memory(call).result is None


class Scaled(Plugin):
    """Correct: scales each prediction a little. The base of mutants that need no cache."""

    name = "scaled"
    paper = Paper("a probe", "0000.00000", "predictions scaled")
    families: ClassVar[tuple[str, ...]] = ("*",)
    Config = Knobs
    neutral: ClassVar[dict[str, Any]] = {"interval": 1}
    active: ClassVar[dict[str, Any]] = {"interval": 2}
    effects = Effects(edits=frozenset({"prediction"}))

    def factor(self, call) -> float:
        return 1.0 if call.config.interval == 1 else 1.01

    def denoise(self, call, next):
        x = next(call)
        return x if call.config.interval == 1 else x * self.factor(call)


class KeepsOnItself(Reuse):
    """The last run's block output serves the next run's first step."""

    def __init__(self, **knobs):
        super().__init__(**knobs)
        self.kept = Kept()

    def memory(self, call):
        return self.kept

    def due(self, call):
        return self.kept.result is None or (call.step.index > 0 and super().due(call))


class ResetsAtTheEnd(KeepsOnItself):
    """Clears its memory in the last step: a run that does not get there leaves it."""

    def block(self, call, next):
        result = super().block(call, next)
        if call.step.is_last and call.branch != "cond":
            self.kept = Kept()
        return result


class MixesBranches(Reuse):
    """One memory for all branches."""

    def memory(self, call):
        return call.shared


class CountsCalls(Reuse):
    """Tells steps apart by counting calls, as if there were one a step for ever."""

    calls = 0

    def due(self, call):
        self.calls += 1
        return self.calls % 3 == 1 or super().due(call)


class FirstRun(Scaled):
    """Remembers something of its first run for good."""

    seen: Any = None

    def what(self, call) -> Any:
        raise NotImplementedError

    def factor(self, call):
        if self.seen is None:
            self.seen = self.what(call)
        return 1.01 + 0.01 * self.seen


class RemembersTotal(FirstRun):
    def what(self, call):
        return call.step.total


class RemembersStart(FirstRun):
    def what(self, call):
        return float(call.step.t) / 1000


class RemembersBranches(FirstRun):
    def what(self, call):
        return len(call.branches)


class RemembersBatch(FirstRun):
    def what(self, call):
        return call.sample.shape[0]


class KeepsAMask(Scaled):
    """A tensor of the first run's shape, for ever."""

    mask: Any = None

    def denoise(self, call, next):
        x = next(call)
        if self.mask is None:
            self.mask = torch.full_like(x, 1.01)
        return x if call.config.interval == 1 else x * self.mask


class MixesBatchedBranches(Reuse):
    """One memory: after guidance is cut it holds twice the rows."""

    def memory(self, call):
        return call.shared

    def due(self, call):
        return call.step.index < 2


HELD: list[Any] = []


class HoldsTensors(Scaled):
    def denoise(self, call, next):
        HELD.append(super().denoise(call, next))
        return HELD[-1]


class LeavesForward(Scaled):
    def denoise(self, call, next):
        child = next(iter(call.model.children()))
        child.forward = child.forward
        return super().denoise(call, next)


class PatchesTheDenoiser(Scaled):
    """Puts its own wrapper on the denoiser, once, instead of the core's hook."""

    done = False

    def denoise(self, call, next):
        if not self.done and call.config.interval > 1:
            self.done = True
            original = call.model.forward

            def patched(*args, **kwargs):
                result = original(*args, **kwargs)
                return (result[0] * 1.01,) if isinstance(result, tuple) else type(result)(sample=result.sample * 1.01)

            call.model.forward = patched
        return next(call)


class PatchesAClass(Scaled):
    """Scales by a patch of the denoiser's class."""

    undo: ClassVar[list[Any]] = []

    def denoise(self, call, next):
        cls = type(call.model)
        if not self.undo and call.config.interval > 1:
            original = cls.forward
            self.undo.append(lambda: setattr(cls, "forward", original))

            def patched(module, *args, **kwargs):
                return (original(module, *args, **{**kwargs, "return_dict": False})[0] * 1.01,)

            cls.forward = patched
        return super().denoise(call, next)


class OwnProcessor:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class ReplacesProcessors(Scaled):
    def denoise(self, call, next):
        for module in call.model.modules():
            if hasattr(module, "processor") and not isinstance(module.processor, OwnProcessor):
                module.processor = OwnProcessor(module.processor)
        return super().denoise(call, next)


class IgnoresProcessors(Scaled):
    """Computes attention with a processor of its own instead of calling ``next``."""

    def attention(self, call, next):
        from diffusers.models.attention_processor import AttnProcessor2_0

        return AttnProcessor2_0()(*call.args, **{k: v for k, v in call.kwargs.items() if k not in ("ip_hidden_states", "ip_adapter_masks")})


class WritesConfig(Scaled):
    def denoise(self, call, next):
        call.pipe.register_to_config(diffgraft_plugin="scaled")
        return super().denoise(call, next)


class LeavesALambda(Scaled):
    def denoise(self, call, next):
        call.pipe.__dict__["hint"] = lambda: call.config
        return super().denoise(call, next)


class NotNeutral(Scaled):
    def factor(self, call):
        return 1.01

    def step(self, call, next):
        out = next(call)
        return StepOutput(out.sample * 1.000001, out.x0)


class OwnRandom(Scaled):
    def denoise(self, call, next):
        x = super().denoise(call, next)
        return x if call.config.interval == 1 else x + 1e-3 * torch.randn_like(x)


class WritesInPlace(Scaled):
    def denoise(self, call, next):
        if call.config.interval > 1:
            call.sample.mul_(1.001)
        return super().denoise(call, next)


class CouplesTheBatch(Scaled):
    def denoise(self, call, next):
        x = super().denoise(call, next)
        return x if call.config.interval == 1 else x + 0.1 * x.mean(dim=0, keepdim=True)


class SwallowsExceptions(Scaled):
    def denoise(self, call, next):
        try:
            return super().denoise(call, next)
        except BaseException:
            return torch.zeros_like(call.sample)[:, :4]


class NeverFires(Reuse):
    def select_blocks(self, blocks):
        return []


class NeverChanges(Scaled):
    def factor(self, call):
        return 1.0


class SaysItOnlyLooks(Scaled):
    effects = Effects(needs=frozenset({"extra_forwards"}))


class NeverSkips(Reuse):
    """Computes every block and then uses the old one."""

    def block(self, call, next):
        next(call)
        return super().block(call, next)


class LooksUpTimesteps(Reuse):
    def due(self, call):
        index = int((call.pipe.scheduler.timesteps == call.step.t).nonzero()[0])
        return index % call.config.interval == 0 or call.state.result is None


class NeedsIntegerTimesteps(Scaled):
    def factor(self, call):
        return 1.0 + 0.01 * float(call.pipe.scheduler.alphas_cumprod[call.step.t])


class AssumesHalves(Scaled):
    """Takes every denoiser call for one of both guidance halves."""

    def denoise(self, call, next):
        uncond, cond = super().denoise(call, next).chunk(2)
        return torch.cat([uncond, cond])


class GoesOn(Scaled):
    """Asks the denoiser once more after the pipeline has run, whatever the user said."""

    State = Kept

    def denoise(self, call, next):
        call.shared.result = call
        return super().denoise(call, next)

    def run(self, call, next):
        out = next(call)
        last = call.shared.result
        last.model(*last.args, **last.kwargs)
        return out


class DropsResiduals(Scaled):
    def denoise(self, call, next):
        return super().denoise(call.replace(down_block_additional_residuals=None, mid_block_additional_residual=None), next)


class OneForAll(Scaled):
    """A singleton."""

    only: ClassVar[Any] = None

    def __new__(cls, **knobs):
        if cls.only is None:
            cls.only = super().__new__(cls)
        return cls.only


class NamesItself(Scaled):
    """A new name for every object: the core cannot see that it is there already."""

    made = 0

    def __init__(self, **knobs):
        super().__init__(**knobs)
        type(self).made += 1
        if self.made > 1:
            self.name = f"scaled_{self.made}"


class StaysActive(Scaled):
    """Once active, active for ever."""

    was_active: ClassVar[bool] = False

    def denoise(self, call, next):
        type(self).was_active |= call.config.interval > 1
        x = next(call)
        return x * 1.01 if self.was_active else x


class KnowsTheClass(Scaled):
    """Asks for the model's class by name, which compiling changes."""

    def factor(self, call):
        return 1.5 if type(call.model).__name__ == "OptimizedModule" else 1.01


class Lenient(PluginConfig):
    model_config = ConfigDict(extra="ignore")
    interval: int = Field(1, ge=1, description="compute every so many steps, N")


class AcceptsAnyKnob(Scaled):
    Config = Lenient


class Undescribed(PluginConfig):
    interval: int = 1


class TunesTheImpossible(Scaled):
    tune: ClassVar[dict[str, Any]] = {"interval": (2, 0)}


class DescribesNothing(Scaled):
    Config = Undescribed


class AcceptsAnyFamily(Scaled):
    families = ("flux",)

    def __init__(self, **knobs):
        super().__init__(**knobs)
        self.families = ("*",)
