"""`diffgraft run` from a picture, a mask and a ControlNet; what a file says of its making; `again`; the logger."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from cli_plugins import Idle, Slow, Sparse
from diffgraft import load_pipeline
from diffgraft.lab.pictures import encode
from diffgraft.lab.recipes import Recipe, Record, read_record
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffgraft.methods.variants import as_variant, own_size, variant_of
from diffgraft_pipelines.tiny import make
from PIL import Image

SIZE = ["--height", "64", "--width", "64"]
NAMES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
CALLS = {"flux": ["-a", "max_sequence_length=16"], "sd3": ["-a", "max_sequence_length=16"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny pipelines as folders, two ControlNets, and pictures to give them."""
    home = tmp_path_factory.mktemp("home")
    for short, name in NAMES.items():
        make(name).pipe.save_pretrained(home / short)
    make("StableDiffusionControlNetPipeline").pipe.controlnet.save_pretrained(home / "net-sd")
    make("StableDiffusionXLControlNetPipeline").pipe.controlnet.save_pretrained(home / "net-sdxl")
    unet = make("StableDiffusionPipeline").pipe.unet
    coarse = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8, 8))
    coarse.save_pretrained(home / "net-coarse")
    make("StableDiffusionControlNetPipeline").pipe.save_pretrained(home / "with-net")
    make("StableDiffusionInpaintPipeline@9").pipe.save_pretrained(home / "nine")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(home / "in.png")
    Image.fromarray(noise).resize((96, 48)).save(home / "wide.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(home / "mask.png")
    Image.fromarray(half).resize((32, 32)).save(home / "small.png")
    Image.new("L", (64, 64)).save(home / "black.png")
    Image.merge("LA", [Image.new("L", (64, 64), 255), Image.fromarray(half)]).save(home / "alpha.png")
    return home


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def good(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


# the class, the size


def test_the_class_of_a_task():
    sd = "StableDiffusionPipeline"
    assert variant_of(sd, image=True) is diffusers.StableDiffusionImg2ImgPipeline
    assert variant_of(sd, image=True, mask=True) is diffusers.StableDiffusionInpaintPipeline
    assert variant_of(sd, control=True) is diffusers.StableDiffusionControlNetPipeline
    assert variant_of(sd, image=True, mask=True, control=True) is diffusers.StableDiffusionControlNetInpaintPipeline
    assert variant_of("StableDiffusionControlNetPipeline", image=True) is diffusers.StableDiffusionControlNetImg2ImgPipeline
    assert variant_of("FluxInpaintPipeline", image=True) is diffusers.FluxImg2ImgPipeline
    for own in ("FluxKontextPipeline", "StableVideoDiffusionPipeline", "WanImageToVideoPipeline", "FluxImg2ImgPipeline"):
        assert variant_of(own, image=True) is getattr(diffusers, own)


def test_the_weights_are_shared_and_keep_their_dtype():
    pipe = make("StableDiffusionPipeline").pipe.to(torch.bfloat16)
    pipe.text_encoder.float()  # T5 keeps a part of itself in float32
    pipe.set_progress_bar_config(disable=True)
    new = as_variant(pipe, diffusers.StableDiffusionImg2ImgPipeline)
    assert new.unet is pipe.unet
    assert (new.unet.dtype, new.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert new._progress_bar_config == {"disable": True}
    assert own_size(new) == (64, 64)


def test_the_size_of_pipelines_that_keep_no_scale_factor():
    pixel, dit = (make(name).pipe for name in ("DDPMPipeline", "DiTPipeline"))
    assert own_size(pixel) == (16, 16)
    factor = 2 ** (len(dit.vae.config.block_out_channels) - 1)
    assert own_size(dit) == (dit.transformer.config.sample_size * factor,) * 2


# from a picture


@pytest.mark.parametrize("family", NAMES)
def test_from_a_picture_and_into_a_mask(call, home, family):
    """A plugin runs in the final pipeline, the strength cuts the steps, and the picture is that of the user's own diffusers call."""
    common = ["run", home / family, "--prompt", "a", "--image", home / "in.png", "--steps", 4, *SIZE, *CALLS.get(family, [])]
    result = good(call(*common, "--strength", 0.5, "-p", "sparse", "--out", "a.png"))
    assert "2 steps" in result.stdout
    assert "skipped 1 of 2" in result.stdout
    assert read_record(Path("a.png")).kind == NAMES[family].replace("Pipeline", "Img2ImgPipeline")
    good(call(*common, "--strength", 0.9, "--mask", home / "mask.png", "--seed", 3, "--out", "b.png"))
    cls = getattr(diffusers, NAMES[family].replace("Pipeline", "InpaintPipeline"))
    parts = {} if family != "sd" else {"safety_checker": None, "feature_extractor": None}
    pipe = cls.from_pretrained(home / family, **parts)
    known = {"max_sequence_length": 16} if family in CALLS else {}
    with Image.open(home / "in.png") as picture, Image.open(home / "mask.png") as mask:
        generator = torch.Generator().manual_seed(3)
        size = {"height": 64, "width": 64}
        own = pipe(
            "a", image=picture, mask_image=mask, strength=0.9, num_inference_steps=4, generator=generator, output_type="np", **size, **known
        )
    assert np.array_equal(pixels("b.png"), (own.images[0].clip(0, 1) * 255).round())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_controlnet(call, home, family):
    common = ["run", home / family, "--prompt", "a", "--controlnet", home / f"net-{family}", "--control-image", home / "in.png"]
    common += ["--steps", 2, *SIZE]
    good(call(*common, "--out", "a.png"))
    good(call(*common, "--image", home / "in.png", "--strength", 1, "--num-images", 2, "--out", "b.png"))
    good(call(*common, "--image", home / "in.png", "--mask", home / "mask.png", "-p", "sparse", "--out", "c.png"))
    stem = NAMES[family].removesuffix("Pipeline") + "ControlNet"
    assert read_record(Path("a.png")).kind == f"{stem}Pipeline"
    assert read_record(Path("b-1.png")).kind == f"{stem}Img2ImgPipeline"
    assert read_record(Path("c.png")).kind == f"{stem}InpaintPipeline"


def test_a_pipeline_with_its_own_controlnet(call, home):
    good(call("run", home / "with-net", "--prompt", "a", "--control-image", home / "in.png", "--steps", 2, *SIZE, "--out", "a.png"))
    assert read_record(Path("a.png")).kind == "StableDiffusionControlNetPipeline"


def test_another_size_is_told(call, home):
    common = ["run", home / "sd", "--prompt", "a", "--image", home / "wide.png", "--steps", 2]
    result = good(call(*common, "--out", "a.png"))
    assert "wide.png: 96x48, scaled and cropped to 64x64" in result.stdout
    assert pixels("a.png").shape[:2] == (64, 64)
    assert "scaled and cropped to 32x64" in good(call(*common, "--height", 64, "--width", 32, "--out", "b.png")).stdout
    assert pixels("b.png").shape[:2] == (64, 32)
    assert "scaled" not in good(call(*common, "--height", 48, "--width", 96, "--out", "c.png")).stdout
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save("glass.png")
    result = good(call("run", home / "sd", "--prompt", "a", "--image", "glass.png", "--steps", 2, "--out", "d.png"))
    assert "transparent parts are taken as white" in result.stdout


RUN = ["run", "{home}/sd", "--prompt", "a", "--out", "x/a.png"]
PICTURE = [*RUN, "--image", "{home}/in.png"]
CONTROL = [*RUN, "--control-image", "{home}/in.png"]
BAD = {
    "mask alone": ([*RUN, "--mask", "{home}/mask.png"], ["--mask goes with --image"]),
    "strength alone": ([*RUN, "--strength", "0.5"], ["--strength goes with --image"]),
    "strength 0": ([*PICTURE, "--strength", "0"], ["--strength 0.0", "above 0"]),
    "strength 2": ([*PICTURE, "--strength", "2"], ["--strength 2.0", "at most 1"]),
    "strength nan": ([*PICTURE, "--strength", "nan"], ["--strength nan"]),
    "no step left": ([*PICTURE, "--strength", "0.1", "--steps", "5"], ["0.1 of 5 steps", "raise one"]),
    "no such picture": ([*RUN, "--image", "no.png"], ["--image no.png", "No such file"]),
    "no picture": ([*RUN, "--image", "{home}/sd/model_index.json"], ["--image", "cannot identify"]),
    "no such mask": ([*PICTURE, "--mask", "no.png"], ["--mask no.png"]),
    "mask of another size": ([*PICTURE, "--mask", "{home}/small.png"], ["32x32", "64x64"]),
    "black mask": ([*PICTURE, "--mask", "{home}/black.png"], ["black all over"]),
    "transparent mask": ([*PICTURE, "--mask", "{home}/alpha.png"], ["transparent", "white where"]),
    "inpainting only": (["run", "{home}/nine", "--image", "{home}/in.png", "--controlnet", "{home}/net-sd", "--out", "x/a.png"],
                        ["--controlnet goes with --control-image"]),
    "no controlnet": (CONTROL, ["--control-image goes with --controlnet"]),
    "no such controlnet": ([*CONTROL, "--controlnet", "nope"], ["no such folder", "owner/name"]),
    "controlnet without a picture": ([*RUN, "--controlnet", "{home}/net-sd"], ["goes with --control-image"]),
    "a pipeline is no controlnet": ([*CONTROL, "--controlnet", "{home}/sd"], ["--controlnet", "cannot be loaded"]),
    "a U-Net is no controlnet": ([*CONTROL, "--controlnet", "{home}/sd/unet"], ["UNet2DConditionModel, not a ControlNetModel"]),
    "controlnet of another model": ([*CONTROL, "--controlnet", "{home}/net-sdxl"], ["made for another model"]),
    "controlnet of another autoencoder": ([*CONTROL, "--controlnet", "{home}/net-coarse"], ["16 times smaller", "autoencoder 8 times"]),
    "its own controlnet unfed": (["run", "{home}/with-net", "--prompt", "a", "--image", "{home}/in.png", "--out", "x/a.png"],
                                 ["needs --control-image"]),
    "no controlnet in the family": (["run", "{home}/flux", "--prompt", "a", "--controlnet", "{home}/net-sd", "--control-image",
                                     "{home}/in.png", "--out", "x/a.png"], ["Unsupported", "FluxPipeline", "ControlNet"]),
    "no such task": (["run", "emoji-wan", "--prompt", "a", "--image", "{home}/in.png", "--out", "x/a.png"],
                     ["Unsupported", "WanPipeline", "image-to-image"]),
}  # fmt: skip
LOADED = {"controlnet of another model", "controlnet of another autoencoder"}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_loaded(call, home, tmp_path, monkeypatch, case):
    words, expected = BAD[case]
    if case not in LOADED:
        monkeypatch.setattr("diffgraft.kernel.loading.read_pipeline", lambda *a, **k: pytest.fail("loaded"))
    result = call(*[word.format(home=home) for word in words])
    assert result.exit_code == 2, result.output + repr(result.exception)
    for text in expected:
        assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "work").iterdir())


# what a file says


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_again_is_the_same_bit_for_bit(call, home, suffix):
    """Of several pictures of one call too: what they were batched with is part of their making."""
    common = ["run", home / "sd", "--prompt", "a röd apple", "--negative-prompt", "blurry", "--steps", 3, *SIZE, "--num-images", 2]
    good(call(*common, "--seed", 4, "-p", "sparse", "-o", "sparse.every=3", "--out", f"a{suffix}"))
    record = read_record(Path(f"a-1{suffix}"))
    assert (record.picture, record.recipe.seed, record.recipe.steps) == (1, 4, 3)
    assert record.recipe.plugins == [("sparse", {"every": 3})]
    assert record.versions["diffgraft-cli-test"] == "1.2"
    assert record.line() == (
        f"a röd apple\nNegative prompt: blurry\nSteps: 3, Sampler: DDIMScheduler, Seed: 5, Size: 64x64, Model: {home / 'sd'}, "
        f"Plugins: sparse(every=3), Version: diffgraft {record.versions['diffgraft-core']}"
    )
    result = good(call("again", f"a-1{suffix}"))
    assert f"wrote a-1-again{suffix}: the same, bit for bit" in result.stdout
    assert record.line() in result.stdout
    assert Path(f"a-1-again{suffix}").read_bytes() == Path(f"a-1{suffix}").read_bytes()


def test_other_programs_read_it(call, home):
    good(call("run", home / "sd", "--prompt", "a pear", "--steps", 2, *SIZE, "--out", "a.png"))
    with Image.open("a.png") as image:
        assert image.text["parameters"].startswith("a pear\nSteps: 2, Sampler: DDIMScheduler, ")
        assert json.loads(image.text["diffgraft"])["recipe"]["prompt"] == "a pear"
    good(call("run", home / "sd", "--prompt", "a pear", "--steps", 2, *SIZE, "--out", "a.jpg"))
    with Image.open("a.jpg") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be").startswith("a pear\nSteps: 2")


def test_a_record_too_long_for_a_file(caplog):
    """A JPEG's EXIF block ends at 64 KiB: the picture is written without, and that is told."""
    recipe = Recipe(pipeline="emoji-sd", prompt="a" * 40_000)
    record = Record(recipe=recipe, kind="P", scheduler="S", size=(8, 8), versions={"diffgraft-core": "1"})
    picture = Image.new("RGB", (8, 8))
    files = {suffix: encode([picture], suffix, record) for suffix in (".png", ".jpg")}
    assert "says nothing of its making" in caplog.text
    assert b"a" * 10_000 not in files[".jpg"]
    with Image.open(io.BytesIO(files[".png"])) as image:
        assert len(image.text["parameters"]) > 40_000


def test_no_metadata(call, home):
    for suffix in (".png", ".jpg", ".webp", ".gif"):
        good(call("run", home / "sd", "--prompt", "secret", "--steps", 1, *SIZE, "--no-metadata", "--out", f"a{suffix}"))
        assert b"secret" not in Path(f"a{suffix}").read_bytes()
    result = call("again", "a.png")
    assert result.exit_code == 2
    assert "does not say how it was made" in result.stderr


def test_again_with_the_same_pictures_only(call, home):
    Path("mine.png").write_bytes((home / "in.png").read_bytes())
    good(call("run", home / "sd", "--prompt", "a", "--image", "mine.png", "--steps", 2, *SIZE, "--out", "a.png"))
    assert read_record(Path("a.png")).recipe.strength == 0.8  # the pipeline's own, said in full
    assert "bit for bit" in good(call("again", "a.png")).stdout
    Path("mine.png").write_bytes((home / "wide.png").read_bytes())
    result = call("again", "a.png", "--out", "b.png")
    assert result.exit_code == 2
    assert "mine.png, which is not there any more or is another file now" in result.stderr


def test_again_tells_when_it_is_not_the_same(call, home):
    good(call("run", home / "sd", "--prompt", "a", "--steps", 2, *SIZE, "--out", "a.png"))
    change(Path("a.png"), lambda record: record["recipe"].update(seed=1) or record["versions"].update(torch="1.0"))
    result = call("again", "a.png")
    assert (result.exit_code, "not the same; made with torch 1.0, here" in result.stdout) == (1, True)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda record: record["recipe"].update(plugins=[["sparze", {}]]), ["PluginNotFound", "did you mean 'sparse'"]),
        (lambda record: record["recipe"].update(seed="a lot"), ["ConfigError", "recipe.seed"]),
        (lambda record: record.update(format=2), ["ConfigError", "format"]),
        (lambda record: record["recipe"].update(run="rm"), ["ConfigError", "recipe.run"]),
        (lambda record: record.clear(), ["ConfigError", "recipe"]),
    ],
)
def test_a_file_that_cannot_be_made_again(call, home, edit, expected):
    good(call("run", home / "sd", "--prompt", "a", "--steps", 1, *SIZE, "-p", "idle", "--out", "a.png"))
    change(Path("a.png"), edit)
    result = call("again", "a.png")
    assert result.exit_code == 2, result.output + repr(result.exception)
    for text in expected:
        assert text in result.stderr


def test_again_of_what_is_no_picture(call, home):
    for name in ("no.png", home / "sd/model_index.json"):
        result = call("again", name)
        assert result.exit_code == 2
        assert "cannot be read as a picture" in result.stderr


def change(path, edit):
    """Write a picture's record anew."""
    from PIL.PngImagePlugin import PngInfo

    with Image.open(path) as image:
        record = json.loads(image.text["diffgraft"])
        edit(record)
        info = PngInfo()
        info.add_text("diffgraft", json.dumps(record))
        image.save(path, pnginfo=info)


# the logger


def test_a_silent_logger_by_default(capfd):
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("diffgraft").handlers)


def test_what_is_told(caplog):
    made = make("StableDiffusionPipeline")
    with caplog.at_level(logging.DEBUG, "diffgraft"):
        pipe = load_pipeline(made.pipe, [Sparse(every=3), Idle()])
        pipe(**{**made.kwargs, "num_inference_steps": 2})
    told = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("diffgraft")]
    assert ("INFO", "sparse(every=3) attached to StableDiffusionPipeline; outermost first: sparse, idle") in told
    assert ("INFO", "idle: inactive: there was nothing to do") in told
    assert ("DEBUG", str(pipe.plugins.report())) in told


def test_the_planners_warnings_are_told_once_attached(caplog, monkeypatch):
    class Other(Idle):
        name = "other"

    from diffgraft import Effects

    monkeypatch.setattr(Other, "effects", Effects(edits=frozenset({"timestep"})))
    monkeypatch.setattr(Idle, "effects", Effects(edits=frozenset({"timestep"})))
    with caplog.at_level(logging.WARNING, "diffgraft"):
        pipe = load_pipeline(make("StableDiffusionPipeline").pipe, [Idle(), Other()])
    assert [record.getMessage() for record in caplog.records] == list(pipe.plugins.plan.warnings) != []


def test_where_an_artefact_came_from(caplog, tmp_path):
    made_for = MadeFor("sparse", "P", {}, "S", {}, 1, (1,))
    Artefact(made_for, {"a": torch.ones(1)}).save(tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "diffgraft"):
        Artefact.load(tmp_path / "a.safetensors", "sparse")
    assert [record.getMessage() for record in caplog.records] == [f"sparse: artefact from {tmp_path / 'a.safetensors'}"]


def test_no_logging_in_a_step(monkeypatch):
    """As many calls of diffgraft's loggers in a run of 8 steps as in one of 2."""
    made = make("StableDiffusionPipeline")
    pipe = load_pipeline(made.pipe, [Sparse(), Slow()])
    asked = []
    real = logging.Logger.isEnabledFor
    monkeypatch.setattr(logging.Logger, "isEnabledFor", lambda self, level: asked.append(self.name) or real(self, level))
    counts = []
    for n in (2, 8):
        asked.clear()
        pipe(**{**made.kwargs, "num_inference_steps": n})
        counts.append(sum(name.startswith("diffgraft") for name in asked))
    assert counts[0] == counts[1] > 0


def test_verbose(call, home):
    common = ["run", home / "sd", "--prompt", "a", "--steps", 2, *SIZE, "-p", "idle", "--out", "a.png"]
    assert good(call(*common)).stderr == ""
    text = good(call("-v", *common)).stderr
    assert "idle() attached to StableDiffusionPipeline" in text
    assert "2 steps in" not in text
    assert "2 steps in" in good(call("-vv", *common)).stderr
    assert good(call(*common)).stderr == ""
    assert logging.getLogger("diffgraft").level == logging.NOTSET
