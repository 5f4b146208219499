"""Faster Diffusion against its equations, against a U-Net taken apart by hand, and in the places where reuse goes wrong."""

from __future__ import annotations

import gc
import importlib
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, Paper, Plugin, StepOutput, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.testing import contract_cases
from diffgraft_faster_diffusion import FasterDiffusion, is_preserving, method
from diffusers import ControlNetModel, DDIMScheduler, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode

PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "svd": "StableVideoDiffusionPipeline",
    "animatediff": "AnimateDiffPipeline",
    "pixel": "DDIMPipeline",
    "latent_consistency": "LatentConsistencyModelPipeline",
}


def tiny(family="sd", name=None):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name or PIPELINES[family], 0)
    if family != "pixel":
        made.kwargs["output_type"] = "latent"
    return made


def grafted(made, **knobs):
    return load_pipeline(made.pipe, plugins=[("faster_diffusion", knobs)])


def picture(pipe, made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(pipe(generator=torch.Generator().manual_seed(0), **{**made.kwargs, **kwargs})[0])


def part(pipe):
    return pipe.plugins.report().plugins["faster_diffusion"]


def recorded(model, module):
    """A list that gets, for each real forward of ``model``, the rows that ``module``'s first layer got in it (0: it did not run)."""
    calls = []
    model.conv_in.register_forward_pre_hook(lambda *_: calls.append(0))
    leaf = next(m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    leaf.register_forward_pre_hook(lambda _, args: calls.__setitem__(-1, len(args[0])))
    return calls


def key_steps(calls):
    return [i for i, rows in enumerate(calls) if rows]


class Probe(Plugin):
    """Only what ``change(call, next)`` does at ``denoise``."""

    name = "probe"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012

    def __init__(self, change=lambda call, next: next(call)):
        super().__init__()
        self.change = change

    def denoise(self, call, next):
        return self.change(call, next)


class Frozen(Plugin):
    """Keeps x and t as they were at the first step, by giving the denoiser these and undoing every step. Remembers the answers."""

    name = "frozen"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects(edits=frozenset({"latents", "timestep"}))

    def __init__(self, change=lambda call: call):
        super().__init__()
        self.answers = []
        self.sample = None
        self.change = change

    def denoise(self, call, next):
        self.sample = call.sample if self.sample is None else self.sample
        call = call.replace(**{call.family.sample: self.sample, call.family.timestep: torch.tensor(500)})
        out = next(self.change(call))
        self.answers.append(out.clone())
        return out

    def step(self, call, next):
        next(call)
        return StepOutput(call.sample)


class After(Plugin):
    """Remembers what the scheduler gets; changes nothing. It has no hook in the denoiser, so batches stay."""

    name = "after"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.samples, self.predictions = [], []

    def step(self, call, next):
        self.samples.append(call.sample.clone())
        self.predictions.append(call.model_output.clone())
        return next(call)


# key steps --------------------------------------------------------------------------------------------------------------------------


def test_key_steps_are_those_of_the_paper():
    assert [50 - i for i in method.paper_keys(50)] == [50, 49, 48, 47, 45, 40, 35, 25, 15]
    assert [20 - i for i in method.paper_keys(20) if i < 20] == [20, 19, 18, 17, 15, 10, 5]
    floyd = [*range(100, 89, -1), *range(85, 14, -5), *range(14, 0, -1)]
    assert [100 - i for i in method.paper_keys(100)] == floyd


def test_key_steps_that_go_by_the_official_codes_names():
    """Those of its U-Net for Stable Diffusion; ``pro`` is the paper's list for DeepFloyd-IF's third stage too."""
    assert [i for i in method.named_keys("75ls", 75) if i >= 60] == [60, 65, *range(66, 75)]
    assert method.named_keys("75ls", 12) == (*range(10), 10)
    assert [i for i in method.named_keys("100ls", 100) if i > 75] == [80, 85, *range(86, 100)]
    assert [i for i in method.named_keys("s2", 50) if 17 < i < 45] == [18, 19, *range(20, 41, 2), 41, 42, 43, 44]
    assert method.named_keys("pro", 75) == (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)
    assert method.next_key(9, 75, "pro") == 14
    assert FasterDiffusion(keys="75ls").config.keys == "75ls"


@pytest.mark.parametrize("keys", ["paper", 1, 3, (0, 4, 5, 9)])
def test_next_key_walks_through_the_key_steps(keys):
    walked, i = [], 0
    while i < 12:
        walked.append(i)
        i = method.next_key(i, 12, keys)
    assert walked == {"paper": [0, 1, 2, 3, 5, 10], 1: list(range(12)), 3: [0, 3, 6, 9], (0, 4, 5, 9): [0, 4, 5, 9]}[keys]


@pytest.mark.parametrize("parallel", [1, 3, None])
@pytest.mark.parametrize(("knob", "keys"), [("paper", [0, 1, 2, 3, 5, 10]), (5, [0, 5, 10]), ([4, 2], [0, 2, 4])])
def test_the_encoder_runs_at_the_key_steps_and_the_decoder_at_all(knob, keys, parallel):
    made = tiny("pixel")
    unet = made.pipe.unet
    encoder, bottleneck = recorded(unet, unet.down_blocks[0]), recorded(unet, unet.mid_block)
    decoder = recorded(unet, unet.up_blocks[0])
    pipe = grafted(made, keys=knob, parallel=parallel)
    picture(pipe, made, num_inference_steps=12)
    report = part(pipe)
    assert (report.total("computed"), report.total("skipped")) == (len(keys), 12 - len(keys))
    assert len(key_steps(encoder)) == len(key_steps(bottleneck)) == len(keys)
    assert sum(decoder) == 12, "rows"
    if parallel == 1:
        assert key_steps(encoder) == keys
        assert len(decoder) == 12
        assert not report.total("batches")
    elif parallel is None:
        gaps = [b - a - 1 for a, b in zip(keys, [*keys[1:], 12], strict=True)]
        assert [n for n, rows in zip(decoder, encoder, strict=True) if not rows] == [gap for gap in gaps if gap]
    else:
        assert max(decoder) == 3


# layout of a batch of steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branches", "batch", "m"), [(1, 1, 3), (2, 1, 4), (2, 3, 2), (3, 2, 5)])
def test_rows_of_several_steps_keep_branches_whole(branches, batch, m):
    x = torch.randn(branches * batch, 2, 3)
    rows = method.repeat_rows(x, branches, m)
    by_hand = torch.cat([torch.cat([branch] * m) for branch in x.chunk(branches)])
    assert torch.equal(rows, by_hand)
    assert torch.equal(method.repeat_times(torch.arange(m), branches, len(x)), torch.arange(m).repeat_interleave(batch).repeat(branches))
    numbered = rows + method.repeat_times(torch.arange(m), branches, len(x))[:, None, None]
    for k in range(m):
        assert torch.equal(method.rows_of_step(numbered, branches, m, k), x + k)
    nested = method.repeat_all({"a": [x, (x,)], "b": 0.5, "c": torch.tensor(1)}, branches, m)
    assert torch.equal(nested["a"][1][0], by_hand)
    assert (nested["b"], nested["c"]) == (0.5, torch.tensor(1))


def test_same_tells_memory_apart_not_values():
    x = torch.zeros(2, 3)
    assert method.same({"a": [x, 1.0]}, {"a": [x.view(2, 3), 1.0]})
    assert method.same(x.chunk(2)[1], x.chunk(2)[1])
    for other in ({"a": [x.clone(), 1.0]}, {"a": [x, 2.0]}, {"a": [x]}, {"b": [x, 1.0]}, {"a": [x[:1], 1.0]}, {"a": [None, 1.0]}):
        assert not method.same({"a": [x, 1.0]}, other)


# against a U-Net taken apart by hand ------------------------------------------------------------------------------------------------


def encode(unet, x, t, text):
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    x = unet.conv_in(x)
    skips = (x,)
    for block in unet.down_blocks:
        more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, out = block(x, emb, **more)
        skips += out
    return skips, unet.mid_block(x, emb, encoder_hidden_states=text)


def decode(unet, features, t, text):
    skips, x = features
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    for block in unet.up_blocks:
        own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x = block(x, own, emb, **more)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


@torch.no_grad()
def by_hand(pipe, embeds, steps, scale, keys, alpha, into="latents", scheduler=None):
    """The paper's sampler for Stable Diffusion: encoder at ``keys`` only, decoder everywhere, z_t + alpha z_T for t < 500."""
    unet, scheduler = pipe.unet, scheduler or pipe.scheduler
    text = torch.cat([embeds[1], embeds[0]])
    scheduler.set_timesteps(steps)
    z = z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        injected = z + alpha * z_T if t < 500 and i else z
        if into == "latents":
            z = injected
        x = scheduler.scale_model_input(torch.cat([z] * 2), t)
        if i in keys:
            features = encode(unet, x, t, text)
        uncond, cond = decode(unet, features, t, text).chunk(2)
        z = scheduler.step(uncond + scale * (cond - uncond), t, injected if into == "step" else z).prev_sample
    return z.numpy()


@pytest.mark.parametrize("parallel", [1, None])
@pytest.mark.parametrize("into", ["latents", "step"])
def test_the_sampler_written_out_by_hand_gives_the_same(parallel, into):
    made = tiny()
    embeds = made.pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    wanted = by_hand(made.pipe, embeds, 14, 7.5, method.PAPER_KEYS, 0.003, into)
    pipe = grafted(made, parallel=parallel, noise_into=into)
    assert np.abs(picture(pipe, made, num_inference_steps=14) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    pipe.plugins.configure("faster_diffusion", noise=0)
    assert np.abs(picture(pipe, made, num_inference_steps=14) - wanted).max() > 1e-3, "the noise shows"


@pytest.mark.parametrize("parallel", [1, None])
def test_by_hand_with_a_sigma_scheduler(parallel):
    """The official parallel code leaves out ``scale_model_input``."""
    made = tiny()
    made.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    embeds = made.pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    scheduler = diffusers.EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    wanted = by_hand(made.pipe, embeds, 9, 7.5, (0, 3, 6), 0, scheduler=scheduler)
    pipe = grafted(made, keys=3, parallel=parallel)
    assert np.abs(picture(pipe, made, num_inference_steps=9) - wanted).max() <= 1e-4 * np.abs(wanted).max()


# identities -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_every_step_a_key_step_is_bit_equal(family):
    made = tiny(family)
    baseline = picture(made.pipe, made)
    for keys in (1, list(range(40))):
        pipe = grafted(made, keys=keys, noise=0)
        assert np.array_equal(picture(pipe, made), baseline)
        pipe.plugins.clear()
    pipe = grafted(made, keys=2)
    assert not np.array_equal(picture(pipe, made), baseline)
    pipe.plugins.clear()
    assert np.array_equal(picture(made.pipe, made), baseline)
    assert not any("forward" in m.__dict__ for m in made.pipe.unet.modules())


CLASSES = [
    *PIPELINES.items(),
    ("sd", "StableDiffusionInpaintPipeline@9"),
    ("sd", "StableDiffusionControlNetPipeline"),
    ("animatediff", "AnimateDiffControlNetPipeline"),
    ("pixel", "DDPMPipeline"),
]


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_serial_and_parallel_agree(family, name):
    made = tiny(family, name)
    if family == "svd":  # its pipeline multiplies the rounding of its random weights; in float64 there is none to speak of
        made.pipe.to(torch.float64)
    pipe = load_pipeline(made.pipe, plugins=[("faster_diffusion", {"keys": 4, "parallel": 1}), after := After()])
    serial = picture(pipe, made, num_inference_steps=5)
    predictions, after.predictions = after.predictions, []
    pipe.plugins.configure("faster_diffusion", parallel=50)
    together = picture(pipe, made, num_inference_steps=5)
    assert part(pipe).total("batches") == 1, part(pipe).notes
    for one, other in zip(predictions, after.predictions, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    assert np.abs(serial - together).max() <= 1e-5 * max(1, np.abs(serial).max())


@pytest.mark.parametrize("batch", [{"prompt": ["a cat", "two dogs"], "negative_prompt": ["red", "blue"]}, {"num_images_per_prompt": 2}])
def test_serial_and_parallel_agree_in_a_batch(batch):
    made = tiny()
    pipe = grafted(made, keys=4, parallel=1)
    serial = picture(pipe, made, num_inference_steps=6, **batch)
    pipe.plugins.configure("faster_diffusion", parallel=2)
    assert np.abs(serial - picture(pipe, made, num_inference_steps=6, **batch)).max() <= 1e-5 * np.abs(serial).max()
    assert part(pipe).total("batches") == 1, "of two steps; the third is alone"


def test_a_non_key_step_does_not_depend_on_its_sample():
    made = tiny()
    answers = []

    def change(call, next):
        if call.step.index == 1:
            call = call.replace(sample=torch.randn_like(call.sample) * len(answers))
        out = next(call)
        answers.append(out)
        return out

    pipe = load_pipeline(made.pipe, plugins=[Probe(change), ("faster_diffusion", {"keys": 2})])
    picture(pipe, made, num_inference_steps=2)
    picture(pipe, made, num_inference_steps=2)
    assert torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1]), "but on its time"


@pytest.mark.parametrize("family", PIPELINES)
def test_a_non_key_step_with_the_key_steps_inputs_equals_it(family):
    made = tiny(family)
    frozen = Frozen()
    pipe = load_pipeline(made.pipe, plugins=[frozen, ("faster_diffusion", {"keys": 4})])
    picture(pipe, made, num_inference_steps=3)
    assert part(pipe).total("skipped") == 2
    first, *rest = frozen.answers
    assert all(torch.equal(first, other) for other in rest)


def test_freeu_and_adapters_write_in_place_but_reuse_gives_the_same():
    made = tiny()
    shapes = [(2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2), (2, 32, 2, 2)]  # the last one goes behind the mid block
    residuals = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]

    def answers(change=lambda call: call):
        frozen = Frozen(change)
        pipe = load_pipeline(made.pipe, plugins=[frozen, ("faster_diffusion", {"keys": 4})])
        picture(pipe, made, num_inference_steps=3)
        pipe.plugins.clear()
        assert all(torch.equal(frozen.answers[0], answer) for answer in frozen.answers)
        return frozen.answers[0]

    plain = answers()
    adapted = answers(lambda call: call.replace(down_intrablock_additional_residuals=[r.clone() for r in residuals]))
    assert not torch.equal(plain, adapted)
    assert not torch.equal(plain, answers(lambda call: call.replace(down_block_additional_residuals=[r.clone() for r in residuals])))
    made.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert not torch.equal(plain, answers())


def test_freeu_in_a_batch_of_steps():
    made = tiny()
    made.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    pipe = grafted(made, keys=3, parallel=1)
    serial = picture(pipe, made, num_inference_steps=6)
    pipe.plugins.configure("faster_diffusion", parallel=9)
    assert np.abs(serial - picture(pipe, made, num_inference_steps=6)).max() <= 1e-5 * np.abs(serial).max()


# prior noise ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "first"), [(0.5, 5), (0.25, 7), (1.0, 1), (0.0, 10)])
@pytest.mark.parametrize("into", ["latents", "step"])
def test_prior_noise_is_added_below_tau_and_never_to_the_result(tau, first, into):
    """With a U-Net that predicts nothing, DDIM only scales: what is left is the injected noise."""
    made = tiny()
    made.pipe.unet.conv_out.weight.zero_()
    made.pipe.unet.conv_out.bias.zero_()
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, steps_offset=0)
    pipe = grafted(made, noise=0.1, noise_below=tau, noise_into=into)
    result = torch.from_numpy(picture(pipe, made, num_inference_steps=10))
    abar = [*made.pipe.scheduler.alphas_cumprod[range(900, -1, -100)], made.pipe.scheduler.final_alpha_cumprod]
    z = z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in range(10):
        z = z + 0.1 * z_T if i >= first else z
        z = (abar[i + 1] / abar[i]).sqrt() * z
    assert torch.allclose(result, z, rtol=1e-4)


def test_no_noise_by_default_where_latents_are_not_variance_preserving():
    made = tiny()
    pipe = grafted(made, keys=1)
    assert not np.array_equal(picture(pipe, made), picture(tiny().pipe, made))
    assert not any("no prior noise" in note for note in part(pipe).notes)  # the core's own, that nothing was saved, is right: all are keys
    for name, options in [("EulerDiscreteScheduler", {}), ("UniPCMultistepScheduler", {"use_flow_sigmas": True})]:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        with pipe.plugins.disabled():
            baseline = picture(pipe, made)
        assert np.array_equal(picture(pipe, made), baseline)
        assert f"no prior noise: the latents of {name}" in part(pipe).notes[0]


def test_vp_is_told_by_the_scheduler():
    family = SimpleNamespace(prediction="scheduler")
    preserving = [
        "DDIMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "DDPMScheduler",
    ]
    exploding = [
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ]
    assert all(is_preserving(getattr(diffusers, name)(), family) for name in preserving)
    assert not any(is_preserving(getattr(diffusers, name)(), family) for name in exploding)


def test_noise_that_was_asked_for_is_refused_there_before_anything_runs():
    made = tiny("svd")
    with pytest.raises(Unsupported, match=r"noise = 0\.003.*EulerDiscreteScheduler.*set it to 0, or use DDIM"):
        grafted(made, noise=0.003)
    assert not hasattr(made.pipe, "plugins")
    made = tiny()
    calls = recorded(made.pipe.unet, made.pipe.unet)
    pipe = grafted(made, noise=0.003)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(Unsupported, match="HeunDiscreteScheduler"):
        picture(pipe, made)
    assert not any(calls)


# schedulers, sizes, guidance --------------------------------------------------------------------------------------------------------

SCHEDULERS = [  # U-Net calls of 7 steps, and those that begin step 0, 3 and 6
    ("DDIMScheduler", {}, 7, [0, 3, 6]),
    ("PNDMScheduler", {"skip_prk_steps": True}, 8, [0, 4, 7]),
    ("PNDMScheduler", {"skip_prk_steps": False}, 16, [0, 12, 15]),
    ("HeunDiscreteScheduler", {}, 13, [0, 6, 12]),
    ("KDPM2DiscreteScheduler", {}, 13, [0, 6, 12]),
    ("EulerDiscreteScheduler", {}, 7, [0, 3, 6]),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading", "num_train_timesteps": 12}, 7, [0, 3, 6]),
]


@pytest.mark.parametrize(("name", "options", "whole", "wanted"), SCHEDULERS)
def test_every_scheduler_serial_and_parallel(name, options, whole, wanted):
    made = tiny()
    pipe = grafted(made, keys=3, parallel=1)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)  # after attaching
    if options.get("num_train_timesteps"):  # so few that neighbours round to one timestep
        pipe.scheduler = getattr(diffusers, name)(**options)
    calls = recorded(pipe.unet, pipe.unet.mid_block)
    serial = picture(pipe, made, num_inference_steps=7)
    assert key_steps(calls) == wanted
    assert len(calls) == whole
    assert pipe.plugins.report().steps == 7
    keys = len(key_steps(calls))
    calls.clear()
    pipe.plugins.configure("faster_diffusion", parallel=50)
    assert np.abs(serial - picture(pipe, made, num_inference_steps=7)).max() <= 1e-5 * max(1, np.abs(serial).max())
    assert len(key_steps(calls)) == keys
    assert len(calls) < whole


@pytest.mark.parametrize("parallel", [1, None])
def test_image_to_image_keeps_nothing_of_the_previous_picture(parallel):
    made = tiny("sd", "StableDiffusionImg2ImgPipeline")
    pipe = grafted(made, keys=3, parallel=parallel)
    calls = recorded(pipe.unet, pipe.unet.mid_block)
    picture(pipe, made, num_inference_steps=10, strength=0.9)
    assert len(key_steps(calls)) == 3
    calls.clear()
    second = picture(pipe, made, num_inference_steps=10, strength=0.6)
    assert len(key_steps(calls)) == 2
    other = tiny("sd", "StableDiffusionImg2ImgPipeline")
    assert np.array_equal(picture(grafted(other, keys=3, parallel=parallel), other, num_inference_steps=10, strength=0.6), second)


@pytest.mark.parametrize("parallel", [1, None])
def test_guidance_cut_in_mid_run_makes_a_key_step(parallel):
    made = tiny()
    pipe = grafted(made, keys=4, parallel=parallel)
    calls = recorded(pipe.unet, pipe.unet.mid_block)
    cut = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    result = picture(pipe, made, num_inference_steps=8, callback_on_step_end=cut)
    counts = part(pipe).counts
    assert counts["computed"] == {"both": 1, "cond": 2}
    assert counts["skipped"] == {"both": 1, "cond": 4}
    if parallel == 1:
        assert key_steps(calls) == [0, 2, 6]
    else:
        pipe.plugins.configure("faster_diffusion", parallel=1)
        serial = picture(pipe, made, num_inference_steps=8, callback_on_step_end=cut)
        assert np.abs(serial - result).max() <= 1e-5 * np.abs(serial).max()


@pytest.mark.parametrize("parallel", [1, None])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_prompt_exchanged_in_mid_run_reaches_the_decoder_at_once(parallel, in_place):
    made = tiny()

    def exchange(pipe, step, t, tensors):
        x = tensors["prompt_embeds"]
        return {"prompt_embeds": x.mul_(-1) if in_place else x * -1} if step == 1 else {}

    made.kwargs |= {"num_inference_steps": 5, "callback_on_step_end": exchange, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    serial = picture(grafted(tiny(), keys=5, parallel=1), made)
    pipe = grafted(made, keys=5, parallel=parallel)
    assert np.abs(serial - picture(pipe, made)).max() <= 1e-5 * np.abs(serial).max()
    assert parallel == 1 or "got other arguments" in part(pipe).notes[0]


@pytest.mark.parametrize("parallel", [1, None])
def test_size_steps_and_batch_change_between_calls(parallel):
    made = tiny()
    pipe = grafted(made, keys=3, parallel=parallel)
    first = picture(pipe, made, num_inference_steps=5)
    for other in ({"height": 32, "width": 96}, {"num_inference_steps": 9}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}):
        assert len(picture(pipe, made, **other))
    assert np.array_equal(picture(pipe, made, num_inference_steps=5), first)
    assert picture(pipe, made, height=72, width=40).shape[2:] == (9, 5)


# other plugins ----------------------------------------------------------------------------------------------------------------------


def test_two_unet_calls_in_one_step_have_a_cache_each():
    made = tiny()
    alone = picture(grafted(made, keys=2, parallel=1), made)
    made.pipe.plugins.clear()

    def twice(call, next):
        out = next(call)
        next(call.replace(encoder_hidden_states=call["encoder_hidden_states"] * 0))
        return out

    pipe = load_pipeline(made.pipe, plugins=[Probe(twice), ("faster_diffusion", {"keys": 2})])
    assert np.array_equal(picture(pipe, made), alone)
    assert part(pipe).total("computed") == 4


def test_a_swallowed_key_step_is_made_up_for():
    made = tiny()
    calls = recorded(made.pipe.unet, made.pipe.unet.mid_block)
    probe = Probe(lambda call, next: call.sample * 0 if call.step.index in (0, 4) else next(call))
    pipe = load_pipeline(made.pipe, plugins=[probe, ("faster_diffusion", {"keys": [0, 4]})])
    picture(pipe, made, num_inference_steps=7)
    assert key_steps(calls) == [0, 3], "the calls of steps 1 and 5"


@pytest.mark.parametrize("outside", [True, False])
def test_a_plugin_that_edits_the_timestep_makes_it_serial(outside):
    made = tiny()
    times = []

    def later(call, next):
        times.append(call.timestep + 7)
        return next(call.replace(timestep=call.timestep + 7))

    ours = ("faster_diffusion", {"keys": 4})
    seen = []
    made.pipe.unet.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipe = load_pipeline(made.pipe, plugins=[Probe(later), ours] if outside else [ours, Probe(later)])
    picture(pipe, made, num_inference_steps=6)
    assert part(pipe).notes == ["steps were decoded one after the other: probe works in the denoiser step by step"]
    assert len(seen) == 6
    assert all((x == t).all() for x, t in zip(seen, times, strict=True))


def test_inner_hooks_on_the_encoder_are_not_called_at_non_key_steps():
    made = tiny()

    class Blocks(Probe):
        denoise = None
        seen: list

        def block(self, call, next):
            self.seen.append((call.step.index, call.info.kind))
            return next(call)

    inner = Blocks()
    inner.seen = []
    pipe = load_pipeline(made.pipe, plugins=[("faster_diffusion", {"keys": 2}), inner])
    picture(pipe, made, num_inference_steps=2)
    kinds = [block for block, _ in [("down", 0)] * 3] + ["mid"] + ["up"] * 3
    assert inner.seen == [(0, kind) for kind in kinds] + [(1, "up")] * 3


@pytest.mark.parametrize("first", [1, 2])
def test_another_model_that_a_plugin_further_in_asks_gets_the_steps_own_sample(first):
    """As where a small model takes over: inside or outside, its steps are the same."""

    def run(outside):
        made = tiny()
        other = tiny("sd").pipe.unet
        other.conv_out.weight.neg_()

        def take_over(call, next):
            if call.step.index < first:
                return next(call)
            return other(call.sample, call.timestep, encoder_hidden_states=call["encoder_hidden_states"], return_dict=False)[0]

        ours = ("faster_diffusion", {"keys": 3})
        pipe = load_pipeline(made.pipe, plugins=[Probe(take_over), ours] if outside else [ours, Probe(take_over)])
        return picture(pipe, made, num_inference_steps=6)

    assert np.array_equal(run(outside=True), run(outside=False))


def test_unknown_tensor_arguments_make_it_serial():
    made = tiny()
    pipe = grafted(made, keys=3)
    mask = torch.ones(1, 1, 8, 8)
    made.pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    picture(pipe, made, cross_attention_kwargs={"scale": 1.0})
    assert not part(pipe).notes
    picture(pipe, made, cross_attention_kwargs={"ip_adapter_masks": [mask]})
    assert "not known how tensors in cross_attention_kwargs belong to the rows" in part(pipe).notes[0]


def test_it_does_not_go_with_deepcache():
    made = tiny()
    with pytest.raises(Conflict, match="both skip blocks"):
        load_pipeline(made.pipe, plugins=["deepcache", "faster_diffusion"])


# ControlNet -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, None])
@pytest.mark.parametrize("several", [False, True])
def test_the_controlnet_runs_at_key_steps_only(parallel, several):
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    scale = 1.0
    if several:
        nets = [made.pipe.controlnet, ControlNetModel.from_config(made.pipe.controlnet.config).eval()]
        made.pipe.register_modules(controlnet=diffusers.MultiControlNetModel(nets))
        made.kwargs["image"], scale = [made.kwargs["image"]] * 2, [1.0, 0.5]
    first = made.pipe.controlnet.nets[0] if several else made.pipe.controlnet
    control = recorded(first, first)
    encoder = recorded(made.pipe.unet, made.pipe.unet.mid_block)
    pipe = grafted(made, keys=[0, 1, 4], parallel=parallel)
    picture(pipe, made, num_inference_steps=7, controlnet_conditioning_scale=scale)
    assert len(key_steps(control)) == len(key_steps(encoder)) == 3
    assert part(pipe).counts["control_computed"] == {"run": 3}
    assert part(pipe).counts["control_skipped"] == {"run": 4}


def test_a_non_key_step_gets_the_key_steps_residuals_once():
    """With an unchanged time the prediction is the key step's: residuals are neither lost nor added twice."""
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    frozen = Frozen()
    pipe = load_pipeline(made.pipe, plugins=[frozen, ("faster_diffusion", {"keys": 4})])
    picture(pipe, made, num_inference_steps=3)
    assert all(torch.equal(frozen.answers[0], answer) for answer in frozen.answers)


@pytest.mark.parametrize("parallel", [1, None])
def test_the_controlnets_scale_is_obeyed_between_key_steps(parallel):
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    control = recorded(made.pipe.controlnet, made.pipe.controlnet)
    pipe = grafted(made, keys=10, parallel=parallel)
    ended = picture(pipe, made, num_inference_steps=10, control_guidance_end=0.5)
    assert len(control) == 2
    assert part(pipe).counts["control_computed"] == {"run": 2}, "and once where its end was reached"
    whole = picture(pipe, made, num_inference_steps=10)
    assert np.abs(ended - whole).max() > 1e-3
    pipe.plugins.configure("faster_diffusion", parallel=1)
    serial = picture(pipe, made, num_inference_steps=10, control_guidance_end=0.5)
    assert np.abs(serial - ended).max() <= 1e-5 * np.abs(serial).max()


def test_guess_mode_in_which_the_pipeline_makes_new_residuals_at_every_step():
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    made.kwargs |= {"num_inference_steps": 6, "guess_mode": True}
    pipe = grafted(made, keys=4)
    one = picture(pipe, made)
    assert part(pipe).counts["control_computed"] == {"run": 2}
    assert "got other arguments" in part(pipe).notes[0]
    pipe.plugins.configure("faster_diffusion", parallel=1)
    assert np.abs(one - picture(pipe, made)).max() <= 1e-5 * np.abs(one).max()


# memory -----------------------------------------------------------------------------------------------------------------------------


def test_nothing_is_held_after_the_last_step():
    made = tiny("sd", "StableDiffusionControlNetPipeline")
    pipe = grafted(made, keys=3)

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    picture(pipe, made)
    before = alive()
    picture(pipe, made)
    assert alive() == before
    latents = 4 * 8 * 8 * 4
    assert part(pipe).state_bytes == latents, "z_T; features were freed before the picture is decoded"
    assert set(vars(pipe.plugins["faster_diffusion"])) == {"config"}


def test_serial_reuse_copies_nothing():
    """What the decoder gets at a non-key step is the key step's own tensors."""
    made = tiny()
    got = []
    made.pipe.unet.up_blocks[-1].register_forward_pre_hook(
        lambda _, args, kwargs: got.append([x.data_ptr() for x in kwargs["res_hidden_states_tuple"][1:]]), with_kwargs=True
    )
    picture(grafted(made, keys=3, parallel=1), made, num_inference_steps=3)
    assert got[0] == got[1] == got[2]


class CountReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parallel", [1, None])
def test_no_value_is_read_on_the_host_in_a_step(parallel):
    made = tiny()

    def reads(steps):
        with CountReads() as count:
            picture(made.pipe, made, num_inference_steps=steps)
        return count.n

    before = reads(9) - reads(5)
    grafted(made, keys=4, parallel=parallel)
    assert reads(9) - reads(5) == before


# refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [0, -1, "often", [0, -2], [0.5], 2.5, None])
def test_bad_keys_are_refused(keys):
    with pytest.raises(ConfigError, match=r"keys.*'paper', .*'pro', an interval"):
        FasterDiffusion(keys=keys)


@pytest.mark.parametrize("knobs", [{"parallel": 0}, {"noise": -0.1}, {"noise_below": 1.5}, {"noise_into": "model"}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        FasterDiffusion(**knobs)


def test_the_first_step_always_is_a_key_step():
    assert FasterDiffusion(keys=[4, 2, 2]).config.keys == (0, 2, 4)


def test_dits_and_families_without_an_encoder_are_refused(monkeypatch):
    with pytest.raises(Unsupported, match="faster_diffusion does not work on"):
        grafted(tiny("pixart", "PixArtSigmaPipeline"))
    sd = registry.families()["sd"]
    monkeypatch.setattr(registry, "load_families", lambda **_: ({"sd": replace(sd, blocks=sd.blocks[2:])}, {}))
    with pytest.raises(Unsupported, match=r"kinds \['up'"):
        grafted(tiny())


@pytest.mark.parametrize(
    "config",
    [
        {"mid_block_type": None},
        {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D")},
        {"layers_per_block": 1},
    ],
)
def test_other_unets(config):
    made = tiny("pixel")
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(sample_size=16, block_out_channels=(32, 32), norm_num_groups=8, **{**blocks, **config})
    made.pipe.register_modules(unet=unet.eval())
    frozen = Frozen()
    pipe = load_pipeline(made.pipe, plugins=[frozen, ("faster_diffusion", {"keys": 2})])
    picture(pipe, made, num_inference_steps=2)
    assert torch.equal(*frozen.answers)
    pipe.plugins.remove("frozen")
    pipe.plugins.configure("faster_diffusion", keys=3, parallel=1)
    serial = picture(pipe, made, num_inference_steps=6)
    pipe.plugins.configure("faster_diffusion", parallel=None)
    assert np.abs(serial - picture(pipe, made, num_inference_steps=6)).max() <= 1e-5 * max(1, np.abs(serial).max())


# the contract with batches of steps -------------------------------------------------------------------------------------------------


class Parallel(FasterDiffusion):
    """The contract suite takes what ``active`` says, which is serial: batches of steps differ in the last bits from what neighbours see."""

    active = {"keys": 3, "noise": None}  # noqa: RUF012


CASES = {"exception", "sample_alone", "guidance_cut", "ip_adapter"}


def parallel_cases():
    return [case for case in contract_cases(Parallel, ["sd"]) if case.check.name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("case", parallel_cases(), ids=str)
def test_contract_in_parallel(case):
    case.run()
