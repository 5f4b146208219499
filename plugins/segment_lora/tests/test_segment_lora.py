"""Experts by noise level against peft's own switching, and the preference fit against its formula written anew."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, DiffgraftError, Effects, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft.methods.adapters import adapter_layers
from diffgraft.methods.examples import Example, read_examples
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft_pipelines.tiny import make
from diffgraft_segment_lora import SegmentLora
from diffgraft_segment_lora import method as m
from diffgraft_segment_lora.fitter import PreferenceFitter, best_and_worst
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

pytest.importorskip("peft", reason="LoRA need it")
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

SD, FLUX, WAN = "StableDiffusionPipeline", "FluxPipeline", "WanPipeline@2.2"


def latents(made, **kwargs):
    """What comes out, from equal noise."""
    arguments = {**made.kwargs, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **kwargs}
    return made.pipe(**arguments)[0]


def lora_file(name, folder, seed, part=None, zero=False):
    """A LoRA of a tiny pipeline, as diffusers writes it; with ``zero`` as a fit begins."""
    pipe = make(name).pipe
    part = part or ("unet" if hasattr(pipe, "unet") else "transformer")
    model = getattr(pipe, part)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=zero, target_modules=["to_q", "to_k", "to_v"]))
    layers = {f"{part.removesuffix('_2')}_lora_layers": get_peft_model_state_dict(model)}
    path = folder / f"{name.partition('@')[0]}-{part}-{seed}{'-zero' * zero}.safetensors"
    type(pipe).save_lora_weights(folder, **layers, weight_name=path.name)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> two LoRA files."""
    folder = tmp_path_factory.mktemp("lora")
    return {name: [lora_file(name, folder, seed) for seed in (1, 2)] for name in (SD, FLUX)}


def grafted(made, *loras, **knobs):
    load_pipeline(made.pipe, plugins=[SegmentLora(lora=list(loras), **knobs)])
    return made


def counts(made):
    part = made.pipe.plugins.report().plugins["segment_lora"]
    return {key: part.total(key) for key in ("LoRA 1", "LoRA 2", "none")}


# levels and segments --------------------------------------------------------------------------------------------------------------------


def test_sigma_is_the_same_for_all_forms_of_a_sample():
    ratio = torch.tensor([0.01, 0.3, 1.0, 7.0], dtype=torch.float64)
    a = (1 + ratio**2).rsqrt()
    preserving, exploding = m.normalised(a, ratio * a), m.normalised(torch.ones(4), ratio)
    s = ratio / (1 + ratio)
    torch.testing.assert_close(preserving, s)
    torch.testing.assert_close(exploding, s)
    torch.testing.assert_close(m.normalised(1 - s, s), s)
    assert m.normalised(torch.tensor(0.0), torch.tensor(1.0)) == 1


def test_a_boundary_belongs_to_the_noisier_side():
    segments = ((1.0, 0.6), (0.6, 0.2))
    table = {1.0: (0,), 0.61: (0,), 0.6: (0,), float(np.float32(0.6)): (0,), 0.59999: (1,), 0.2: (1,), 0.19999: (), 0.0: ()}
    assert {sigma: m.active(sigma, segments) for sigma in table} == table
    assert m.active(0.0, ((1.0, 0.0),)) == (0,)
    assert m.active(0.5, ((1.0, 0.4), (0.6, 0.0))) == (0, 1)


def test_every_level_is_in_exactly_one_of_adjoining_segments():
    segments = ((1.0, 0.7), (0.7, 0.3), (0.3, 0.0))
    levels = [*np.linspace(0, 1, 997), *(np.float32(edge) for edge in (0.7, 0.3)), 0.7 - 2e-6, 0.3 + 2e-6]
    assert all(len(m.active(float(sigma), segments)) == 1 for sigma in levels)


def test_overlaps_are_found():
    assert m.overlapping(((1.0, 0.5), (0.5, 0.0))) is None
    assert m.overlapping(((0.3, 0.0), (1.0, 0.5))) is None
    assert m.overlapping(((1.0, 0.5), (0.2, 0.0), (0.6, 0.4))) == (0, 2)


# the run ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, FLUX])
def test_what_must_change_nothing_changes_nothing(name, files, tmp_path):
    made = make(name)
    plain = latents(made)
    for loras, knobs in (
        ([lora_file(name, tmp_path, 1, zero=True)] * 2, {"segments": ((1, 0.5), (0.5, 0))}),  # B = 0
        (files[name], {"segments": ((1, 0.5), (0.5, 0)), "weights": (0, 0)}),
        (files[name][:1], {"segments": ((1e-5, 0),)}),  # a gap nearly everywhere
    ):
        assert torch.equal(latents(grafted(make(name), *loras, **knobs)), plain)


@pytest.mark.parametrize("name", [SD, FLUX])
def test_one_lora_in_all_segments_is_that_lora(name, files):
    first = files[name][0]
    own = make(name)
    own.pipe.load_lora_weights(first)
    wanted = latents(own)
    assert not torch.equal(wanted, latents(make(name)))
    assert torch.equal(latents(grafted(make(name), first)), wanted)
    assert torch.equal(latents(grafted(make(name), first, first, first, segments=((1, 0.7), (0.7, 0.3), (0.3, 0)))), wanted)
    half = make(name)
    half.pipe.load_lora_weights(first, adapter_name="x")
    half.pipe.set_adapters(["x"], [0.5])
    assert torch.equal(latents(grafted(make(name), first, weights=(0.5,))), latents(half))


def by_peft(made, files, segments, weights=(1.0, 1.0)):
    """The peer: `set_adapters` before each denoiser call, by the level that the scheduler says."""
    pipe = made.pipe
    for number, path in enumerate(files):
        pipe.load_lora_weights(path, adapter_name=f"x{number}")
    model = getattr(pipe, "unet", None) or pipe.transformer
    seen, whole = [], model.forward

    def forward(*args, **kwargs):
        scheduler = pipe.scheduler
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = float(torch.as_tensor(t).flatten()[0])
        if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
            abar = scheduler.alphas_cumprod[int(t)].double()
            sigma = float((1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()))
        elif hasattr(scheduler, "alphas_cumprod"):
            index = int((scheduler.timesteps.double() - t).abs().argmin())
            ratio = scheduler.sigmas[index].double()
            sigma = float(ratio / (1 + ratio))
        else:
            sigma = t
        names = [f"x{k}" for k, (start, end) in enumerate(segments) if end <= sigma < start or sigma >= 1 == start]
        seen.append(tuple(names))
        if names:
            model.enable_adapters()
            model.set_adapters(names, [weights[int(each[1:])] for each in names])
        else:
            model.disable_adapters()
        return whole(*args, **kwargs)

    model.forward = forward
    return seen


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [(SD, None), (SD, EulerDiscreteScheduler), (SD, EulerAncestralDiscreteScheduler), (SD, DPMSolverMultistepScheduler), (FLUX, None)],
)
def test_it_is_what_set_adapters_before_every_step_gives(name, scheduler, files):
    segments, weights, outputs = ((1.0, 0.7), (0.55, 0.1)), (1.0, 0.7), []
    for mine in (False, True):
        made = make(name)
        if scheduler:
            made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
        if mine:
            grafted(made, *files[name], segments=segments, weights=weights)
        else:
            seen = by_peft(made, files[name], segments, weights)
        outputs.append(latents(made, num_inference_steps=8))
    assert len(set(seen)) == 3, "both experts, and a gap"
    assert torch.equal(*outputs)
    assert counts(made) == {"LoRA 1": seen.count(("x0",)), "LoRA 2": seen.count(("x1",)), "none": seen.count(())}


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler, DPMSolverSinglestepScheduler, HeunDiscreteScheduler]
)
def test_it_is_what_weights_with_the_lora_in_them_give(scheduler, files):
    """Without peft: W + w B A put into the denoiser before each call, by abar of the time it is asked for; two prompts, two pictures."""
    segments, weights, outputs, seen = ((1.0, 0.7), (0.55, 0.0)), (1.0, -0.7), [], []
    tensors = [load_file(path) for path in files[SD]]
    for mine in (False, True):
        made = make(SD)
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
        model, whole = made.pipe.unet, made.pipe.unet.forward
        abar = made.pipe.scheduler.alphas_cumprod.double()
        base = {key: value.clone() for key, value in model.state_dict().items()}

        def forward(x, t, *args, _model=model, _whole=whole, _abar=abar, _base=base, **kwargs):
            ratio = ((1 - _abar) / _abar).sqrt()
            t = float(t)
            low, high = (float(ratio[k].log()) for k in (int(t), min(int(t) + 1, 999)))
            ratio = math.exp(low + (t - int(t)) * (high - low))  # a time between two, as Heun or Karras's levels ask for
            on = [k for k, (start, end) in enumerate(segments) if end <= ratio / (1 + ratio) < start]
            now = dict(_base)
            for k in on:
                for key, down in tensors[k].items():
                    if ".lora_A." in key:
                        place = key.removeprefix("unet.").replace(".lora_A.", ".")
                        now[place] = now[place] + weights[k] * tensors[k][key.replace(".lora_A.", ".lora_B.")] @ down
            _model.load_state_dict(now)
            seen.append(tuple(on))
            return _whole(x, t, *args, **kwargs)

        if mine:
            grafted(made, *files[SD], segments=segments, weights=weights)
        else:
            model.forward = forward
        several = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["bad"] * 2, "num_images_per_prompt": 2}
        outputs.append(latents(made, num_inference_steps=7, **several))
    assert set(seen) == {(0,), (1,), ()}
    assert counts(made) == {"LoRA 1": seen.count((0,)), "LoRA 2": seen.count((1,)), "none": seen.count(())}
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_overlapping_segments_act_together_where_that_is_said(files):
    segments, outputs = ((1.0, 0.3), (0.7, 0.0)), []
    for mine in (False, True):
        made = make(SD)
        if mine:
            grafted(made, *files[SD], segments=segments, overlap=True)
        else:
            seen = by_peft(made, files[SD], segments)
        outputs.append(latents(made, num_inference_steps=8))
    assert ("x0", "x1") in seen
    assert torch.equal(*outputs)


class Watch(Plugin):
    """Which LoRA act in each denoiser call, and at what timestep."""

    name = "watch"
    paper = Paper("a test", "", "looks")
    families, neutral, effects = ("*",), {}, Effects()
    seen: list

    def denoise(self, call, next):
        layer = adapter_layers(call.model)[0]
        self.seen.append((float(call.timestep.flatten()[0]), tuple(name[-1] for name in layer.active_adapters), layer.disable_adapters))
        return next(call)


def watched(made, **kwargs):
    watch = Watch()
    watch.seen = []
    made.pipe.plugins.add(watch)
    latents(made, **kwargs)
    return watch.seen


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"timestep_spacing": "trailing"},
        {"cls": EulerDiscreteScheduler},
        {"cls": EulerDiscreteScheduler, "use_karras_sigmas": True},
        {"cls": HeunDiscreteScheduler},
    ],
)
@pytest.mark.parametrize("steps", [3, 7, 12])
def test_the_switch_is_at_a_level_whatever_the_schedule(change, steps, files):
    """X: by the number of the step it would move with the number of steps and with their spacing."""
    made = make(SD)
    cls = change.get("cls", DDIMScheduler)
    made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config, **{key: value for key, value in change.items() if key != "cls"})
    grafted(made, *files[SD], segments=((1.0, 0.6), (0.6, 0.0)))
    abar = DDIMScheduler.from_config(make(SD).pipe.scheduler.config).alphas_cumprod.double().numpy()
    sigmas = np.sqrt(1 - abar) / (np.sqrt(abar) + np.sqrt(1 - abar))
    seen = watched(made, num_inference_steps=steps)
    for t, names, off in seen:
        sigma = np.interp(t, np.arange(len(sigmas)), sigmas)
        if abs(sigma - 0.6) > 1e-3:
            assert (names, off) == (("1",) if sigma >= 0.6 else ("2",), False)
    assert {names for _, names, _ in seen} == {("1",), ("2",)}


def test_a_run_that_begins_in_the_middle_switches_at_the_same_level(files):
    segments = ((1.0, 0.6), (0.6, 0.0))
    made = grafted(make(SD), *files[SD], segments=segments)
    whole = [(t, names) for t, names, _ in watched(made, num_inference_steps=10)]
    other = make("StableDiffusionImg2ImgPipeline")
    assert isinstance(other.pipe, StableDiffusionImg2ImgPipeline)
    grafted(other, *files[SD], segments=segments)
    tail = [(t, names) for t, names, _ in watched(other, num_inference_steps=10, strength=0.7)]
    assert 0 < len(tail) < len(whole)
    assert tail == whole[-len(tail) :]


def test_levels_are_read_once_a_run_and_again_when_the_schedule_is_rewritten(files, monkeypatch):
    read = []
    monkeypatch.setattr("diffgraft_segment_lora.normalised", lambda a, s: read.append(len(s)) or m.normalised(a, s))
    made = grafted(make(SD), *files[SD], segments=((1.0, 0.6), (0.6, 0.0)))
    latents(made, num_inference_steps=6)
    assert read == [6]
    read.clear()

    def rewrite(pipe, step, timestep, tensors):
        if step == 2:
            pipe.scheduler.timesteps[4:] = 0
        return tensors

    latents(made, num_inference_steps=6, callback_on_step_end=rewrite)
    assert read == [6, 3]


def test_segments_that_no_step_is_in_are_told(files):
    made = grafted(make(SD), *files[SD], segments=((1.0, 0.5), (0.0005, 0.0)))
    latents(made, num_inference_steps=4)
    notes = made.pipe.plugins.report().plugins["segment_lora"].notes
    assert len(notes) == 1
    assert "LoRA 2: no step of this run has sigma in 0.0005 to 0" in notes[0]


def test_the_users_own_lora_act_beside(files, tmp_path):
    """Loaded before or after, switched off or weakened: as the user has them."""
    own = lora_file(SD, tmp_path, 9)
    outputs = {}
    for when in ("before", "after", "peer"):
        made = make(SD)
        if when == "after":
            grafted(made, files[SD][0], segments=((1.0, 0.6),))
        made.pipe.load_lora_weights(own, adapter_name="mine")
        made.pipe.set_adapters(["mine"], [0.6])
        if when == "before":
            grafted(made, files[SD][0], segments=((1.0, 0.6),))
        if when == "peer":
            made.pipe.load_lora_weights(files[SD][0], adapter_name="x")
            model, whole = made.pipe.unet, made.pipe.unet.forward

            def forward(x, t, *args, _pipe=made.pipe, _whole=whole, _model=model, **kwargs):
                abar = _pipe.scheduler.alphas_cumprod[int(t)]
                early = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()) >= 0.6
                _model.set_adapters(["mine", "x"] if early else ["mine"], [0.6, 1.0] if early else [0.6])
                return _whole(x, t, *args, **kwargs)

            model.forward = forward
        outputs[when] = latents(made, num_inference_steps=6)
        if when != "peer":
            assert made.pipe.get_active_adapters() == ["mine"]
    assert torch.equal(outputs["before"], outputs["peer"])
    assert torch.equal(outputs["after"], outputs["peer"])
    made = make(SD)
    made.pipe.load_lora_weights(own, adapter_name="mine")
    made.pipe.disable_lora()
    grafted(made, files[SD][0])
    assert torch.equal(latents(made), latents(grafted(make(SD), files[SD][0]))), "what the user has switched off stays off"


def test_it_costs_no_forward(files):
    made = grafted(make(SD), *files[SD], segments=((1.0, 0.6), (0.6, 0.0)))
    latents(made, num_inference_steps=5)
    report = made.pipe.plugins.report()
    assert sum(report.forwards.values()) == sum(report.denoiser_calls.values())


def test_in_half_precision(files):
    made = make(SD)
    made.pipe.to(torch.bfloat16)
    peer = make(SD)
    peer.pipe.to(torch.bfloat16)
    by_peft(peer, files[SD], ((1.0, 0.6), (0.6, 0.0)))
    assert torch.equal(latents(grafted(made, *files[SD], segments=((1.0, 0.6), (0.6, 0.0)))), latents(peer))


def test_two_denoisers(tmp_path):
    """Wan 2.2: each expert may have a LoRA for either; what one has nothing for runs as it is, and the report says so."""
    parts = ("transformer", "transformer_2")
    loras = [{part: lora_file(WAN, tmp_path, seed, part) for part in parts} for seed in (1, 2)]
    plain = latents(make(WAN))
    segments = ((1.0, 0.6), (0.6, 0.0))
    both = latents(grafted(make(WAN), *loras, segments=segments))
    assert not torch.equal(both, plain)
    own = make(WAN)
    own.pipe.load_lora_weights(loras[0]["transformer"])
    own.pipe.load_lora_weights(loras[0]["transformer_2"], load_into_transformer_2=True)
    assert torch.equal(latents(grafted(make(WAN), loras[0], loras[0], segments=segments)), latents(own))
    made = grafted(make(WAN), loras[0]["transformer"])
    first = latents(made)
    assert not torch.equal(first, plain)
    notes = made.pipe.plugins.report().plugins["segment_lora"].notes
    assert notes == ["LoRA 1 has nothing for the transformer_2, which ran without it in its segment"]


def test_a_compiled_denoiser_is_compiled_once_a_segment(files):
    made = grafted(make(SD), *files[SD], segments=((1.0, 0.6), (0.6, 0.0)))
    plain = latents(made, num_inference_steps=8)
    torch._dynamo.reset()
    counted = CompileCounter()  # dynamo's own counters go on through reset(), with what other tests compiled
    made.pipe.unet = torch.compile(made.pipe.unet, backend=counted)
    torch.testing.assert_close(latents(made, num_inference_steps=8), plain)
    assert 2 <= counted.frame_count <= 2 * 3, "once a segment, not at every call"
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"segments": ((0.6, 1.0),)}, r"\[0.6, 1\] does not fall"),
        ({"segments": ((0.5, 0.5),)}, "does not fall"),
        ({"segments": ((1.2, 0.5),)}, "does not fall"),
        ({"segments": ()}, "no segment"),
        ({"segments": ((True, 0),)}, "True is no number"),
        ({"segments": (("1", 0),)}, "'1' is no number"),
        ({"segments": ((1.0, 0.4), (0.5, 0.0)), "lora": ["a", "b"]}, r"\[1.0, 0.4\] and \[0.5, 0.0\] overlap.*overlap=true"),
        ({"segments": ((1.0, 0.5), (0.5, 0.0)), "lora": ["a"]}, "lora has 1 LoRA for 2 segments"),
        ({"lora": ["a", "b"]}, "lora has 2 LoRA for 1 segments"),
        ({"lora": []}, "an empty list"),
        ({"lora": 3}, "int is no LoRA"),
        ({"weights": (1, 1), "lora": "a"}, "for 1 segments"),
        ({"weights": (99,)}, "99 is not in -10 to 10"),
        ({"weights": (math.nan,)}, "weights"),
        ({"segment": ((1, 0),)}, "unknown knob 'segment'.*segments"),
    ],
)
def test_wrong_knobs_are_refused(knobs, says):
    with pytest.raises(ConfigError, match=says):
        SegmentLora(**knobs)


def test_wrong_files_are_refused_and_nothing_is_touched(files, tmp_path):
    made = make(SD)
    plain, modules = latents(made), [id(each) for each in made.pipe.unet.modules()]
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    save_file({name: value[:1] for name, value in load_file(files[SD][0]).items()}, tmp_path / "cut.safetensors")
    for wrong, error, says in (
        (files[FLUX][0], ArtefactMismatch, "lora number 2 = .*is no LoRA of this UNet2D"),
        (str(tmp_path / "cut.safetensors"), ArtefactMismatch, "lora number 2 .*has shape"),
        (str(tmp_path / "damaged.safetensors"), DiffgraftError, "damaged"),
        (str(tmp_path / "none.safetensors"), DiffgraftError, "none.safetensors"),
        ({"unet_2": files[SD][0]}, ConfigError, "no denoiser 'unet_2'"),
    ):
        with pytest.raises(error, match=says):
            grafted(made, files[SD][0], wrong, segments=((1, 0.5), (0.5, 0)))
        unload(made.pipe)
        assert [id(each) for each in made.pipe.unet.modules()] == modules
    assert torch.equal(latents(made), plain)
    made.pipe.load_lora_weights(files[SD][0])
    made.pipe.fuse_lora()
    with pytest.raises(Unsupported, match="unfuse_lora"):
        grafted(made, files[SD][0])


# the fit ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state, b: state.update({b: torch.ones(len(state[b]), 3)}), "is of rank 2, its lora_B of rank 3"),
        (lambda state, b: state.pop(b), "has no lora_B beside it"),
        (lambda state, b: state.pop(b.replace(".lora_B.", ".lora_A.")), "has no lora_A beside it"),
        (lambda state, b: state[b].fill_(float("nan")), "has numbers that are not finite"),
    ],
)
def test_a_lora_whose_halves_do_not_belong_together_is_refused(change, says, files):
    state = load_file(files[SD][0])
    change(state, next(key for key in state if ".lora_B." in key))
    made = make(SD)
    with pytest.raises(ArtefactMismatch, match=says):
        grafted(made, state)
    assert not adapter_layers(made.pipe.unet)


def test_a_dict_that_names_no_denoiser_is_refused():
    with pytest.raises(ConfigError, match=r"names no denoiser.*unet"):
        grafted(make(SD), {})


def test_the_loss_is_the_formula():
    better, better_ref, worse, worse_ref = torch.rand(4, 5, dtype=torch.float64)
    logit = m.preference_logit(worse, worse_ref, better, better_ref, 30.0)
    wanted = np.log1p(np.exp(30 * ((better - better_ref) - (worse - worse_ref)).numpy()))
    np.testing.assert_allclose(m.preference_loss(logit).numpy(), wanted, rtol=1e-12)
    same = m.preference_loss(m.preference_logit(worse, worse, better, better, 30.0))
    assert torch.equal(same, torch.full_like(same, m.START))


def test_equals_are_no_pair():
    best, worst, told = best_and_worst(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [2.0, 2.0, 1.0]]))
    assert (best[[0, 2]].tolist(), worst[[0, 2]].tolist()) == ([1, 0], [0, 2])
    assert told.tolist() == [True, False, True]


def pairs(number=4):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2 * number)]
    return [Example(f"picture {i}", pictures[2 * i], None, pictures[2 * i + 1]) for i in range(number)]


SETTINGS = CallSettings(steps=4, guidance_scale=1.0, height=32, width=32)


class Seen(PreferenceFitter):
    """Keeps what it has computed."""

    kept: ClassVar[list] = []

    def loss(self, session, batch):
        self.before = {name: value.detach().clone() for name, value in self.values().items()}
        found = super().loss(session, batch)
        others = [p for p in self.trained.parameters() if p.requires_grad and not any(p is v for v in self.values().values())]
        self.kept.append((self, batch, found.detach().clone(), others))
        return found

    def drawn(self, batch, like):
        found = super().drawn(batch, like)
        self.last = found
        return found


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(SegmentLora, "fitting", Seen)
    Seen.kept = []
    return Seen.kept


@pytest.mark.parametrize("name", [SD, FLUX])
def test_a_fit_begins_at_log_2_and_moves_its_lora_alone(name, seen, tmp_path):
    made = make(name)
    before = {key: value.clone() for key, value in made.pipe.components["unet" if name == SD else "transformer"].state_dict().items()}
    knobs = {"start": 0.7, "end": 0.4, "rate": 1e-2, "rank": 3, "beta": 50.0}
    found = fit(made.pipe, SegmentLora(), pairs(), SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=4, batch=2), knobs=knobs)
    assert torch.equal(seen[0][2], torch.full((2,), math.log(2)))
    assert not torch.equal(seen[-1][2], torch.full((2,), math.log(2)))
    assert all(not others for *_, others in seen), "nothing else asks for a gradient"
    assert set(found.tensors)
    assert all(".fit." in key for key in found.tensors)
    assert {value.shape[0 if ".lora_A." in key else 1] for key, value in found.tensors.items()} == {3}
    model = made.pipe.components["unet" if name == SD else "transformer"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    _, levels = seen[-1][0].last
    sigma = m.normalised(*levels).flatten()
    assert ((sigma >= 0.4 - 1e-6) & (sigma <= 0.7 + 1e-6)).all()
    plain = latents(made)
    assert not torch.equal(latents(grafted(made, str(tmp_path / "k.safetensors"), segments=((0.7, 0.4),))), plain)


def test_the_loss_of_a_fit_is_the_one_that_diffusers_and_peft_give(seen, tmp_path):
    """The same pairs, times and noise through a second pipeline, with the LoRA as a user would load it."""
    made, beta = make(SD), 70.0
    knobs = {"start": 0.9, "end": 0.3, "rate": 1e-2, "beta": beta}
    fit(made.pipe, SegmentLora(), pairs(2), SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=2, batch=2), knobs=knobs)
    fitter, batch, losses, _ = seen[-1]
    t, _ = fitter.last
    better, worse, _ = batch.made
    generator = torch.Generator().manual_seed(batch.generator.initial_seed())
    assert torch.equal(fitter.times[torch.randint(len(fitter.times), (2,), generator=generator)], t)
    noise = torch.randn(better.shape, generator=generator)
    peer = make(SD).pipe
    abar = peer.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    text = peer.encode_prompt([each.prompt for each in batch.examples], "cpu", 1, False)[0]
    state = {f"unet.{key.replace('.fit.', '.')}": value for key, value in fitter.before.items()}
    peer.load_lora_weights(state, adapter_name="x")
    errors = {}
    for kind, x0 in (("w", better), ("l", worse)):
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        for theta in (True, False):
            (peer.enable_lora if theta else peer.disable_lora)()
            with torch.no_grad():
                errors[kind, theta] = (peer.unet(x, t, text).sample - noise).pow(2).mean((1, 2, 3))
    inside = (errors["w", True] - errors["w", False]) - (errors["l", True] - errors["l", False])
    assert peer.scheduler.config.prediction_type == "epsilon"
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(-beta * inside), rtol=1e-5, atol=1e-6)
    assert inside.abs().max() > 1e-4


def test_pairs_by_a_reward_are_made_by_the_model_as_it_is_in_use(seen, tmp_path):
    asked = []

    def reward(images, prompts):
        asked.append((len(images), list(prompts)))
        return [float(np.asarray(image, dtype=float).mean()) for image in images]

    made = make(SD)
    examples = [Example(f"picture {i}") for i in range(4)]
    knobs = {"start": 0.9, "end": 0.6, "rate": 1e-2, "reward": reward, "candidates": 3}
    fit(made.pipe, SegmentLora(), examples, SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=2, batch=2), knobs=knobs)
    assert [number for number, _ in asked] == [6, 6]
    assert all(prompts[0] == prompts[2] != prompts[3] for _, prompts in asked)
    (_, first, *_), (fitter, second, *_) = seen
    from diffgraft.methods.decoding import decode

    for batch in (first, second):
        better, worse = (reward(decode(made.pipe, fitter.probe.target.family, x, {}), [""] * 2) for x in batch.made[:2])
        assert all(b >= w for b, w in zip(better, worse, strict=True)), (better, worse)


def test_pictures_that_a_reward_finds_equal_teach_nothing(seen, tmp_path):
    """A reward that counts gives many of them; a LoRA that learned from them would learn noise."""
    examples = [Example(f"picture {i}") for i in range(2)]
    knobs = {"rate": 1e-2, "reward": lambda images, prompts: [1.0] * len(images), "candidates": 2}
    found = fit(make(SD).pipe, SegmentLora(), examples, SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=3, batch=2), knobs=knobs)
    assert all(torch.equal(losses, torch.full((2,), math.log(2))) for _, _, losses, _ in seen)
    assert all(not value.any() for key, value in found.tensors.items() if ".lora_B." in key)


def test_a_fit_beside_a_users_lora_is_refused_and_one_fused_is_learned_for(files, seen, tmp_path):
    made = make(SD)
    made.pipe.load_lora_weights(files[SD][0], adapter_name="mine")

    def learn():
        fit(made.pipe, SegmentLora(), pairs(2), SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=1, batch=2))

    for change in (lambda: None, made.pipe.disable_lora):
        change()
        with pytest.raises(Unsupported, match=r"has a LoRA already.*fuse_lora"):
            learn()
    made.pipe.enable_lora()
    with_it = latents(made)
    made.pipe.fuse_lora()
    made.pipe.unload_lora_weights()
    learn()
    assert torch.equal(seen[0][2], torch.full((2,), math.log(2)))
    torch.testing.assert_close(latents(made), with_it, rtol=1e-4, atol=1e-4)


def test_pairs_of_a_folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "worse": "b.png", "text": "x"}, {"file_name": "b.png", "text": "y"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = read_examples(tmp_path)
    assert (first.worse, second.worse) == (tmp_path / "b.png", None)
    made = make(SD)
    with pytest.raises(ConfigError, match=r"b.png has no worse picture: --data FOLDER with .*or --set reward=NAME"):
        fit(made.pipe, SegmentLora(), [first, second], SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=1, batch=1))
    with pytest.raises(ConfigError, match="take one of both"):
        fit(
            made.pipe,
            SegmentLora(),
            [first],
            SETTINGS,
            tmp_path / "k.safetensors",
            FitPlan(1, 1),
            knobs={"reward": lambda images, prompts: []},
        )
    lines[0]["worse"] = "../c.png"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=r"worse = '../c.png' is no picture in"):
        read_examples(tmp_path)
    assert not list(tmp_path.glob("k.safetensors*"))


@pytest.mark.parametrize(
    ("name", "knobs", "error", "says"),
    [
        (SD, {"start": 0.3, "end": 0.6}, ConfigError, "start = 0.3 and end = 0.6 do not fall"),
        (SD, {"start": 1e-5, "end": 0.0}, ConfigError, "no training time of this model has sigma in 1e-05 to 0"),
        (SD, {"candidates": 1}, ConfigError, "candidates"),
        (SD, {"reward": "no_such_reward"}, DiffgraftError, "no_such_reward"),
        (WAN, {"end": 0.2}, Unsupported, "the first of two denoisers"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(name, knobs, error, says, tmp_path):
    examples = [Example("x")] if "reward" in knobs else pairs(1)
    with pytest.raises(error, match=says):
        fit(make(name).pipe, SegmentLora(), examples, SETTINGS, tmp_path / "k.safetensors", FitPlan(steps=1, batch=1), knobs=knobs)
    assert not list(tmp_path.glob("k.safetensors*"))
