"""What a check works with: one plugin on one tiny pipeline, run under a :class:`Setting` and compared.

Baselines and reference outputs are kept for the process, keyed by what determines them, so that a check pays only for the history it makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.anatomy import attention_of, blocks_of, denoisers_of
from diffgraft.installed.errors import ConfigError
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.verdict import IDLE
from diffgraft.stacks.report import PluginReport
from diffgraft.testing.runs import adapter, artefacts, call, counting, has_plugin, measured, partner, plain, stranger, works
from diffgraft.testing.setting import USUAL, Outcome, Setting, under
from diffgraft.testing.tiny import Facts, as_run, denoisers, facts, prepared, tiny


@dataclass
class Subject:
    """One plugin on one pipeline class of one family."""

    plugin: type[Plugin]
    family: Family
    class_name: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.family = as_run(self.family, self.class_name)

    # facts ------------------------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        return facts(self.family, self.class_name)

    @property
    def is_main(self) -> bool:
        """Whether this is the family's first pipeline class, which gets every check."""
        return self.class_name.partition("@")[0] == self.family.pipelines[0] or "@" in self.class_name

    @property
    def couples(self) -> bool:
        """Whether the plugin declares that a sample's picture may depend on the rest of the batch."""
        return self.plugin.effects.couples_batch or self.plugin.effects.stochastic

    @property
    def has_guidance(self) -> bool:
        """Whether the family has guidance that can be off."""
        return self.family.guidance.layout != "none"

    @property
    def unguided(self) -> Setting:
        """A call without guidance."""
        return USUAL.but(**{self.family.guidance.scale: self.family.guidance.off})

    @property
    def keeps_branches(self) -> bool:
        """Whether one branch may not influence the other but through the pipeline's own formula. A choice of noises may rest on all."""
        effects = self.plugin.effects
        chooses = "noise" in effects.replaces and "extra_forwards" in effects.needs
        return not (self.couples or chooses or "guide" in self.plugin.points() or "branches" in effects.skips)

    @property
    def stays(self) -> bool:
        """Whether something of the plugin lies in the denoiser between runs: modules that it exchanges, a LoRA that it brings."""
        return "modules" in self.plugin.points() or any(need.kind == "adapter" for need in self.plugin.needs)

    @property
    def left_alone(self) -> set[str]:
        """Of the points "block" and "attention" the one for which the plugin takes nothing of this model, while it does for the other:
        which parts a method needs may depend on the model."""
        if not {"block", "attention"} <= set(self.instance(**self.plugin.active).points()):
            return set()
        plugin = self.attach(pipe := self.make()).plugins[self.plugin.name]
        models = denoisers_of(pipe, self.family)
        taken = {"block": plugin.select_blocks(blocks_of(self.family, models)), "attention": plugin.select_attention(attention_of(models))}
        return {point for point, parts in taken.items() if not parts} if any(taken.values()) else set()

    @property
    def several_a_prompt(self) -> Setting:
        """Two outputs a prompt; an argument that no pipeline has where this one offers none."""
        offered = [name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in self.facts.arguments]
        return USUAL.but(**{(*offered, "not_offered")[0]: 2})

    def note(self, text: str) -> None:
        """Put something into the case's record."""
        self.notes.append(text)

    # making and running -----------------------------------------------------------------------------------------------------------

    def make(self, setting: Setting = USUAL) -> Any:
        """A fresh plain pipeline, prepared as ``setting`` says."""
        return prepared(tiny(self.family, self.class_name).pipe, self.family, setting)

    def attach(self, pipe: Any, **knobs: Any) -> Any:
        """Put the plugin on ``pipe``, with the settings at which it shows (and ``knobs``)."""
        return load_pipeline(pipe, plugins=[self.instance(**{**self.plugin.active, **knobs})])

    def instance(self, **knobs: Any) -> Plugin:
        """The plugin with these knobs, and a second pipeline or a LoRA in every knob that wants one."""
        for need in self.plugin.needs:
            if need.knob in knobs:
                continue
            if need.kind == "pipeline":
                knobs[need.knob] = stranger(need.families) if need.families else partner(self.family, self.class_name)
            elif need.kind == "adapter" and self.plugin.claims(self.family):
                knobs[need.knob] = adapter(self.family, self.class_name)
            elif need.kind == "problem" and self.plugin.claims(self.family):
                knobs[need.knob] = measured(self.family, self.class_name, USUAL)
        return self.plugin(**knobs)

    def seconds(self, pipe: Any) -> list[Any]:
        """The second pipelines of this family that the plugin on ``pipe`` was given."""
        knobs = pipe.plugins[self.plugin.name].config
        return [getattr(knobs, need.knob) for need in self.plugin.needs if need.kind == "pipeline" and not need.families]

    def run(self, pipe: Any, setting: Setting = USUAL, **extra: Any) -> Tensor:
        """One call; the latents (or pixels) that come out. A plugin with an artefact or a problem gets the one for this setting, as a user
        gives it."""
        if has_plugin(pipe, self.plugin) and (knobs := artefacts(self.plugin, self.family, self.class_name, setting)):
            config = pipe.plugins[self.plugin.name].config
            off = {need.knob for need in self.plugin.needs if need.kind == "problem" and getattr(config, need.knob) is None}
            pipe.plugins.configure(self.plugin.name, **{knob: value for knob, value in knobs.items() if knob not in off})
        return call(pipe, self.family, self.class_name, setting, **extra)

    def baseline(self, setting: Setting = USUAL) -> Tensor:
        """What the plain pipeline gives."""
        return plain(self.family, self.class_name, setting)

    def supports(self, setting: Setting) -> bool:
        """Whether plain diffusers can do it: what it cannot is not asked of a plugin."""
        if setting.scheduler is None:
            short = 2 if setting.cut is None else 3  # a pipeline that a cut leaves with rows too many may fail only in the step after it
            setting = replace(setting.but(num_inference_steps=short), cut=None if setting.cut is None else 0)
        return works(self.family, self.class_name, setting)

    def supports_scheduler(self, name: str) -> bool:
        """Whether plain diffusers runs this pipeline under that scheduler."""
        return self.supports(under(name))

    def fresh(self, setting: Setting = USUAL) -> Outcome:
        """What a fresh pipeline with a fresh plugin gives in its first run: the reference for every other history."""
        return reference(self.plugin, self.family, self.class_name, setting)

    @property
    def other_size(self) -> Setting | None:
        """Another size of the picture, where the call sets it."""
        kwargs = self.facts.kwargs
        if not isinstance(kwargs.get("width"), int):
            return None
        height, width = int(kwargs["height"]), int(kwargs["width"])
        sizes = [{"height": height, "width": width // 2}, {"height": height, "width": 2 * width}]
        for size in reversed(sizes) if "resolution" in self.plugin.effects.edits else sizes:  # stages are smaller still
            setting = USUAL.but(**size, **({"max_area": size["height"] * size["width"]} if "max_area" in kwargs else {}))
            if self.supports(setting):
                return setting
        return None

    def work_of_baseline(self) -> int:
        """Elements that the denoiser's layers get without the plugin."""
        pipe = self.make()
        with counting(denoisers(pipe, self.family)) as work:
            self.run(pipe)
        return work.size

    @staticmethod
    def excuses(report: PluginReport) -> list[str]:
        """The plugin's own notes that say why it was inactive: the core's, that nothing was saved, excuses nothing."""
        return [note for note in report.notes if "inactive" in note and not note.startswith(IDLE)]

    def report(self, pipe: Any) -> PluginReport:
        found: PluginReport = pipe.plugins.report().plugins[self.plugin.name]
        return found

    def neutral_settings(self) -> list[dict[str, Any]]:
        """The neutral settings alone, and on top of the active ones where the two go together."""
        neutral = self.plugin.neutral
        settings = [dict(neutral)]
        merged = {**self.plugin.active, **neutral}
        if merged != neutral and valid(self.plugin, merged):
            settings.append(merged)
        return settings

    # comparing --------------------------------------------------------------------------------------------------------------------

    def expect(self, output: Tensor, wanted: Tensor, what: str) -> None:
        """Bit for bit."""
        assert output.shape == wanted.shape, f"{what}: shape {tuple(output.shape)}, expected {tuple(wanted.shape)}"
        if not torch.equal(output, wanted):
            raise AssertionError(f"{what}: not equal, largest difference {distance(output, wanted):.3g}")

    def expect_near(self, output: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
        """Up to ``tolerance``: batched matrix products differ in the last bits."""
        assert output.shape == wanted.shape, f"{what}: shape {tuple(output.shape)}, expected {tuple(wanted.shape)}"
        if not distance(output, wanted) <= tolerance:
            raise AssertionError(f"{what}: differs by {distance(output, wanted):.3g}, allowed {tolerance:.3g}")

    def expect_neutral(self, setting: Setting, what: str) -> None:
        """At neutral settings it is the baseline here too."""
        pipe = load_pipeline(self.make(setting), plugins=[self.instance(**self.plugin.neutral)])
        self.expect(self.run(pipe, setting), self.baseline(setting), f"neutral, {what}, against the baseline")

    def expect_effect(self, setting: Setting, base: Setting, what: str) -> None:
        """What ``setting`` changes on the plain pipeline, it changes with the plugin too."""
        alone = distance(self.baseline(setting), self.baseline(base))
        together = distance(self.fresh(setting).output, self.fresh(base).output)
        share = 0.0 if "denoiser" in self.plugin.effects.replaces else 0.05  # another denoiser, which does not have it, ran some steps
        if any(need.kind == "problem" for need in self.plugin.needs):  # the measurement decides most
            share = 0.01
        assert together > share * alone, f"{what} changes the plain output by {alone:.3g}, with the plugin by {together:.3g}"

    def expect_fresh(self, pipe: Any, setting: Setting = USUAL, what: str = "this run") -> None:
        """The next run of ``pipe`` equals that of a fresh pipeline, and the plugin did as much in it."""
        wanted = self.fresh(setting)
        self.expect(self.run(pipe, setting), wanted.output, f"{what} against a fresh pipeline's")
        fired = self.report(pipe).fired
        assert fired == wanted.report.fired, f"{what}: fired {fired}, on a fresh pipeline {wanted.report.fired}"


@contextlib.contextmanager
def refused(kind: type[BaseException], otherwise: str, names: Iterable[str] = ()) -> Iterator[None]:
    """What is inside must raise ``kind`` with all ``names`` in its text; ``otherwise`` says what happened instead."""
    try:
        yield
    except kind as error:
        missing = [name for name in names if name not in str(error)]
        if missing:
            raise AssertionError(f"the {kind.__name__} does not name {', '.join(missing)}: {error}") from error
    else:
        raise AssertionError(otherwise)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


def rounding(plain: float, outputs: Tensor) -> float:
    """How far apart two ways of computing ``outputs`` may be, where without the plugin they are ``plain`` apart: the last bits of matrix
    products, which of latents in the hundreds are more."""
    return max(1e-4, 10 * plain, 1e-6 * float(outputs.abs().max()))


def valid(plugin: type[Plugin], knobs: Mapping[str, Any]) -> bool:
    """Whether these knobs go together."""
    try:
        plugin(**knobs)
    except ConfigError:
        return False
    return True


_references: dict[tuple[Any, ...], Outcome] = {}


def reference(plugin: type[Plugin], family: Family, class_name: str, setting: Setting) -> Outcome:
    """First run of a fresh plugin on a fresh pipeline."""
    key = (plugin, family, class_name, setting)
    if key not in _references:
        subject = Subject(plugin, family, class_name)
        pipe = subject.attach(subject.make(setting))
        with counting(denoisers(pipe, family)) as work:
            output = subject.run(pipe, setting)
        _references[key] = Outcome(output, subject.report(pipe), work.size, work.calls)
    return _references[key]
