"""The boundary of a hook: what it gives is held against its point, what it raises says whose it is, and nothing is read for that."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import diffusers
import pytest
import torch
from diffgraft import BrokenPlugin, DiffgraftError, Effects, NeverFired, PluginConfig, Schedule, StepOutput, load_pipeline, unload
from diffgraft.installed.errors import NotFinite, NotPassed
from diffgraft.kernel.wiring import STEP, positions
from probes import Probe, generate, tiny

SD, FLUX, CONTROL = "StableDiffusionPipeline", "FluxPipeline", "StableDiffusionControlNetPipeline"
KWARGS = {"num_inference_steps": 2, "output_type": "latent"}


def probe(name="a_probe", **hooks):
    return type("Hooked", (Probe,), {"name": name, **hooks})()


@functools.cache
def kept(pipeline):
    pipe, kwargs = tiny(pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs


def run(pipeline, *plugins, check_finite=False, **more):
    pipe, kwargs = kept(pipeline)
    if isinstance(more.get("prompt"), list) and "negative_prompt" in kwargs:
        more["negative_prompt"] = ["c", "d"]
    stack = load_pipeline(pipe, plugins=list(plugins)).plugins
    stack.check_finite = check_finite
    try:
        return generate(pipe, {**kwargs, **KWARGS, **more}), stack.report()
    finally:
        unload(pipe)


def but(change):
    """A hook whose result is ``change`` of what it would be."""
    return lambda self, call, next: change(next(call))


def first_of_tuple(change):
    return but(lambda out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out))


def of_sample(change):
    return but(lambda out: StepOutput(change(out.sample), out.x0))


WRONG: list[tuple[str, str, Any]] = [
    (SD, "denoise", but(lambda x: None)),
    (SD, "denoise", but(lambda x: x[:-1])),
    (SD, "denoise", but(lambda x: x[:, :1])),
    (SD, "denoise", but(lambda x: torch.cat([x, x]))),
    (SD, "denoise", but(lambda x: x[..., :-1])),
    (SD, "denoise", but(lambda x: x.long())),
    (SD, "denoise", but(lambda x: x.double())),
    (SD, "denoise", but(lambda x: x.half())),
    (SD, "denoise", but(lambda x: x.to("meta"))),
    (SD, "denoise", but(lambda x: (x,))),
    (SD, "denoise", but(lambda x: x.numpy())),
    (SD, "denoise", lambda self, call, next: call.sample[:, :1]),  # without the denoiser
    (SD, "denoise", lambda self, call, next: call.sample[:1]),
    (SD, "denoise", lambda self, call, next: (next(call) for _ in range(1))),
    (FLUX, "denoise", but(lambda x: x[:, :-1])),
    (SD, "block", but(lambda out: None)),
    (SD, "block", lambda self, call, next: None),
    (SD, "block", but(lambda out: out[0])),
    (SD, "block", but(lambda out: torch.zeros(1))),
    (SD, "block", lambda self, call, next: torch.zeros(1)),
    (SD, "block", first_of_tuple(lambda x: x[:1])),
    (SD, "block", first_of_tuple(lambda x: x.flatten(1))),
    (SD, "block", first_of_tuple(lambda x: x.int())),
    (SD, "block", but(list)),
    (FLUX, "block", but(lambda out: out[1])),
    (FLUX, "block", but(lambda out: (*out, out[0]))),
    (FLUX, "block", lambda self, call, next: call["hidden_states"]),
    (SD, "attention", but(lambda out: None)),
    (SD, "attention", but(lambda out: out[:1])),
    (SD, "attention", but(lambda out: (out,))),
    (SD, "attention", lambda self, call, next: None),
    (FLUX, "attention", but(lambda out: out[0])),
    (SD, "guide", but(lambda x: None)),
    (SD, "guide", but(lambda x: torch.zeros(3))),
    (SD, "guide", but(lambda x: torch.cat([x, x]))),
    (SD, "guide", but(lambda x: x.long())),
    (SD, "step", but(lambda out: None)),
    (SD, "step", but(lambda out: out.sample)),
    (SD, "step", but(lambda out: StepOutput(None))),
    (SD, "step", of_sample(lambda x: x[:, :1])),
    (SD, "step", of_sample(lambda x: torch.cat([x, x]))),
    (SD, "step", of_sample(lambda x: x.long())),
    (SD, "step", of_sample(lambda x: x.double())),
    (SD, "schedule", but(lambda out: None)),
    (SD, "schedule", but(lambda out: Schedule(out.timesteps[:0], out.sigmas))),
    (SD, "schedule", but(lambda out: Schedule(out.timesteps[None], out.sigmas))),
    (SD, "schedule", but(lambda out: Schedule(out.timesteps.tolist(), out.sigmas))),
    (SD, "schedule", but(lambda out: Schedule(out.timesteps, out.timesteps))),
    (FLUX, "schedule", but(lambda out: Schedule(out.timesteps, None))),
    (SD, "run", but(lambda out: None)),
    (SD, "run", but(lambda out: out.images)),
    (SD, "run", lambda self, call, next: []),
    (CONTROL, "control", but(lambda out: None)),
    (CONTROL, "control", but(lambda out: out[:1])),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit_its_point_is_refused_by_name(number):
    pipeline, point, hook = WRONG[number]
    prompt = {"prompt": ["a", "b"]}
    with pytest.raises(BrokenPlugin, match=f"plugin 'a_probe', {point} hook") as raised:
        run(pipeline, probe(**{point: hook}), **prompt)
    assert "it gave" in str(raised.value)


@pytest.mark.parametrize("number", range(0, len(WRONG), 6))
def test_the_one_who_gave_it_is_named_and_not_who_stands_around_it(number):
    pipeline, point, hook = WRONG[number]
    outer = probe("outer", **{point: lambda self, call, next: next(call)})
    with pytest.raises(BrokenPlugin, match="plugin 'a_probe'") as raised:
        run(pipeline, outer, probe(**{point: hook}), prompt=["a", "b"])
    assert "outer" not in str(raised.value) + str(getattr(raised.value, "__notes__", ""))


RAISING = ("run", "schedule", "denoise", "block", "attention", "guide", "step")


@pytest.mark.parametrize("point", RAISING)
@pytest.mark.parametrize("asks", [False, True])
def test_an_exception_keeps_its_type_and_says_whose_it_is(point, asks):
    def hook(self, call, next):
        if asks:
            next(call)
        return 1 / 0

    around = {p: (lambda self, call, next: next(call)) for p in RAISING}
    with pytest.raises(ZeroDivisionError, match="division by zero") as raised:
        run(SD, probe("outer", **around), probe(**{point: hook}), probe("inner", **around))
    notes = raised.value.__notes__
    assert len(notes) == 1
    assert notes[0].startswith(f"raised in plugin 'a_probe', {point} hook")
    assert ("step 1 of 2" in notes[0]) == (point not in ("run", "schedule"))


def test_the_pipelines_own_exceptions_accuse_nobody():
    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins=[probe(denoise=lambda self, call, next: next(call), run=lambda self, call, next: next(call))])

    def fail(*_):
        raise RuntimeError("out of memory")

    pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        generate(pipe, kwargs)
    assert not getattr(raised.value, "__notes__", [])


def test_who_changed_the_call_is_told_when_the_denoiser_refuses_it():
    def wider(self, call, next):
        return next(call.replace(sample=torch.cat([call.sample, call.sample], dim=1)))

    with pytest.raises(RuntimeError) as raised:
        run(SD, probe("innocent", denoise=lambda self, call, next: next(call)), probe(denoise=wider))
    assert raised.value.__notes__ == ["plugin 'a_probe', denoise hook, step 1 of 2 had changed the call before"]


@pytest.mark.parametrize("given", [None, 3, SimpleNamespace()])
def test_next_takes_a_call(given):
    with pytest.raises(BrokenPlugin, match=r"plugin 'a_probe', step hook, step 1 of 2: it gave .* to next"):
        run(SD, probe(step=lambda self, call, next: next(given)))


KEPT: list[Any] = []


def keep(self, call, next):
    KEPT.append((next, call))
    return next(call)


@pytest.mark.parametrize("point", RAISING)
def test_a_late_next_is_refused_by_name(point):
    KEPT.clear()
    run(SD, probe(**{point: keep}))
    with pytest.raises(BrokenPlugin, match=f"plugin 'a_probe': the next of its {point} hook was called after that hook had returned"):
        KEPT[0][0](KEPT[0][1])


def test_a_late_next_is_refused_in_the_same_run():
    def hook(self, call, next):
        kept = call.shared.__dict__.setdefault("kept", next)
        return kept(call)

    class State:
        pass

    with pytest.raises(BrokenPlugin, match="plugin 'a_probe': the next of its denoise hook") as raised:
        run(SD, probe(denoise=hook, State=State))
    assert "step 2 of 2" in raised.value.__notes__[0]


def test_whoever_answers_a_run_is_blamed_for_hooks_that_were_not_reached():
    answer = probe(run=lambda self, call, next: ([],))
    other = probe("other", step=lambda self, call, next: next(call), guide=lambda self, call, next: next(call))
    for order in ([answer, other], [other, answer]):
        with pytest.raises(NeverFired, match=r"^a_probe: its run hook gave a result without calling next"):
            run(SD, *order)


def test_a_plugin_that_was_never_asked_is_told_who_answered():
    answer = probe(denoise=lambda self, call, next: torch.zeros_like(call.sample))
    _, report = run(SD, answer, probe("inner", denoise=lambda self, call, next: next(call)))
    assert report.plugins["inner"].notes == ["never called: a_probe further out answered every call"]


# finite ---------------------------------------------------------------------------------------------------------------------------

NAN = float("nan")
AROUND = {p: (lambda self, call, next: next(call)) for p in ("denoise", "block", "attention", "guide", "step")}


def at_second(change):
    return lambda self, call, next: change(next(call)) if call.step.index == 1 else next(call)


BAD_VALUES = {
    "denoise": at_second(lambda x: x * NAN),
    "block": at_second(lambda out: (out[0] * NAN, *out[1:]) if isinstance(out, tuple) else out * NAN),
    "attention": at_second(lambda x: x * float("inf")),
    "guide": at_second(lambda x: x * NAN),
    "step": at_second(lambda out: StepOutput(out.sample * NAN)),
}


@pytest.mark.parametrize("point", BAD_VALUES)
def test_who_made_the_first_nan_is_named(point):
    bad = probe(**{point: BAD_VALUES[point]})
    with pytest.raises(NotFinite, match=f"plugin 'a_probe', {point} hook, step 2 of 2.*the first values that are not finite"):
        run(SD, probe("outer", **AROUND), bad, probe("inner", **AROUND), check_finite=True)


def test_who_gives_nan_on_is_named():
    def hook(self, call, next):
        return next(call.replace(sample=call.sample * NAN))

    with pytest.raises(NotFinite, match=r"plugin 'a_probe', denoise hook, step 1 of 2: the first .* in sample, given to next"):
        run(SD, probe("outer", **AROUND), probe(denoise=hook), probe("inner", **AROUND), check_finite=True)


def test_a_denoiser_that_makes_nan_itself_is_named():
    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins=[probe(denoise=lambda self, call, next: next(call))])
    pipe.plugins.check_finite = True
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(NAN)
    with pytest.raises(NotFinite, match=r"^the denoiser itself at step 1 of"):
        generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[probe("last", step=lambda self, call, next: next(call))])
    pipe.plugins.remove("a_probe")
    with pytest.raises(NotFinite, match="model_output: no plugin made them, step got them so"):
        generate(pipe, kwargs)


def test_finite_runs_are_the_same_with_and_without_looking():
    plugin = probe(**AROUND)
    assert torch.equal(run(SD, plugin, check_finite=True)[0], run(SD, plugin)[0])


def test_nothing_is_read_where_nobody_asks():
    """No value of a tensor is looked at by the boundary: meta tensors have none."""
    from diffgraft.kernel.boundary import guided_form

    x = torch.empty(2, 4, 8, 8, device="meta")
    assert guided_form(SimpleNamespace(combined=x), x + 1) == ""


# saved nothing ----------------------------------------------------------------------------------------------------------------------


class Knobs(PluginConfig):
    on: bool = True


SAVERS = [
    ("skips", {"block": lambda self, call, next: next(call)}, True),
    ("skips", {"block": lambda self, call, next: next(call) if call.info.order else call.state.__dict__.setdefault("x", next(call))}, True),
    ("skips", {"denoise": lambda self, call, next: next(call) if call.step.index == 0 else torch.zeros_like(call.sample)}, False),
    ("replaces", {"denoise": lambda self, call, next: next(call)}, True),
    ("replaces", {"denoise": lambda self, call, next: kept(SD)[0].unet(**call.arguments())[0]}, False),
    ("replaces", {"denoise": lambda self, call, next: (call.acted(), next(call))[1]}, False),
]


@pytest.mark.parametrize(("effect", "hooks", "idle"), SAVERS)
def test_a_plugin_that_saved_nothing_says_so_once(effect, hooks, idle):
    effects = Effects(**{effect: frozenset({"blocks" if "block" in hooks else "denoiser"})})
    pipe, kwargs = tiny(SD)
    plugin = probe(**hooks, State=type("State", (), {}), Config=Knobs, neutral={"on": False}, effects=effects)
    load_pipeline(pipe, plugins=[plugin])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            generate(pipe, {**kwargs, **KWARGS})
    told = [str(w.message) for w in caught if "a_probe: inactive: nothing was saved" in str(w.message)]
    assert len(told) == idle
    notes = pipe.plugins.report().plugins["a_probe"].notes
    assert [note.startswith("inactive: nothing was saved") for note in notes] == [True] * idle


def test_at_neutral_settings_nobody_is_warned():
    pipe, kwargs = tiny(SD)
    load_pipeline(pipe, plugins={"deepcache": {"interval": 1}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe, {**kwargs, **KWARGS})
    assert pipe.plugins.report().plugins["deepcache"].notes == ["inactive: it stands at its neutral settings, where it changes nothing"]


# signatures -------------------------------------------------------------------------------------------------------------------------


def hidden(function):
    """A decorator that takes the signature away."""

    def inside(*args, **kwargs):
        return function(*args, **kwargs)

    return inside


class Traced(diffusers.DDIMScheduler):
    """A scheduler whose methods were wrapped by somebody who kept no signature."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)

    set_timesteps = hidden(diffusers.DDIMScheduler.set_timesteps)


def nameless(self, *args, **kwargs):
    return None


class Strange:
    def step(self, one, *rest):
        return one, rest


def test_names_come_from_the_signature_the_class_its_bases_or_the_convention():
    plain = diffusers.DDIMScheduler()
    own = {"model_output": 0, "timestep": 1, "sample": 2}
    assert positions(plain, "step", STEP).items() >= own.items()
    assert positions(Traced(), "step", STEP) == positions(plain, "step")  # its base says it
    plain.step = hidden(plain.step)
    assert positions(plain, "step", STEP).items() >= own.items()  # its class says it
    with mock.patch.object(diffusers.DDIMScheduler, "step", new=nameless):
        assert positions(diffusers.DDIMScheduler(), "step", STEP) == own  # nobody does
    assert positions(Strange(), "step", STEP) == {"one": 0, "timestep": 1, "sample": 2}
    block = tiny(SD)[0].unet.down_blocks[0].resnets[0]  # (input_tensor, temb, *args, **kwargs): what it says counts
    assert positions(block, "forward") == {"input_tensor": 0, "temb": 1}
    assert positions(SimpleNamespace(step=mock.MagicMock()), "step", STEP) == own
    assert positions(SimpleNamespace(step=functools.partial(lambda a, b: a, b=1)), "step", STEP) == {"a": 0}


class Reader(Probe):
    name = "reader"
    seen: ClassVar[list] = []

    def step(self, call, next):
        self.seen.append((call.model_output.shape, call.sample.shape, float(call["timestep"])))
        return next(call)

    def denoise(self, call, next):
        self.seen.append(call.sample.shape)
        return next(call)

    def schedule(self, call, next):
        self.seen.append(call["num_inference_steps"])
        return next(call)


@pytest.mark.parametrize("form", ["scheduler", "patched", "denoiser"])
def test_arguments_are_read_though_their_names_were_taken_away(form):
    pipe, kwargs = tiny(SD)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    kwargs = {**kwargs, **KWARGS}
    load_pipeline(pipe, plugins=[Reader])
    Reader.seen.clear()
    plain = generate(pipe, kwargs)
    wanted = list(Reader.seen)
    Reader.seen.clear()
    if form == "denoiser":
        pipe.unet.forward = hidden(pipe.unet.forward)
    step = diffusers.DDIMScheduler.step
    if form == "scheduler":
        pipe.scheduler = Traced.from_config(pipe.scheduler.config)
    if form == "patched":
        with mock.patch.object(diffusers.DDIMScheduler, "step", new=lambda self, *args, **kwargs: step(self, *args, **kwargs)):
            out = generate(pipe, kwargs)
    else:
        out = generate(pipe, kwargs)
    assert torch.equal(out, plain)
    assert Reader.seen == wanted


def test_an_argument_that_nobody_passed_is_our_error_and_a_key_error():
    for kind in (NotPassed, KeyError, DiffgraftError):
        with pytest.raises(kind, match="'no_such' was not passed to this DenoiseCall"):
            run(SD, probe(denoise=lambda self, call, next: call["no_such"]))
