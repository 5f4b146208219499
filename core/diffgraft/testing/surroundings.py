"""Everything else that users put on a pipeline: schedulers, offload, LoRA, IP-Adapters, ControlNet, other pipelines, copies, compile."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.loading import read_pipeline, unload
from diffgraft.kernel.stack import stack_of
from diffgraft.testing.case import check
from diffgraft.testing.levels import VARIANCE, exactly_gaussian, level
from diffgraft.testing.runs import counting
from diffgraft.testing.setting import ANOTHER, USUAL, Setting, under
from diffgraft.testing.subject import Subject, distance
from diffgraft.testing.tiny import SCHEDULERS, ForeignProcessor, add_lora, attention_layers, denoisers, make_scheduler, quiet


def register(scheduler: str) -> None:
    """The check of one scheduler."""

    @check("kind", when=lambda s: s.supports_scheduler(scheduler), name=f"scheduler_{scheduler}")
    def with_scheduler(s: Subject) -> None:
        """Second-order and multistep schedulers, repeated timesteps (DeepCache: positions 0,1,1,3,3 under Heun; diffusers #5687)."""
        setting = under(scheduler)
        pipe = s.make(setting)
        with counting(denoisers(pipe, s.family)) as work:
            try:
                s.attach(pipe)
                first = s.run(pipe, setting)
            except Unsupported as error:
                s.note(f"refused under {scheduler}: {error}")
                first = None
        if first is None:
            assert work.calls == 0, f"refused under {scheduler} after the denoiser has run; check(target) or run(call) can tell earlier"
            s.expect(s.run(unload(pipe), setting), s.baseline(setting), "after the refusal, against the baseline")
            return
        s.expect(s.run(pipe, setting), first, f"the second run under {scheduler}")
        s.expect_neutral(setting, f"under {scheduler}")


for _name in SCHEDULERS:
    register(_name)


def twice_stepping(s: Subject) -> Setting | None:
    """A scheduler with repeated timesteps, where there is one."""
    found = [name for name in ("Heun", "FlowMatchHeun") if s.supports_scheduler(name)]
    return under(found[0]) if found else None


@check("kind", when=lambda s: twice_stepping(s) is not None)
def repeated_timesteps(s: Subject) -> None:
    """A step's place is not looked up from its timestep: equal ones and ones a rounding unit apart give the same (DeepCache)."""
    repeated = twice_stepping(s)
    assert repeated is not None
    distinct = replace(repeated, distinct=True)
    try:
        one, other = s.fresh(repeated), s.fresh(distinct)
    except Unsupported as error:
        s.note(f"refused: {error}")
        return
    assert one.work == other.work, f"computes {one.work} with repeated timesteps, {other.work} when they differ by a rounding unit"
    plain = distance(s.baseline(repeated), s.baseline(distinct))
    rounds = s.plugin.effects.couples_batch and "weights" in s.plugin.effects.edits  # onto grids: last bits decide roundings
    allowed = 50 * plain + (0.1 if rounds else 1e-3)
    s.expect_near(one.output, other.output, allowed, "repeated timesteps against ones that differ by a rounding unit")


@check("kind")
def scheduler_replaced(s: Subject) -> None:
    """``pipe.scheduler = X.from_config(...)`` after attaching = attaching afterwards (instance patches on the old one are lost)."""
    names = [name for name in SCHEDULERS if s.supports_scheduler(name)]
    name = next((name for name in names if "Euler" in name), names[0] if names else None)
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    if name is None:
        with quiet():
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    else:
        pipe.scheduler = make_scheduler(name, pipe.scheduler)
    new = pipe.scheduler
    try:
        s.expect_fresh(pipe, under(name) if name else USUAL, f"with scheduler {name or 'of the same class'} put in after attaching")
    except Unsupported as error:  # as for a scheduler that is there before
        s.note(f"refused: {error}")
    assert pipe.scheduler is new, "the user's new scheduler is gone after the run"


def seen_by_callbacks(s: Subject) -> bool:
    """Whether callbacks see the latents, and may change them."""
    return "callback_on_step_end" in s.facts.arguments and "latents" in s.facts.callback_inputs


@check("kind", when=seen_by_callbacks)
def latents_edited(s: Subject) -> None:
    """A callback that edits latents in place, and one that gives edited ones back, get the same; a clone that nobody edited is no edit."""
    pipe = s.attach(s.make())

    def run(edit: Callable[[int, torch.Tensor], torch.Tensor], pipe: Any = pipe) -> torch.Tensor:
        return s.run(pipe, callback_on_step_end=lambda pipe, step, t, tensors: {"latents": edit(step, tensors["latents"])})

    def halved(step: int, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 if step == 1 else x

    given, in_place = run(halved), run(lambda step, x: x.mul_(0.5) if step == 1 else x)
    if torch.equal(given, s.fresh().output) and not torch.equal(in_place, given):  # a pipeline that does not heed what is given back: PRX's
        s.expect(run(halved, s.make()), s.baseline(), "edited latents that were given back are lost beside the plugin, and without it")
        return
    s.expect(in_place, given, "latents edited in place, against edited ones that were given back")
    s.expect(run(lambda step, x: x.clone()), s.fresh().output, "clones given back, against the run without a callback")


@check("kind", when=lambda s: seen_by_callbacks(s) and "prompt_embeds" in s.facts.callback_inputs)
def conditioning_edited(s: Subject) -> None:
    """A callback that edits the conditioning in place, and one that gives an edited one back, get the same."""

    def run(edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def at_step(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step != 2:
                return {}
            texts = tensors["prompt_embeds"]  # a list of them where they may differ in length
            return {"prompt_embeds": [edit(x) for x in texts] if isinstance(texts, list) else edit(texts)}

        return s.run(pipe, callback_on_step_end=at_step, callback_on_step_end_tensor_inputs=["prompt_embeds"])

    pipe = s.attach(s.make())
    s.expect(run(lambda x: x.mul_(-1)), run(lambda x: x * -1), "conditioning edited in place, against an edited one that was given back")


@check("kind", when=lambda s: "scheduler" in s.plugin.effects.replaces and s.supports_scheduler("Euler") and seen_by_callbacks(s))
def own_unit(s: Subject) -> None:
    """A scheduler that takes the place of Euler's hands out latents as wide as Euler's: x0 + sigma eps, not a x0 + s eps.

    As wide for their time: it may have another spacing, and so another sigma after its first step. The denoiser is the exact one of a
    Gaussian, so that the width of both kinds of latents is known at any time.
    """
    setting = under("Euler").but(num_inference_steps=8)  # so many that the latents are still mostly noise after the first

    def widths(pipe: Any) -> list[float]:
        found: list[float] = []

        def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            a, noise = level(float(pipe.scheduler.timesteps[min(step + 1, len(pipe.scheduler.timesteps) - 1)]), pipe.scheduler, "epsilon")
            found.append(float(tensors["latents"].std()) / (VARIANCE + (noise / a) ** 2) ** 0.5)
            return {}

        with exactly_gaussian(denoisers(pipe, s.family), s.family, pipe.scheduler):
            s.run(pipe, setting, callback_on_step_end=look)
        return found

    try:
        own, new = widths(s.make(setting)), widths(s.attach(s.make(setting)))
    except Unsupported as error:
        s.note(f"refused: {error}")
        return
    if len(new) < 2:
        s.note("its run has one step, so nobody sees latents between two")
        return
    told = f"after a step a callback sees latents {new[0]:.3g} times as wide as those of their time, under Euler itself {own[0]:.3g}"
    assert 0.4 < new[0] / own[0] < 2.5, told


@check("kind", when=lambda s: s.facts.has_offload)
def offload_before(s: Subject) -> None:
    """CPU offload, then attach: image 2 like image 1 (diffusers E14, E14d, cache-dit C7: patched, then silently not)."""
    pipe = s.make()
    pipe.enable_model_cpu_offload(device="cpu")
    s.attach(pipe)
    s.expect_fresh(pipe, what="image 1")
    s.expect_fresh(pipe, what="image 2")
    s.expect(s.run(unload(pipe)), s.baseline(), "after detaching, against the baseline")


@check("kind", when=lambda s: s.facts.has_offload)
def offload_after(s: Subject) -> None:
    """Attach, then CPU offload: image 2 like image 1 (DeepCache #50, #23)."""
    pipe = s.attach(s.make())
    pipe.enable_model_cpu_offload(device="cpu")
    s.expect_fresh(pipe, what="image 1")
    s.expect_fresh(pipe, what="image 2")
    s.expect(s.run(unload(pipe)), s.baseline(), "after detaching, against the baseline")


@check("kind", when=lambda s: s.facts.has_lora)
def lora_after(s: Subject) -> None:
    """LoRA loaded after attaching = LoRA first, and it shows (DeepCache #46). A plugin that has put its own layers where LoRA goes may
    refuse it, with the way out."""
    lora = Setting(lora=True)
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    add_lora(pipe, s.family)
    try:
        s.expect_fresh(pipe, lora, "with LoRA put on after attaching")
    except Unsupported as error:
        if "weights" not in s.plugin.effects.edits or "LoRA" not in str(error):
            raise
        s.note(f"refused: {error}")
    s.expect_effect(lora, USUAL, "the LoRA")


def processors_kept(s: Subject, setting: Setting, what: str) -> None:
    """Processors that were there stay and are used."""
    pipe = s.make(setting)
    before = [layer.processor for layer in attention_layers(pipe, s.family)]
    s.attach(pipe)
    s.expect_fresh(pipe, setting, f"with {what}")
    after = [layer.processor for layer in attention_layers(pipe, s.family)]
    assert all(a is b for a, b in zip(before, after, strict=True)), f"{what}: other processors are there after the run"
    assert not isinstance(before[0], ForeignProcessor) or any(p.calls for p in before), f"{what}: not called"
    s.expect_effect(setting, USUAL, what)
    s.expect_neutral(setting, f"with {what}")


@check("kind", when=lambda s: s.facts.has_processors)
def foreign_processors(s: Subject) -> None:
    """Attention processors of others are kept and used (diffusers #8872, #9881, #14103: processors overwrite each other)."""
    processors_kept(s, Setting(processors=True), "somebody else's processors")


@check("main", when=lambda s: s.facts.has_ip_adapter and s.supports(Setting(ip_adapter=True)))
def ip_adapter(s: Subject) -> None:
    """IP-Adapter present: its processors are kept and its picture shows (diffusers #8872; tomesd's copied forward has no IP-Adapter)."""
    processors_kept(s, Setting(ip_adapter=True), "an IP-Adapter")


@check("every", when=lambda s: "controlnet_conditioning_scale" in s.facts.arguments and "controlnet" in s.facts.components)
def controlnet(s: Subject) -> None:
    """ControlNet residuals arrive (DeepCache #4, #21; cache-dit #482: control lost when caching)."""
    s.expect_effect(USUAL, USUAL.but(controlnet_conditioning_scale=0.0), "the ControlNet")


@check("kind")
def two_pipelines(s: Subject) -> None:
    """Two pipelines of one class: a plain one stays plain, also inside the other's run; detaching one leaves the other (cache-dit C2)."""
    plain, one, two = s.make(), s.attach(s.make()), s.attach(s.make())
    inside: list[torch.Tensor] = []
    extra: dict[str, Any] = {}
    if "callback_on_step_end" in s.facts.arguments:

        def at_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                inside.append(s.run(plain))
            return tensors

        extra["callback_on_step_end"] = at_step
    s.expect(s.run(one, **extra), s.fresh().output, "the run with a plain pipeline's run inside it")
    for output in (*inside, s.run(plain)):
        s.expect(output, s.baseline(), "the plain pipeline beside it")
    unload(one)
    s.expect_fresh(two, what="the other one, after detaching the first")
    s.expect(s.run(one), s.baseline(), "the detached one, while the other is attached")


@check("kind", when=lambda s: s.facts.has_from_pipe)
def from_pipe(s: Subject) -> None:
    """``from_pipe`` shares the denoiser, not the plugins (diffusers E9, nunchaku #437)."""
    plain = s.make()
    try:
        with quiet():
            expected = s.run(type(plain).from_pipe(plain))  # some pipelines lose there what was set on them
    except ValueError as error:
        s.note(f"a plain one from a pipe does not run: {error}")
        return
    pipe = s.attach(s.make())
    base = type(pipe).__mro__[1]
    with quiet():
        other = base.from_pipe(pipe)  # type: ignore[attr-defined]
    assert type(other) is base, f"from_pipe gave a {type(other)!r}"
    assert denoisers(other, s.family)[0] is denoisers(pipe, s.family)[0], "from_pipe did not share the denoiser"
    if "modules" in s.plugin.points():  # exchanged modules lie in the denoiser that both share, until the plugin is taken off
        s.expect_fresh(pipe, what="the first")
        unload(pipe)
        s.expect(s.run(other), expected, "the plain one after detaching from the first")
        return
    s.expect(s.run(other), expected, "the plain one before a run of the first")
    s.expect_fresh(pipe, what="the first")
    s.expect(s.run(other), expected, "the plain one after a run of the first")


@check("kind")
def save_reload(s: Subject) -> None:
    """Saved: a plain diffusers folder (a foreign class name in it would break loading); reloaded with the plugin it gives the same."""
    plain, pipe = s.make(), s.attach(s.make())
    s.run(plain)
    s.run(pipe)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as reference, quiet():
        pipe.save_pretrained(folder)
        plain.save_pretrained(reference)
        saved, wanted = files(folder), files(reference)
        changed = sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name))
        assert not changed, f"saves other files than the plain pipeline: {changed}"
        try:
            alone = s.run(read_pipeline(reference))  # not always the baseline: not everything is in the files
        except (ValueError, OSError) as error:
            s.note(f"the same files; a plain one that is loaded again does not run: {error}")
            return
        loaded = read_pipeline(folder)
        assert type(loaded) is type(plain), f"reloaded as {type(loaded)!r}"
        first = s.run(s.attach(loaded))
        assert s.report(loaded).fired == s.fresh().report.fired, f"reloaded it fired {s.report(loaded).fired}"
        s.expect(s.run(loaded), first, "reloaded, the second run")
        s.expect(s.run(unload(loaded)), alone, "reloaded and detached, against plain")


def files(folder: str) -> dict[str, bytes]:
    """All files of a folder by relative path, without its own name: a modular pipeline's index says where the parts are. And without how a
    tokenizer was last called, which its file tells: a run with another word asks a copy of it."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes().replace(folder.encode(), b"") for path in paths}
    for name in [name for name in found if name.endswith("tokenizer.json")]:
        told = json.loads(found[name])
        found[name] = json.dumps({key: value for key, value in told.items() if key not in ("padding", "truncation")}).encode()
    return found


@check("kind")
def deepcopy(s: Subject) -> None:
    """A deepcopy has plugins of its own; what happens to it does not happen to the original."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    twin = copy.deepcopy(pipe)
    assert twin.plugins is not pipe.plugins, "the copy shares the original's plugins"
    assert twin.plugins[s.plugin.name] is not pipe.plugins[s.plugin.name], "the copy shares the original's plugin object"
    s.expect_fresh(twin, what="the copy")
    unload(twin)
    s.expect(s.run(twin), s.baseline(), "the detached copy, against the baseline")
    s.expect_fresh(pipe, what="the original, after detaching the copy")


@check("kind")
def pickling(s: Subject) -> None:
    """A pickle holds the plain pipeline; which plugins the reader has installed is not the writer's to say."""
    plain, pipe = s.make(), s.attach(s.make())
    s.run(plain)
    if can_pickle(plain):  # transformers puts hooks on some text encoders in their first call that cannot be pickled
        s.run(pipe)
    loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is type(plain), f"unpickled as {type(loaded)!r}"
    assert stack_of(loaded) is None, "the unpickled pipeline has plugins"
    s.expect(s.run(loaded), s.baseline(), "the unpickled one, against the baseline")


def can_pickle(pipe: Any) -> bool:
    """Whether a plain pipeline can be pickled."""
    try:
        pickle.dumps(pipe)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True
