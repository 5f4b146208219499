"""A bundled checkpoint's own size, steps and guidance hold in every call, on the plain pipeline and under plugins; its user always wins."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from diffgraft import BrokenPlugin, Bundled, ConfigError, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.kernel.defaults import filled, give_defaults, own_defaults, plain_class
from diffgraft.lab.results import plain as plain_json
from diffgraft.methods.conditioning import sibling
from diffgraft.methods.inputs import default_steps
from diffgraft.methods.variants import as_variant, own_size
from diffusers import FluxPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from probes import Everything, Probe, tiny

OWN = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32}


class Listens(Probe):
    """Keeps what a run is called with, as plugins see it."""

    name = "listens"

    def run(self, call, next):
        result = next(call)
        call.note(f"passed {call['guidance_scale']} {call['num_inference_steps']}; in force {call.run.arguments['guidance_scale']}")
        return result


@pytest.fixture
def sd():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    give_defaults(pipe, OWN)
    return pipe, {"prompt": kwargs["prompt"]}


def generate(pipe, kwargs):
    return pipe(**kwargs, generator=torch.Generator().manual_seed(0), output_type="latent").images


def listened(pipe, **given):
    """Guidance scale, steps and latent size of a call as the pipeline itself sees them."""
    seen = {}

    def callback(pipe, i, t, values):
        seen.update(guidance=pipe.guidance_scale, steps=pipe.num_timesteps, latents=tuple(values["latents"].shape))
        return {}

    pipe(**{"output_type": "latent", **given}, callback_on_step_end=callback)
    return seen


def test_they_hold_without_plugins(sd):
    pipe, kwargs = sd
    assert listened(pipe, **kwargs) == {"guidance": 2.0, "steps": 3, "latents": (1, 4, 4, 4)}


def test_what_a_user_gives_wins_by_name_and_by_place(sd):
    pipe, kwargs = sd
    assert listened(pipe, **kwargs, guidance_scale=5.0, num_inference_steps=2)["guidance"] == 5.0
    assert filled(pipe, ("a prompt", 64, 48), {}) == {"num_inference_steps": 3, "guidance_scale": 2.0}
    assert filled(pipe, ("a prompt",), {"height": None})["height"] is None


def test_signature_and_help_show_them(sd):
    pipe, _ = sd
    shown = inspect.signature(pipe.__call__).parameters
    assert [*shown] == [*inspect.signature(StableDiffusionPipeline.__call__).parameters][1:]
    assert {name: shown[name].default for name in OWN} == OWN
    assert default_steps(pipe) == 3
    load_pipeline(pipe, plugins=[Everything])
    assert inspect.signature(pipe.__call__).parameters == shown
    assert inspect.signature(StableDiffusionPipeline.__call__).parameters["guidance_scale"].default == 7.5


def test_plugins_see_them_as_if_they_had_been_given(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Listens])
    assert listened(pipe, **kwargs)["guidance"] == 2.0
    assert pipe.plugins.report().plugins["listens"].notes == ["passed 2.0 3; in force 2.0"]
    pipe("x", guidance_scale=1.5, output_type="latent")
    assert pipe.plugins.report().plugins["listens"].notes == ["passed 1.5 3; in force 1.5"]


def test_they_are_the_checkpoints_and_stay_when_the_plugins_go(sd):
    pipe, kwargs = sd
    cls = type(pipe)
    expected = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Everything])
    pipe.plugins.clear()
    assert type(pipe) is cls
    assert torch.equal(generate(pipe, kwargs), expected)
    assert type(unload(load_pipeline(pipe))) is cls
    assert own_defaults(pipe) == OWN


def test_another_object_of_the_class_has_none(sd):
    other, _ = tiny("StableDiffusionPipeline")
    assert own_defaults(other) == {}
    assert type(other) is StableDiffusionPipeline is plain_class(type(sd[0]))
    assert isinstance(sd[0], StableDiffusionPipeline)


@pytest.mark.parametrize("grafted", [False, True])
def test_copies_keep_them_and_pickles_folders_and_from_pipe_are_plain(sd, grafted, tmp_path):
    pipe, kwargs = sd
    expected = generate(pipe, kwargs)
    if grafted:
        load_pipeline(pipe, plugins=[Everything])
    for made in (copy.deepcopy(pipe), copy.copy(pipe), sibling(pipe)):
        assert own_defaults(made) == OWN
        assert torch.equal(generate(made, kwargs), expected)
    assert type(pickle.loads(pickle.dumps(pipe))) is StableDiffusionPipeline
    pipe.save_pretrained(tmp_path)
    assert '"StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()
    assert own_defaults(load_pipeline(tmp_path)) == {}
    assert type(StableDiffusionImg2ImgPipeline.from_pipe(pipe)) is StableDiffusionImg2ImgPipeline


@pytest.mark.parametrize("grafted", [False, True])
def test_a_negative_prompt_of_its_own_fits_every_form_of_a_prompt(grafted):
    pipe, kwargs = tiny("FluxPipeline")
    size = {name: kwargs[name] for name in ("height", "width", "max_sequence_length")}
    give_defaults(pipe, {"num_inference_steps": 2, "negative_prompt": "", "true_cfg_scale": 2.0, **size})
    if grafted:
        load_pipeline(pipe, plugins=[Everything])
    embeds, pooled, _ = pipe.encode_prompt(["a", "b"], None, max_sequence_length=size["max_sequence_length"])

    def call(*args, **given):
        return pipe(*args, **given, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    one, two = call("a"), call(["a", "b"])
    assert one.shape[0] == 1
    assert torch.equal(two, call(prompt_embeds=embeds, pooled_prompt_embeds=pooled))
    assert not torch.equal(one, call("a", negative_prompt=None)), "the negative prompt makes guidance active"
    given = {"negative_prompt_embeds": embeds[:1], "negative_pooled_prompt_embeds": pooled[:1]}
    assert call("a", **given).shape == one.shape  # diffusers refuses text and embeddings together


def test_a_picture_of_its_own_goes_with_every_prompt_until_another_is_given(tmp_path, monkeypatch):
    plain, _ = tiny("StableDiffusionInstructPix2PixPipeline")
    plain.save_pretrained(tmp_path / "edit")
    Image.new("RGBA", (32, 32), (200, 60, 70)).save(tmp_path / "start.png")
    bundled = Bundled("edit", str(tmp_path / "edit"), steps=2, pictures={"image": str(tmp_path / "start.png")})
    monkeypatch.setattr(registry, "bundled_names", lambda: ["edit"])
    monkeypatch.setattr(registry, "find_bundled", {"edit": bundled}.__getitem__)
    pipe = load_pipeline("edit", plugins=[Everything])
    start = own_defaults(pipe)["image"]
    assert (start.mode, start.getpixel((0, 0))) == ("RGB", (200, 60, 70))

    def call(*args, **given):
        return pipe(*args, **given, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    one, two = call("make it blue"), call(["make it blue", "make it bigger"])
    assert (len(one), len(two)) == (1, 2)
    assert torch.equal(two, call(["make it blue", "make it bigger"], image=[start, start]))
    assert not torch.equal(one, call("make it blue", image=Image.new("RGB", (32, 32))))
    assert plain_json(own_defaults(pipe)["image"]) == "a picture, 32x32"
    (tmp_path / "start.png").write_text("no picture")
    with pytest.raises(BrokenPlugin, match=r"bundled pipeline 'edit': image = .*start\.png: cannot identify"):
        load_pipeline("edit")


def test_an_argument_that_the_pipeline_does_not_take_is_refused_and_it_is_as_it_was():
    pipe, _ = tiny("StableDiffusionPipeline")
    with pytest.raises(ConfigError, match=r"num_frames = 9: StableDiffusionPipeline takes no num_frames"):
        give_defaults(pipe, {"num_frames": 9})
    assert type(pipe) is StableDiffusionPipeline


def test_a_bundled_record_that_lies_is_named(monkeypatch, tmp_path):
    pipe, _ = tiny("StableDiffusionPipeline")
    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "bundled_names", lambda: ["theirs"])
    monkeypatch.setattr(registry, "find_bundled", {"theirs": Bundled("theirs", str(tmp_path), call={"num_frames": 9})}.__getitem__)
    with pytest.raises(BrokenPlugin, match=r"bundled pipeline 'theirs': num_frames = 9"):
        load_pipeline("theirs")


BUNDLED = {  # steps, guidance, latents
    "emoji-sd": (50, 2.0, (1, 4, 16, 16)),
    "emoji-sd-small": (50, 1.5, (1, 4, 16, 16)),
    "emoji-sd-lcm": (4, 1.0, (1, 4, 16, 16)),
    "emoji-flux": (50, 2.0, (1, 64, 16)),
    "emoji-flux-4step": (4, 1.0, (1, 64, 16)),
    "emoji-wan": (50, 2.0, (1, 22, 3, 8, 8)),
    "emoji-wan-4step": (4, 1.0, (1, 22, 3, 8, 8)),
}


class Enough(Exception):
    pass


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("plugins", [(), ("interpolant_sde",)])
def test_bundled_pipelines_run_as_they_were_trained_with_a_prompt_alone(name, plugins):
    """The first step of each tells it."""
    pipe = load_pipeline(name, plugins=plugins)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def callback(pipe, i, t, values):
        guidance = filled(pipe, (), {})["true_cfg_scale"] if isinstance(pipe, FluxPipeline) else pipe.guidance_scale
        seen.append((pipe.num_timesteps, guidance, tuple(values["latents"].shape)))
        raise Enough

    with pytest.raises(Enough):
        pipe("a red apple on the left on a blue background", callback_on_step_end=callback)
    assert seen == [BUNDLED[name]]


@pytest.mark.parametrize(("name", "cls"), [("emoji-sd", "StableDiffusionImg2ImgPipeline"), ("emoji-flux", "FluxImg2ImgPipeline")])
def test_a_variant_for_pictures_has_what_it_takes_of_them(name, cls):
    pipe = load_pipeline(name)
    variant = as_variant(pipe, getattr(diffusers, cls))
    assert plain_class(type(variant)) is getattr(diffusers, cls)
    assert dict(own_defaults(variant)).items() <= dict(own_defaults(pipe)).items()
    assert own_defaults(variant).get("guidance_scale") == own_defaults(pipe).get("guidance_scale")
    assert own_size(variant) == (64, 64)
    assert as_variant(pipe, plain_class(type(pipe))) is pipe
