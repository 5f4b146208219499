"""What a plugin is on its own: declared, neutral, reproducible, firing, removable, refusing."""

from __future__ import annotations

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, Conflict, DiffgraftError, Unsupported
from diffgraft.kernel.loading import load_pipeline, unload
from diffgraft.testing.case import check
from diffgraft.testing.setting import ANOTHER, USUAL
from diffgraft.testing.subject import Subject, distance, refused, valid
from diffgraft.testing.trace import Trace, changed, expect_same_trace, live_tensors, only_new_objects, trace
from diffgraft.testing.watch import watchers


@check("plugin")
def declared(s: Subject) -> None:
    """The class declares what the planner, the CLI and these checks read, consistently (peers: such facts live in prose)."""
    plugin = s.plugin
    registry.check_class(plugin, f"plugin {plugin.name!r}")
    known = {word for family in registry.families().values() for word in (family.name, f"{family.kind}s")}
    unknown = {*plugin.families, *(word for need in plugin.needs for word in need.families)} - known - {"*"}
    assert not unknown, f"families: {sorted(unknown)} are no families; known: {sorted(known)}"
    assert plugin.paper.title, "paper: the title is missing"
    assert plugin.paper.implemented, "paper: it must say what is implemented"
    plugin()
    plugin(**plugin.neutral)
    plugin(**plugin.active)
    for key, field in plugin.Config.model_fields.items():
        assert field.description, f"knob {key!r} has no description"
    for key, values in plugin.tune.items():
        assert values, f"tune: no value for {key!r}"
        for value in values:
            assert valid(plugin, {key: value}), f"tune: {key} = {value!r} is refused by Config"


@check("plugin")
def bad_knob(s: Subject) -> None:
    """Bad knob refused with the key in the text (MagCache set for 28 steps says nothing at 40: E17)."""
    for key, value in [("no_such_knob", 1), *((key, object()) for key in s.plugin.Config.model_fields)]:
        with refused(ConfigError, f"knob {key!r} = {value!r} was accepted", [key]):
            s.plugin(**{**s.plugin.active, key: value})


@check("foreign")
def wrong_family(s: Subject) -> None:
    """Refused with a reason on a wrong family, the pipeline untouched (cache-dit and TeaCache fail later, with a shape error)."""
    pipe = s.make()
    base = type(pipe)
    before = trace(pipe, base)
    with refused(Unsupported, f"accepted {base.__name__}, a family that it does not claim", [s.plugin.name, base.__name__]):
        s.attach(pipe)
    assert type(pipe) is base, "refused, but the pipeline's class has changed"
    expect_same_trace(before, trace(pipe, base), "after the refusal")


@check("every", when=lambda s: "@" not in s.class_name)  # what is of one checkpoint is no matter of the class
def refuses_what_it_says(s: Subject) -> None:
    """A pipeline class that ``not_on`` names is refused when the plugin is put on; one that no settings work on is named there."""
    why = s.plugin.why_not_on(s.class_name)
    if why is not None:
        with refused(Unsupported, f"accepted {s.class_name}, which not_on names", [s.plugin.name, why]):
            s.attach(s.make())
        return
    for knobs in (s.plugin.active, {}):
        try:
            load_pipeline(s.make(), plugins=[s.instance(**knobs)])
        except Unsupported as error:
            if any(need.kind == "adapter" for need in s.plugin.needs) and not hasattr(s.make(), "load_lora_weights"):
                return  # what no LoRA goes on is known of the class
            found = error
        except DiffgraftError:  # it wants a knob, or a file
            return
        else:
            return
    raise AssertionError(f"it refuses {s.class_name} at any settings, but not_on does not name it: {found}")


@check("every")
def neutral(s: Subject) -> None:
    """Neutral = baseline bit for bit, at the neutral settings alone and over the active ones (vLLM-Omni #6975 proves its cache so)."""
    for knobs in s.neutral_settings() if s.is_main else s.neutral_settings()[:1]:
        pipe = load_pipeline(s.make(), plugins=[s.instance(**knobs)])
        plain = pipe.plugins.run_scheduler() is pipe.scheduler  # beside neutral plugins the planner lets everything stand
        assert plain, f"at {knobs} it replaces the scheduler: let make_scheduler give None there"
        s.expect(s.run(pipe), s.baseline(), f"at {knobs} against the baseline")
        if pipe.plugins[s.plugin.name].is_neutral:
            notes = s.report(pipe).notes
            assert any("inactive" in note for note in notes), f"at {knobs} the report does not say that it is inactive: {notes}"


@check("main")
def same_seed(s: Subject) -> None:
    """Same seed twice = equal, on one pipeline and on two (DeepCache #54, pruna #50: pictures degrade after several calls)."""
    pipe = s.attach(s.make())
    s.expect_fresh(pipe, what="the first run on a second pipeline")
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, what="the run after another seed's")


@check("every")
def fires(s: Subject) -> None:
    """Fires where it must: every implemented point, and the picture changes or the report says why not (cache-dit C3, vLLM-Omni #7335).

    A plugin with hooks for blocks and for attention layers may take one kind alone on this model, but not neither.
    A plugin that only looks (no effect declared on the run) leaves the picture as it is and says what it saw.
    """
    fresh = s.fresh()
    inactive = s.excuses(fresh.report)
    absent = {"modules", *s.left_alone} if "controlnet" in s.facts.components else {"modules", "control", *s.left_alone}
    points = s.instance(**s.plugin.active).points()
    expected = [point for point in points if point not in absent] + (["scheduler"] if s.plugin.scheduler else [])
    for point in expected:
        assert fresh.report.fired.get(point) or inactive, f"its {point!r} hook never fired; fired: {fresh.report.fired}"
    if s.plugin.effects.reads_only:
        s.expect(fresh.output, s.baseline(), "it declares no effect on the run, but the output against the baseline")
        assert inactive or fresh.report.records or fresh.report.notes, "it only looks, and its report says nothing of what it saw"
    elif not inactive:
        assert distance(fresh.output, s.baseline()) > 0, f"at {s.plugin.active} the output is the baseline's, and no note says 'inactive'"
    s.notes += inactive


@check("main", when=lambda s: bool(s.plugin.effects.skips) and "extra_forwards" not in s.plugin.effects.needs)
def saves_work(s: Subject) -> None:
    """Who says that it skips computes less, and counts it in the report (WaveSpeed PR #149 never cached and was slower)."""
    fresh = s.fresh()
    if s.excuses(fresh.report):
        s.notes += fresh.report.notes
        return
    plain = s.work_of_baseline()
    skips = sorted(s.plugin.effects.skips)
    assert fresh.work < plain, f"skips {skips}, but the denoiser's layers got {fresh.work} values, without it {plain}"
    assert fresh.report.counts, "skips, but its report counts nothing (call.count('skipped'))"
    s.note(f"computes {fresh.work / plain:.0%} of the baseline's layer inputs")


@check("kind")
def no_trace(s: Subject) -> None:
    """Detach = bit-equal, no trace in ``__dict__``, class, config, processors, nor between runs (cache-dit C1, C2; tgate)."""
    pipe = s.make()
    base = type(pipe)
    modules = not s.stays
    s.run(pipe)
    once = trace(pipe, base)
    s.run(pipe)
    anew = changed(once, trace(pipe, base))  # what the pipeline itself makes anew in each run: StableUnCLIP's normalizer

    def seen(modules: bool = True) -> Trace:
        return {key: value for key, value in trace(pipe, base, modules).items() if key not in anew}

    before, outside = seen(), seen(modules)
    s.attach(pipe)
    expect_same_trace(outside, seen(modules), "attached, before the first run")
    s.run(pipe)
    expect_same_trace(outside, seen(modules), "attached, between runs")
    unload(pipe)
    assert type(pipe) is base, f"after detaching the class is {type(pipe)!r}"
    expect_same_trace(before, seen(), "after detaching")
    s.expect(s.run(pipe), s.baseline(), "after detaching, against the baseline")


@check("kind")
def attach_twice(s: Subject) -> None:
    """Attaching twice is refused and changes nothing (DeepCache's ``enable()`` twice: RecursionError)."""
    pipe = s.attach(s.make())
    base = type(pipe).__mro__[1]
    before = trace(pipe, base)
    with refused(Conflict, "attached a second time without a word", [s.plugin.name]):
        s.attach(pipe)
    expect_same_trace(before, trace(pipe, base), "after the refusal")
    assert pipe.plugins.list() == (s.plugin.name,), f"after the refusal the list is {pipe.plugins.list()}"
    s.expect_fresh(pipe, what="the run after the refusal")


@check("kind", when=lambda s: valid(s.plugin, {**s.plugin.active, **s.plugin.neutral}))
def switches(s: Subject) -> None:
    """Neutral by ``configure``, off by ``disabled()``, and on again: nothing of one setting stays in the next (diffusers #14037)."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    active = pipe.plugins[s.plugin.name].own_knobs
    with pipe.plugins.disabled():
        s.expect(s.run(pipe), s.baseline(), "disabled, against the baseline")
    pipe.plugins.configure(s.plugin.name, **s.plugin.neutral)
    s.expect(s.run(pipe), s.baseline(), "configured neutral, against the baseline")
    pipe.plugins.configure(s.plugin.name, **active)
    s.expect_fresh(pipe, what="the run after configuring it back")


@check("main")
def in_place(s: Subject) -> None:
    """Tensors of the pipeline and of other plugins are not written into (WaveSpeed PR #149); do-nothing neighbours change nothing."""
    outer, inner, ledger = watchers(s.plugin)
    around = [outer, s.instance(**s.plugin.active), inner] if outer.points() else [s.instance(**s.plugin.active)]
    pipe = load_pipeline(s.make(), plugins=around)
    output = s.run(pipe)
    assert not ledger.written, f"writes into tensors that it was given ({len(ledger.written)} times): {ledger.written[0]}"
    s.expect(output, s.fresh().output, "between two do-nothing plugins, against alone")


@check("kind")
def memory(s: Subject) -> None:
    """Memory held after the run = 0 (DeepCache keeps 36 tensors alive after the call; diffusers #14833)."""
    pipe = s.attach(s.make())
    for second in s.seconds(pipe):
        s.run(second)  # its own caches (of rotary frequencies) are not the plugin's
    with only_new_objects():
        with pipe.plugins.disabled():
            s.run(pipe)
        pipe._current_timestep = None  # LTX keeps its last one, a view of the schedule
        before = live_tensors(pipe)
        s.run(pipe)
        pipe._current_timestep = None
        pipe.plugins.report().plugins.clear()  # what it recorded is there for the user to read
        after = live_tensors(pipe)
    if "resolution" in s.plugin.effects.edits:  # models cache tables for every size that they see: what goes with the plugin is its own
        unload(pipe)
        before = live_tensors(pipe)
    held = after - before
    assert not held, f"{held.total()} more tensors are alive after the run than after a plain one: {dict(list(held.items())[:5])}"


@check("main", when=lambda s: s.has_guidance and "negative_prompt" in s.facts.kwargs and s.keeps_branches)
def branches_apart(s: Subject) -> None:
    """Branches do not mix: with the guidance scale just above 1 the negative prompt has no say (MagCache E12, cache-dit C3)."""
    scale = {s.family.guidance.scale: 1.0000002}
    one, other = USUAL.but(**scale, negative_prompt="blurry"), USUAL.but(**scale, negative_prompt="a green sea full of old ships")
    plain = distance(s.baseline(one), s.baseline(other))
    with_it = distance(s.fresh(one).output, s.fresh(other).output)
    assert with_it <= 20 * plain + 1e-3, f"another negative prompt changes the output by {with_it:.3g}; without the plugin by {plain:.3g}"
