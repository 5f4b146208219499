"""Artefacts, calibration and second pipelines: what fits is used, what does not is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

import accelerate
import pytest
import torch
from diffgraft import ArtefactMismatch, Calibrator, ConfigError, Conflict, Need, Unsupported, load_pipeline
from diffgraft.cli import app
from diffgraft.kernel.given import describe
from diffgraft.methods.artefacts import Artefact, Fingerprint, MadeFor
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.files import partial_of
from diffgraft.methods.inputs import CallSettings, Sample
from diffusers import EulerDiscreteScheduler
from probes import PAPER, Everything, PluginConfig, Probe, generate, tiny, trace
from pydantic import Field
from safetensors.torch import save_file
from typer.testing import CliRunner


class GainConfig(PluginConfig):
    artefact: Any = Field(None, description="calibration file")
    power: float = Field(1.0, description="a knob that the calibration takes too")


class Meter(Calibrator):
    """Records the mean square of every prediction."""

    name = "gain calibration"
    paper = PAPER
    Config = GainConfig
    runs: ClassVar[int] = 0

    class State:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

    def denoise(self, call, next):
        out = next(call)
        call.shared.seen.append(out.square().mean())
        return out

    def collect(self, call):
        type(self).runs += 1
        return {"power": torch.stack(call.shared.seen)}

    def summarise(self, records):
        return {"gain": torch.stack([r["power"] for r in records]).mean(0)}, {"runs": len(records)}


class Gain(Probe):
    """Multiplies predictions by one number a step from its artefact."""

    name = "gain"
    Config = GainConfig
    needs = (Need("artefact", "artefact"),)
    calibration = Meter

    def denoise(self, call, next):
        artefact = call.given("artefact")
        out = next(call)
        return out if artefact is None else out * artefact.tensors["gain"][call.step.index]


SETTINGS = CallSettings(steps=3, guidance_scale=4.0, height=32, width=32)


def samples(n: int = 2) -> list[Sample]:
    return [Sample(seed=i, prompt=f"picture {i}") for i in range(n)]


@pytest.fixture
def pipe():
    return tiny("StableDiffusionPipeline")[0]


def sized(pipe: Any) -> CallSettings:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return CallSettings(steps=3, guidance_scale=4.0, height=side, width=side)


@pytest.fixture
def artefact(pipe, tmp_path):
    return calibrate(pipe, Gain(), samples(), sized(pipe), tmp_path / "gain.safetensors")


def picture(pipe: Any, **more: Any) -> torch.Tensor:
    settings = sized(pipe)
    kwargs = {"prompt": "x", "num_inference_steps": 3, "guidance_scale": 4.0, "height": settings.height, "width": settings.width}
    return generate(pipe, kwargs | {"output_type": "pt"}, **more)


def test_a_calibrator_that_asks_gets_the_pipeline_and_reads_its_records_one_by_one(pipe, tmp_path):
    class Asking(Meter):
        def modules(self, call, next):
            call.swap(call.denoisers["unet"], "conv_out", torch.nn.Sequential(call.denoisers["unet"].conv_out))
            next(call)

        def summarise(self, records, target):
            assert not isinstance(records, list)
            assert [r["power"].shape for r in records[1:]] == [(3,), (3,)]
            assert records[0]["power"] is not records[0]["power"]  # nothing is held
            own = isinstance(target.denoisers["unet"].conv_out, torch.nn.Sequential)
            return {"gain": torch.stack([r["power"] for r in records]).mean(0)}, {"runs": len(records), "own": own}

    made = calibrate(pipe, type("Asks", (Gain,), {"calibration": Asking})(), samples(3), sized(pipe), tmp_path / "gain.safetensors")
    usual = calibrate(pipe, Gain(), samples(3), sized(pipe), tmp_path / "gain.safetensors")
    assert made.facts["own"]
    assert torch.equal(made.tensors["gain"], usual.tensors["gain"])


def test_calibrate_use_and_leave_no_trace(pipe, tmp_path):
    plain = picture(pipe)
    before = trace(pipe)
    path = tmp_path / "gain.safetensors"
    made = calibrate(pipe, Gain(), samples(3), sized(pipe), path)
    assert trace(pipe) == before
    assert made.facts["runs"] == 3
    assert made.tensors["gain"].shape == (3,)
    assert not path.with_name(path.name + ".partial").exists()
    load_pipeline(pipe, plugins=[Gain(artefact=path)])
    changed = picture(pipe)
    assert not torch.equal(changed, plain)
    pipe.plugins.configure("gain", artefact=None)
    assert torch.equal(picture(pipe), plain)
    pipe.plugins.configure("gain", artefact=made)  # a live one
    assert torch.equal(picture(pipe), changed)


def test_a_calibration_may_make_several_pictures_of_a_prompt(pipe, tmp_path):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    calibrate(pipe, Gain(), samples(1), replace(sized(pipe), extra={"num_images_per_prompt": 3}), tmp_path / "gain.safetensors")
    assert set(rows) == {2 * 3}


def test_another_model_is_refused_before_anything_is_touched(pipe, artefact):
    other = tiny("StableDiffusionPipeline")[0]
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.5)
    before = trace(other)
    with pytest.raises(ArtefactMismatch, match=r"unet: found UNet2DConditionModel with other weights; make one with `diffgraft calibrate"):
        load_pipeline(other, plugins=[Gain(artefact=artefact)])
    assert trace(other) == before
    flux = tiny("FluxPipeline")[0]
    with pytest.raises(ArtefactMismatch, match="made for StableDiffusionPipeline, found FluxPipeline"):
        load_pipeline(flux, plugins=[Gain(artefact=artefact)])


def test_another_scheduler_step_count_or_size_is_refused_before_the_denoiser_runs(pipe, artefact):
    load_pipeline(pipe, plugins=[Gain(artefact=artefact)])
    ran = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(ArtefactMismatch, match="steps: made for 3, found 5"):
        picture(pipe, num_inference_steps=5)
    with pytest.raises(ArtefactMismatch, match="shape of the latents: made for"):
        picture(pipe, height=2 * sized(pipe).height)
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, beta_end=0.02)
    with pytest.raises(ArtefactMismatch, match=r"scheduler.beta_end: made for [\d.]+, found 0.02"):
        picture(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    with pytest.raises(ArtefactMismatch, match=r"found EulerDiscreteScheduler; .*\(pipe.scheduler = EulerDiscreteScheduler.from_config"):
        picture(pipe)
    pipe.scheduler = type("Brought", (EulerDiscreteScheduler,), {"__module__": "diffgraft_someone"}).from_config(own.config)
    with pytest.raises(ArtefactMismatch, match=r"found Brought; .* take off the plugin that brings Brought$"):
        picture(pipe)
    assert not ran
    pipe.scheduler = own
    picture(pipe)


def test_a_file_that_is_missing_foreign_or_damaged(pipe, artefact, tmp_path):
    path = tmp_path / "gain.safetensors"
    with pytest.raises(ConfigError, match=r"no such file; make one with `diffgraft calibrate gain"):
        load_pipeline(pipe, plugins=[Gain(artefact=tmp_path / "none.safetensors")])
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtefactMismatch, match="no diffgraft artefact"):
        load_pipeline(pipe, plugins=[Gain(artefact=tmp_path / "foreign.safetensors")])
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtefactMismatch, match="cannot be read"):
        load_pipeline(pipe, plugins=[Gain(artefact=tmp_path / "cut.safetensors")])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "bent.safetensors").write_bytes(content)
    with pytest.raises(ArtefactMismatch, match="checksum is wrong"):
        load_pipeline(pipe, plugins=[Gain(artefact=tmp_path / "bent.safetensors")])
    with pytest.raises(ArtefactMismatch, match="made for the plugin 'gain', not for 'other'"):
        Artefact.load(path, "other")


def test_an_interrupted_calibration_goes_on(pipe, tmp_path, monkeypatch):
    path = tmp_path / "gain.safetensors"
    collect = Meter.collect

    def stop(self, call):
        if Meter.runs == 2:
            raise KeyboardInterrupt
        return collect(self, call)

    Meter.runs = 0
    monkeypatch.setattr(Meter, "collect", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, Gain(), samples(4), sized(pipe), path)
    assert not path.exists()
    monkeypatch.setattr(Meter, "collect", collect)
    with pytest.raises(ConfigError, match="unfinished calibration with other knobs"):
        calibrate(pipe, Gain(power=2.0), samples(4), sized(pipe), path)
    resumed = calibrate(pipe, Gain(), samples(4), sized(pipe), path)
    assert Meter.runs == 4
    whole = calibrate(pipe, Gain(), samples(4), sized(pipe), tmp_path / "whole.safetensors")
    assert torch.equal(resumed.tensors["gain"], whole.tensors["gain"])


def test_a_plugin_that_is_switched_off_measures_nothing(pipe, tmp_path):
    class Off(Gain):
        neutral: ClassVar[dict[str, Any]] = {"power": 0.0}

    with pytest.raises(ConfigError, match=r"plugin 'gain': power = 0\.0: it is off so, and there is nothing to measure"):
        calibrate(pipe, Off(power=0.0), samples(), sized(pipe), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_one_parameter_that_differs_makes_another_model(pipe):
    """Methods that keep a rounding for each weight fit no other weights; earlier files remember 32 parameters, and still fit theirs."""
    found = Fingerprint.of(pipe.unet)
    assert len(found.weights) == len(list(pipe.unet.parameters()))
    before = replace(found, weights=tuple(found.weights[i * len(found.weights) // 32] for i in range(32)))
    assert before.difference(found) is None
    changed = tiny("StableDiffusionPipeline")[0].unet
    with torch.no_grad():
        changed.mid_block.resnets[0].time_emb_proj.weight.mul_(1.5)
    assert found.difference(Fingerprint.of(changed)) == "UNet2DConditionModel with other weights"


class ReadsUnets(Meter):
    """Looks for what only a U-Net has."""

    def select_blocks(self, blocks):
        raise AssertionError("asked of a pipeline that its plugin is not made for")


class ForUnets(Gain):
    families = ("unets",)
    calibration = ReadsUnets


def test_a_plugin_that_is_not_made_for_the_pipeline_is_refused_before_its_calibrator_looks(tmp_path):
    flux, _ = tiny("FluxPipeline")
    with pytest.raises(Unsupported, match=r"gain does not work on FluxPipeline .*: it is made for unets"):
        calibrate(flux, ForUnets(), [Sample(0, prompt="a")], CallSettings(steps=1), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_calibration_without_prompts_or_without_need(pipe, tmp_path):
    with pytest.raises(ConfigError, match="at least one prompt"):
        calibrate(pipe, Gain(), [], sized(pipe), tmp_path / "a.safetensors")
    with pytest.raises(Unsupported, match=r"everything cannot be calibrated; installed plugins that can: .*ertacache"):
        calibrate(pipe, Everything(), samples(), sized(pipe), tmp_path / "a.safetensors")
    load_pipeline(pipe, plugins=[Everything])
    with pytest.raises(Conflict, match="unload"):
        calibrate(pipe, Gain(), samples(), sized(pipe), tmp_path / "a.safetensors")


def test_a_fingerprint_reads_weights_that_sequential_offload_keeps_elsewhere(pipe):
    offloaded = tiny("StableDiffusionPipeline")[0].unet
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    assert Fingerprint.of(offloaded) == Fingerprint.of(pipe.unet)
    assert all(p.is_meta for p in offloaded.parameters())


def test_a_fingerprint_knows_weights_but_not_dtype_or_lora(pipe):
    mine = Fingerprint.of(pipe.unet)
    assert mine.difference(Fingerprint.of(pipe.unet)) is None
    assert mine.difference(Fingerprint.of(tiny("StableDiffusionPipeline")[0].unet)) is None
    half = tiny("StableDiffusionPipeline")[0].unet.to(torch.bfloat16)
    assert mine.difference(Fingerprint.of(half)) is None
    from peft import LoraConfig

    adapted = tiny("StableDiffusionPipeline")[0].unet
    adapted.add_adapter(LoraConfig(target_modules=["to_q"]))
    assert mine.difference(Fingerprint.of(adapted)) is None
    assert mine.difference(Fingerprint.of(tiny("AnimateDiffPipeline")[0].unet)) == "UNetMotionModel instead of UNet2DConditionModel"
    wider = type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=48)
    assert mine.difference(Fingerprint.of(wider)) == "UNet2DConditionModel with other layers or sizes"


def test_what_an_artefact_says_is_plain_json(pipe, artefact):
    made = MadeFor.describe("gain", pipe, pipe.scheduler, describe(pipe, load_pipeline(pipe).plugins.family).denoisers, 3, (4, 8, 8))
    assert json.loads(json.dumps(made.scheduler_config)) == made.scheduler_config
    assert artefact.made_for.steps == 3


class SecondConfig(PluginConfig):
    model: Any = Field(None, description="a second pipeline")


class Second(Probe):
    """Asks the second pipeline's denoiser instead."""

    name = "second"
    Config = SecondConfig
    needs = (Need("pipeline", "model"),)

    def denoise(self, call, next):
        second = call.given("model")
        if second is None:
            return next(call)
        return getattr(second, call.model_name)(**call.arguments())[0]


def test_a_second_pipeline_by_folder_or_live(pipe, tmp_path):
    kwargs = tiny("StableDiffusionPipeline")[1]
    other = tiny("StableDiffusionPipeline")[0]
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.1)
    expected = generate(other, kwargs)
    other.save_pretrained(tmp_path / "other")
    for model in (str(tmp_path / "other"), other):
        load_pipeline(pipe, plugins=[Second(model=model)])
        assert torch.allclose(generate(pipe, kwargs), expected, atol=1e-5)
        assert torch.equal(generate(other, kwargs), expected)  # untouched
        pipe.plugins.clear()


def test_a_second_pipeline_of_another_space_is_refused(pipe):
    def refused(second: Any, why: str) -> None:
        with pytest.raises(Unsupported, match=why):
            load_pipeline(pipe, plugins=[Second(model=second)])

    refused(tiny("FluxPipeline")[0], "not of the family 'sd'")
    v = tiny("StableDiffusionPipeline")[0]
    v.scheduler = type(v.scheduler).from_config(v.scheduler.config, prediction_type="v_prediction")
    refused(v, "predicts v_prediction, this one epsilon")
    vae = tiny("StableDiffusionPipeline")[0]
    with torch.no_grad():
        for p in vae.vae.parameters():
            p.mul_(1.5)
    refused(vae, "its latent space is another one")
    with pytest.raises(ConfigError, match="model = int"):
        load_pipeline(pipe, plugins=[Second(model=3)])


def test_a_calibration_that_is_stopped_says_how_it_goes_on(monkeypatch, tmp_path):
    def stopped(pipe, plugin, samples, settings, out, **kwargs):
        partial_of(out).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("diffgraft.methods.calibration.calibrate", stopped)
    words = ["calibrate", "ptq4dm", "--pipeline", "emoji-pixel", "--samples", "1", "--out", str(tmp_path / "a.safetensors")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert "a.safetensors.partial, and the same command goes on from there" in " ".join(done.output.split())
