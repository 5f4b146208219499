"""``load_pipeline``: the five lines, every form of ``plugins=``, and bad input that touches nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffgraft import (
    BrokenPlugin,
    ConfigError,
    Conflict,
    DiffgraftError,
    NeverFired,
    PipelineNotFound,
    PluginNotFound,
    Unsupported,
    load_pipeline,
    unload,
)
from diffgraft.installed import registry
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from probes import Effects, Everything, PluginConfig, Probe, Unguided, generate, tiny, trace
from pydantic import Field


class Knobs(PluginConfig):
    strength: float = Field(1.0, ge=0.0, le=2.0, description="s of the paper")
    mode: str = "a"


class Scale(Probe):
    """Multiplies the prediction; an example with knobs."""

    name = "scale"
    Config = Knobs
    families = ("unets",)
    effects = Effects(edits=frozenset({"prediction"}))

    def denoise(self, call, next):
        call.count("scaled")
        return next(call) * self.config.strength


class Cache(Probe):
    name = "cache"
    effects = Effects(skips=frozenset({"blocks"}))

    def block(self, call, next):
        return next(call)


class OtherCache(Cache):
    name = "other_cache"


def forms() -> list[Any]:
    return [
        [("scale", {"strength": 0.5})],
        {"scale": {"strength": 0.5}},
        [Scale(strength=0.5)],
    ]


@pytest.mark.parametrize("form", forms(), ids=["pair", "mapping", "instance"])
def test_forms_of_plugins(sd, form, monkeypatch):
    pipe, kwargs = sd
    monkeypatch.setattr(registry, "find", {"scale": Scale}.__getitem__)
    assert load_pipeline(pipe, plugins=form) is pipe
    assert pipe.plugins["scale"].config.strength == 0.5
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["scale"].counts == {"scaled": {"both": 4}}
    assert "scale" in str(pipe.plugins.report())


def test_plugins_may_be_added_to_an_empty_stack(sd):
    pipe, kwargs = sd
    stack = load_pipeline(pipe).plugins
    assert (len(stack), stack.list(), str(stack.report()).splitlines()[-1].strip()) == (0, (), "no run yet")
    load_pipeline(pipe, plugins=[Scale])
    assert pipe.plugins is stack
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["scale"].total("scaled") == 4


@pytest.mark.parametrize("form", ["scale", ["scale"], [Scale], {"scale": None}])
def test_forms_without_knobs(sd, form, monkeypatch):
    monkeypatch.setattr(registry, "find", {"scale": Scale}.__getitem__)
    assert load_pipeline(sd[0], plugins=form).plugins.list() == ("scale",)


def test_a_folder_in_hub_layout_goes_the_same_way(sd, tmp_path):
    pipe, kwargs = sd
    pipe.save_pretrained(tmp_path / "owner" / "model")
    loaded = load_pipeline(tmp_path / "owner" / "model", plugins=[Scale])
    reference = DiffusionPipeline.from_pretrained(tmp_path / "owner" / "model")
    for p in (loaded, reference):
        p.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, kwargs), generate(reference, kwargs))
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    assert isinstance(loaded, type(reference))


def test_a_hub_id_is_handed_to_diffusers(monkeypatch, sd):
    asked = []

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs))
        return sd[0]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    load_pipeline("runwayml/stable-diffusion-v1-5", plugins=[Scale], dtype=torch.float16, variant="fp16")
    assert asked == [("runwayml/stable-diffusion-v1-5", {"use_safetensors": True, "dtype": torch.float16, "variant": "fp16"})]


BAD: list[tuple[Any, type[DiffgraftError], str]] = [
    (["no_such_plugin"], PluginNotFound, "`diffgraft search` lists those that are published."),
    ([3], ConfigError, "3 is neither"),
    ([int], BrokenPlugin, "not a subclass"),
    ([Scale, Scale], Conflict, "2 times"),
    ([Cache, OtherCache], Conflict, "cache and other_cache both skip blocks"),
]


@pytest.mark.parametrize(("plugins", "error", "text"), BAD)
def test_bad_plugins_touch_nothing(sd, plugins, error, text):
    pipe, kwargs = sd
    before, seen = generate(pipe, kwargs), trace(pipe)
    with pytest.raises(error) as raised:
        load_pipeline(pipe, plugins=plugins)
    assert text in str(raised.value)
    assert trace(pipe) == seen
    assert not hasattr(pipe, "plugins")
    assert torch.equal(generate(pipe, kwargs), before)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"strenght": 1}, "unknown knob 'strenght'; did you mean 'strength'?"),
        ({"strength": 3}, "strength = 3: Input should be less than or equal to 2"),
        ({"strength": "x"}, "strength = 'x'"),
        ({"strength": True}, "strength = True: True is no number"),
        ({"strength": -1, "nonsense": 2}, "nonsense"),
    ],
)
def test_bad_knobs_name_key_value_and_allowed(sd, knobs, text):
    with pytest.raises(ConfigError) as raised:
        Scale(**knobs)
    assert text in str(raised.value)
    pipe, _ = sd
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    with pytest.raises(ConfigError):
        pipe.plugins.configure("scale", **knobs)
    assert pipe.plugins["scale"].config.strength == 0.5


def test_wrong_family_is_refused_with_the_reason():
    pipe, _ = tiny("FluxPipeline")
    with pytest.raises(Unsupported, match="made for unets"):
        load_pipeline(pipe, plugins=[Everything, Scale])
    assert not hasattr(pipe, "plugins")


def test_attaching_twice_is_refused_and_the_first_stays(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    once = generate(pipe, kwargs)
    with pytest.raises(Conflict, match="is on this pipeline already"):
        load_pipeline(pipe, plugins=[Cache, Scale])
    assert pipe.plugins.list() == ("scale",)
    assert torch.equal(generate(pipe, kwargs), once)
    load_pipeline(pipe, plugins=[Cache])
    assert pipe.plugins.list() == ("scale", "cache")


@pytest.mark.parametrize("name", ["emoji-sdd", "nothing", "./no/such/folder", "/no/such"])
def test_no_such_pipeline(name):
    with pytest.raises(PipelineNotFound, match=r"emoji-sd.*Hub id"):
        load_pipeline(name)


def test_not_a_pipeline(sd):
    with pytest.raises(Unsupported, match="Linear is no diffusers pipeline"):
        load_pipeline(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="variant"):
        load_pipeline(sd[0], variant="fp16")


def test_a_plugin_that_refuses_in_check_leaves_nothing(sd):
    class Picky(Probe):
        name = "picky"

        def check(self, target):
            raise Unsupported(f"needs 99 blocks, {target.family.name} has {len(target.blocks)}")

        def denoise(self, call, next):
            return next(call)

    pipe, _ = sd
    seen = trace(pipe)
    with pytest.raises(Unsupported, match="99 blocks"):
        load_pipeline(pipe, plugins=[Scale, Picky])
    assert trace(pipe) == seen


def test_surgery_that_fails_halfway_is_undone(sd):
    class Clumsy(Probe):
        name = "clumsy"

        def modules(self, call, next):
            call.swap(call.denoisers["unet"], "conv_in", torch.nn.Identity())
            call.swap(call.denoisers["unet"], "no_such", torch.nn.Identity())

    pipe, _ = sd
    seen = trace(pipe)
    with pytest.raises(DiffgraftError, match="no submodule 'no_such'"):
        load_pipeline(pipe, plugins=[Scale, Clumsy])
    assert trace(pipe) == seen


def test_enable_disable_configure_remove(sd):
    pipe, kwargs = sd
    before = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Scale(strength=0.5), Everything])
    scaled = generate(pipe, kwargs)
    assert not torch.equal(scaled, before)
    pipe.plugins.disable("scale")
    assert "scale (disabled)" in repr(pipe.plugins)
    assert torch.equal(generate(pipe, kwargs), before)
    with pipe.plugins.disabled():
        assert torch.equal(generate(pipe, kwargs), before)
    assert "scale (disabled)" in repr(pipe.plugins), "disabled() puts back what was there"
    pipe.plugins.enable()
    assert torch.equal(generate(pipe, kwargs), scaled)
    pipe.plugins.configure("scale", mode="b")
    assert pipe.plugins["scale"].config.strength == 0.5, "the other knobs stay"
    pipe.plugins.configure("scale", strength=1.0)
    assert torch.equal(generate(pipe, kwargs), before)
    with pytest.raises(PluginNotFound, match="did you mean 'scale'"):
        pipe.plugins.remove("scales")
    pipe.plugins.remove("scale")
    assert pipe.plugins.list() == ("everything",)
    pipe.plugins.clear()
    assert not hasattr(pipe, "plugins")


def test_changes_from_inside_a_run_and_a_second_thread_are_refused(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Everything])
    seen = []

    def callback(pipe, i, t, values):
        for change in (lambda: pipe.plugins.disable(), lambda: pipe.plugins.clear(), lambda: generate(pipe, kwargs)):
            with pytest.raises(DiffgraftError, match="running"):
                change()
        thread = threading.Thread(target=lambda: seen.append(raises(lambda: generate(pipe, kwargs))))
        thread.start()
        thread.join()
        return {}

    def raises(function):
        try:
            function()
        except DiffgraftError as error:
            return str(error)

    generate(pipe, kwargs, callback_on_step_end=callback)
    assert all("another thread" in text for text in seen)


def test_another_pipeline_may_run_inside_a_run_and_shares_nothing(sd):
    pipe, kwargs = sd
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)  # the same U-Net and scheduler class
    other.set_progress_bar_config(disable=True)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    _, image_kwargs = tiny("StableDiffusionImg2ImgPipeline")
    alone = generate(other, image_kwargs)
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    load_pipeline(other)
    inside = []

    def callback(pipe, i, t, values):
        inside.append(generate(other, image_kwargs))
        return {}

    generate(pipe, kwargs, callback_on_step_end=callback)
    assert all(torch.equal(image, alone) for image in inside)
    assert pipe.plugins.report().plugins["scale"].total("scaled") == 4


def test_two_pipelines_that_share_the_denoiser_run_in_two_threads(sd):
    pipe, kwargs = sd
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    twin.tokenizer = copy.deepcopy(pipe.tokenizer)  # a fast tokenizer holds the padding of the call it is in: not for two threads
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    load_pipeline(twin, plugins=[Scale(strength=0.25)])
    expected = [generate(p, kwargs) for p in (pipe, twin)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda p: generate(p, kwargs), (pipe, twin)))
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[1], expected[1])
    unload(pipe)
    unload(twin)
    assert "forward" not in pipe.unet.__dict__


def test_pickled_weights_are_refused_unless_asked_for(sd, tmp_path):
    sd[0].save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(Unsupported, match=r"are pickles \(.*/.*\.bin\).*use_safetensors=None if you trust"):
        load_pipeline(tmp_path / "pickled")
    assert type(load_pipeline(tmp_path / "pickled", use_safetensors=None)).__name__ == "StableDiffusionPipeline"


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "a pickle under another name": lambda file: torch.save({"a": torch.ones(1)}, file),
    "not there": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", [UNET, TEXT])
def test_damaged_weights_are_called_damaged_and_no_protection_is_advised_away(sd, tmp_path, file, how):
    sd[0].save_pretrained(tmp_path)
    DAMAGE[how](tmp_path / file)
    if file == UNET:  # pickles beside what is damaged change nothing
        (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PipelineNotFound, match="no file named" if how == "not there" else "damaged, or not what its name says") as caught:
        load_pipeline(tmp_path)
    assert "use_safetensors" not in str(caught.value)


def test_the_object_stays_a_standard_pipeline(sd, tmp_path):
    pipe, kwargs = sd
    plain = type(pipe)
    signature = inspect.signature(pipe.__call__)
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    assert isinstance(pipe, plain)
    assert inspect.signature(pipe.__call__) == signature
    pipe.save_pretrained(tmp_path)
    assert '"StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()
    scaled = generate(pipe, kwargs)
    again = pickle.loads(pickle.dumps(pipe))
    assert type(again) is plain
    twin = copy.deepcopy(pipe)
    twin.plugins.configure("scale", strength=1.0)
    assert pipe.plugins["scale"].config.strength == 0.5
    assert torch.equal(generate(pipe, kwargs), scaled)
    assert torch.equal(generate(twin, kwargs), generate(again, kwargs))


def test_a_new_scheduler_after_loading_keeps_the_plugins(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Scale(strength=0.5)])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["scale"].total("scaled") == 4
    assert "step" not in pipe.scheduler.__dict__


def test_what_the_user_replaced_is_not_held_on_to(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Everything])
    generate(pipe, kwargs)
    old = weakref.ref(pipe.unet), weakref.ref(pipe.scheduler)
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generate(pipe, kwargs)
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_never_fired_is_an_error_that_keeps_the_picture(sd):
    class StepsOnly(Probe):
        name = "steps_only"

        def step(self, call, next):
            return next(call)

    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[StepsOnly])
    other = copy.deepcopy(pipe.scheduler)

    def prepare(*args, **kw):
        pipe.__dict__["scheduler"] = other  # somebody exchanges the scheduler after the run began
        return type(pipe).prepare_extra_step_kwargs(pipe, *args, **kw)

    pipe.__dict__["prepare_extra_step_kwargs"] = prepare
    other.set_timesteps(4)
    with pytest.raises(NeverFired, match="steps_only: its 'step' hook was never reached") as raised:
        generate(pipe, kwargs)
    assert raised.value.result is not None


@pytest.mark.parametrize("family", [family for family in registry.families().values() if family.tiny], ids=lambda family: family.name)
def test_five_lines_on_every_family(family):
    pipe, kwargs = tiny(family.pipelines[0])
    before = generate(pipe, kwargs)
    probe = next(probe for probe in (Everything, Unguided) if probe.claims(family))
    load_pipeline(pipe, plugins=[probe])
    assert torch.equal(generate(pipe, kwargs), before)
    report = pipe.plugins.report()
    assert report.completed
    assert report.plugins[probe.name].fired["denoise"] == sum(report.denoiser_calls.values())


def test_copies_and_pickles_of_a_pipeline_with_exchanged_modules():
    """The copy's plugin exchanges the copy's modules once, and a pickle holds the modules that were there."""
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    first = pipe.unet.time_embedding.linear_1
    load_pipeline(pipe, plugins=[Doubled()])
    doubled = generate(pipe, kwargs)
    assert not torch.equal(plain, doubled)
    twin = copy.deepcopy(pipe)
    assert torch.equal(generate(twin, kwargs), doubled)
    assert torch.equal(generate(unload(twin), kwargs), plain)
    assert torch.equal(generate(pickle.loads(pickle.dumps(pipe)), kwargs), plain)
    assert torch.equal(generate(pipe, kwargs), doubled)
    assert unload(pipe).unet.time_embedding.linear_1 is first


class DoubledLinear(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Doubled(Probe):
    name = "doubled"

    def modules(self, call, next):
        next(call)
        parent = call.denoisers["unet"].time_embedding
        call.swap(parent, "linear_1", DoubledLinear(parent.linear_1))
