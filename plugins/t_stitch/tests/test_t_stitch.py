"""T-Stitch: shares by brute force, pipelines against hand-written loops, the ends bit for bit, other plugins beside it, refusals."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from itertools import pairwise

import diffusers
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.testing.tiny import EMBED, add_ip_adapter, add_lora
from diffgraft_pipelines.tiny import _common as common
from diffgraft_pipelines.tiny import make
from diffgraft_t_stitch.method import ends_by_begin, ends_by_steps, ends_by_time, model_at

SD = registry.families()["sd"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
ENCODERS = ("text_encoder", "tokenizer", "image_encoder")


def pair(name, own_text=False):
    """(large, small, call arguments): one latent space, denoisers with other weights, text encoders the same or not, a scheduler each."""
    made, small = make(name, 0), make(name, 1).pipe
    for part, component in made.pipe.components.items():
        shared = part.startswith(ENCODERS) and not own_text
        if part.startswith(("vae", "feature_extractor")) or shared:
            setattr(small, part, component)
    return made.pipe, small, {**made.kwargs, "output_type": "latent"}


def narrow(small, width=48):
    """Give a Stable Diffusion pipeline a text encoder of another size and a U-Net of half the width."""
    config = {**small.unet.config, "block_out_channels": (8, 16, 16), "cross_attention_dim": width}
    with common.seeded(3):
        unet = type(small.unet).from_config(config)
        small.register_modules(unet=unet.eval().requires_grad_(False), text_encoder=common.clip_text(small.tokenizer, hidden=width).eval())
        if hasattr(small, "controlnet"):
            control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
            common.randomise(control)
            small.register_modules(controlnet=control.eval())
    return small


def stitched(large, model, fraction, *, beside=(), **knobs):
    return load_pipeline(large, plugins=[("t_stitch", {"model": model, "fraction": fraction, **knobs}), *beside])


def picture(pipe, kwargs, **more):
    out = pipe(generator=torch.Generator().manual_seed(5), **{**kwargs, **more})[0]
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


def calls_of(*models):
    """A list that gets the number of each model that really runs: its first layer does (the model's own forward may be replaced)."""
    calls = []
    for number, model in enumerate(models):
        first_layer(model).register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def first_layer(model):
    return next(module for module in model.modules() if not any(module.children()))


class Probe(Plugin):
    """Remembers at which steps each of its points was reached."""

    name = "probe"
    paper = Paper("a probe", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects()

    def __init__(self):
        super().__init__()
        self.denoised, self.blocks = [], []

    def denoise(self, call, next):
        self.denoised.append(call.step.index)
        return next(call)

    def block(self, call, next):
        self.blocks.append(call.step.index)
        return next(call)

    def select_blocks(self, blocks):
        return [block for block in blocks if block.kind == "mid"]


# the shares -------------------------------------------------------------------------------------------------------------------------

TENTHS = [(a / 10,) for a in range(11)] + [(0.1, 0.2), (0.3, 0.4), (0.2, 0.5, 0.3), (0.0, 0.7), (0.6, 0.0)]


def brute(r, T, belongs):
    """Model of every step, by the rule as the authors write it, with exact fractions."""
    shares = [Fraction(round(x * 10), 10) for x in r]
    cumulative = [sum(shares[: k + 1]) for k in range(len(r))]
    return [next((k for k, R in enumerate(cumulative) if belongs(i, T, R)), len(r)) for i in range(T)]


@pytest.mark.parametrize("r", TENTHS, ids=str)
def test_shares_are_those_of_the_rules(r):
    for T in range(1, 61):
        ends = ends_by_steps(r, T)
        assert [model_at(i, ends) for i in range(T)] == brute(r, T, lambda i, T, R: Fraction(i + 1, T) <= R)
        ends = ends_by_begin(r, T)
        assert [model_at(i, ends) for i in range(T)] == brute(r, T, lambda i, T, R: R > 0 and Fraction(i, T) <= R)


@pytest.mark.parametrize("r", TENTHS, ids=str)
def test_shares_by_timestep(r):
    for t in ([990 - 10 * i for i in range(100)], [999, 990, 981, 600, 300, 20, 1]):
        ends = ends_by_time(r, t, 1000)
        assert [model_at(i, ends) for i in range(len(t))] == brute(r, len(t), lambda i, T, R, t=t: R > 0 and Fraction(t[i], 1000) >= 1 - R)
    evenly = [990 - 10 * i for i in range(100)]
    assert ends_by_time(r, evenly, 1000) == ends_by_steps(r, 100)  # DiT, DDIM 100: the rules agree


def test_where_shares_by_timestep_differ_from_the_authors_floats():
    """Their DiT asks t / 1000 >= 1 - r: one step less at r = 0.7, where 1 - r is a little more than 0.3; else the same."""
    for T in (50, 100, 250):
        t = [1000 - 1000 // T * (i + 1) for i in range(T)]
        for r in (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0):
            theirs = sum(value / 1000 >= (1 - r) for value in t)
            assert ends_by_time((r,), t, 1000) == (theirs + (r == 0.7),)


def test_parts_follow_each_other():
    for T in (1, 3, 10, 50):
        ends = ends_by_steps((0.25, 0.25, 0.25), T)
        assert list(ends) == sorted(ends)
        models = [model_at(i, ends) for i in range(T)]
        assert models == sorted(models)
    assert ends_by_steps((0.0,), 50) == (0,) == ends_by_begin((0.0,), 50)
    assert ends_by_steps((1.0,), 50) == (50,) == ends_by_begin((1.0,), 50)
    assert ends_by_time((0.0,), [1000.0, 500.0], 1000) == (0,)  # a flow model's first timestep is 1000


# the ends ---------------------------------------------------------------------------------------------------------------------------

ENDS = [
    ("StableDiffusionPipeline", False),
    ("StableDiffusionInpaintPipeline@9", True),
    ("LatentConsistencyModelPipeline", True),
    ("StableDiffusionXLPipeline", True),
    ("StableVideoDiffusionPipeline", True),
    ("DDIMPipeline", False),
    ("DiTPipeline", False),
    ("PixArtSigmaPipeline", True),
    ("StableDiffusion3Pipeline", True),
    ("FluxPipeline", False),
    ("FluxPipeline", True),
    ("QwenImagePipeline", True),
    ("WanPipeline", True),
    ("WanImageToVideoPipeline", True),
    ("LTXPipeline", True),
]


@pytest.mark.parametrize(("name", "own_text"), ENDS)
def test_at_one_it_is_the_small_pipeline_and_at_nought_the_large_one(name, own_text):
    """``own_text``: the small pipeline's text and picture encoders have weights of their own."""
    large, small, kwargs = pair(name, own_text)
    kwargs["num_inference_steps"] = 3 if "strength" in kwargs else 2
    if name == "DDIMPipeline":
        kwargs["output_type"] = "np"
    alone = picture(small, kwargs)
    baseline = picture(large, kwargs)
    assert not torch.equal(alone, baseline)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    pipe.plugins.configure("t_stitch", fraction=0.0)
    assert torch.equal(picture(pipe, kwargs), baseline)
    pipe.plugins.configure("t_stitch", fraction=0.5)
    between = picture(pipe, kwargs)
    assert not torch.equal(between, alone)
    assert not torch.equal(between, baseline)
    if name.startswith("Stable"):
        assert torch.equal(picture(small, kwargs), alone)  # nothing of the run stays on the small pipeline


CHANGES = (
    {"guidance_scale": 1.0},
    {"num_images_per_prompt": 2},
    {"prompt": ["a cat", "two green dogs"], "negative_prompt": ["blurry", "a drawing"]},
    {"negative_prompt": None, "height": 32, "width": 96},
    {"num_inference_steps": 7},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_small_model_with_another_size_of_text_embeddings(change):
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    kwargs |= change
    narrow(small)
    alone = picture(small, kwargs)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    assert pipe.plugins.report().plugins["t_stitch"].total("large") == 0


def test_one_scheduler_may_serve_both():
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    alone = picture(narrow(small), kwargs)
    small.scheduler = large.scheduler
    assert torch.equal(picture(stitched(large, small, 1.0), kwargs), alone)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_image_to_image_with_a_small_text_to_image_pipeline(name):
    """Strength leaves a one-step run no step and SDXL's sizes are the picture's: neither may reach the conditioning."""
    large, small, kwargs = pair(name, own_text=True)
    kwargs |= {"strength": 0.5, "num_inference_steps": 6}
    alone = picture(small, kwargs)
    cls = getattr(diffusers, name.replace("Img2Img", ""))
    names = set(small.components)
    text = cls(**{k: v for k, v in small.components.items() if k in names})
    assert torch.equal(picture(stitched(large, text, 1.0), kwargs), alone)


def test_sdxl_split_over_two_pipelines():
    large, small, kwargs = pair("StableDiffusionXLPipeline", own_text=True)
    kwargs |= {"denoising_end": 0.5, "num_inference_steps": 6}
    alone = picture(small, kwargs)
    assert torch.equal(picture(stitched(large, small, 1.0), kwargs), alone)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline"])
def test_stitched_with_itself_or_its_twin_nothing_changes(name):
    made = make(name, 0)
    kwargs = {**made.kwargs, "output_type": "latent"}
    baseline = picture(made.pipe, kwargs)
    twin = make(name, 0).pipe
    for small in (twin, made.pipe):
        for fraction in (0.3, 0.5, 1.0):
            pipe = stitched(made.pipe, small, fraction)
            assert torch.equal(picture(pipe, kwargs), baseline)
            assert pipe.plugins.report().plugins["t_stitch"].total("small") > 0
            pipe.plugins.clear()


# in between -------------------------------------------------------------------------------------------------------------------------


def by_hand(large, small, kwargs, steps, of_small, cut=None):
    """Stable Diffusion's loop, written out: which model runs is given call by call; guidance is off after step ``cut``."""
    scheduler = type(large.scheduler).from_config(large.scheduler.config)
    scheduler.set_timesteps(steps)
    prompts = {}
    for pipe in (large, small):
        cond, uncond = pipe.encode_prompt(kwargs["prompt"], "cpu", 1, True, kwargs["negative_prompt"])
        prompts[pipe] = torch.cat([uncond, cond])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        pipe = small if i in of_small else large
        guided = cut is None or i <= cut
        text = prompts[pipe] if guided else prompts[pipe].chunk(2)[1]
        out = pipe.unet(scheduler.scale_model_input(torch.cat([x] * len(text)), t), t, encoder_hidden_states=text).sample
        if guided:
            uncond, cond = out.chunk(2)
            out = uncond + kwargs["guidance_scale"] * (cond - uncond)
        x = scheduler.step(out, t, x).prev_sample
    return x


BETWEEN = [
    ("DDIMScheduler", {}, 5, 0.4, range(2)),
    ("DDIMScheduler", {}, 5, 0.5, range(2)),
    ("EulerDiscreteScheduler", {}, 4, 0.5, range(2)),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 5, 0.6, range(3)),
    ("PNDMScheduler", {"skip_prk_steps": True}, 4, 0.4, range(2)),  # five calls
    ("HeunDiscreteScheduler", {}, 4, 0.5, range(4)),  # a solver step is two calls, but the last
    ("HeunDiscreteScheduler", {}, 4, 0.75, range(6)),
    ("HeunDiscreteScheduler", {}, 4, 0.8, range(6)),
    ("KDPM2DiscreteScheduler", {}, 3, 0.4, range(2)),
]


@pytest.mark.parametrize(("name", "options", "steps", "fraction", "of_small"), BETWEEN)
def test_the_trajectory_is_the_small_models_and_then_the_large_ones(name, options, steps, fraction, of_small):
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    narrow(small)
    pipe = stitched(large, small, fraction)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)  # after attaching
    with torch.no_grad():
        expected = by_hand(large, small, kwargs, steps, of_small)
    assert torch.equal(picture(pipe, kwargs, num_inference_steps=steps), expected)
    counts = pipe.plugins.report().plugins["t_stitch"]
    assert counts.total("small") == len(of_small)
    report = pipe.plugins.report()
    assert report.steps == steps
    assert counts.total("small") + counts.total("large") == sum(report.denoiser_calls.values())


def test_guidance_cut_in_mid_run_leaves_the_small_model_its_conditional_rows():
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    narrow(small)
    with torch.no_grad():
        expected = by_hand(large, small, kwargs, 5, range(4), cut=1)
    pipe = stitched(large, small, 0.8)
    cut = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    assert torch.equal(picture(pipe, kwargs, num_inference_steps=5, callback_on_step_end=cut), expected)
    counts = pipe.plugins.report().plugins["t_stitch"].counts
    assert counts == {"small": {"both": 2, "cond": 2}, "large": {"cond": 1}}


@pytest.mark.parametrize("own_text", [False, True])
def test_a_prompt_that_a_callback_changes_is_followed_or_the_report_says_that_it_is_not(own_text):
    large, small, kwargs = pair("StableDiffusionPipeline", own_text)
    stitched(large, small, 0.5)

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0) + 1} if step == 0 else {}

    plain = picture(large, kwargs)
    assert not large.plugins.report().plugins["t_stitch"].notes
    changed = picture(large, kwargs, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not torch.equal(changed, plain)
    assert any("changed the prompt" in note for note in large.plugins.report().plugins["t_stitch"].notes) == own_text


def test_three_models_take_turns():
    large, middle, kwargs = pair("StableDiffusionPipeline")
    smallest = pair("StableDiffusionPipeline")[1]
    smallest.vae, smallest.text_encoder = large.vae, large.text_encoder
    calls = calls_of(smallest.unet, middle.unet, large.unet)
    pipe = stitched(large, [smallest, middle], (0.3, 0.4))
    picture(pipe, kwargs, num_inference_steps=10)
    assert calls == [0] * 3 + [1] * 4 + [2] * 3
    report = pipe.plugins.report().plugins["t_stitch"]
    assert report.counts == {"small 1": {"both": 3}, "small 2": {"both": 4}, "large": {"both": 3}}
    calls.clear()
    pipe.plugins.configure("t_stitch", fraction=(0.0, 1.0))
    picture(pipe, kwargs, num_inference_steps=10)
    assert calls == [1] * 10


@pytest.mark.parametrize(("rule", "steps", "of_small"), [("steps", 4, 1), ("begin", 4, 2), ("time", 4, 2), ("begin", 8, 3)])
def test_the_rules_on_a_pipeline(rule, steps, of_small):
    large, small, kwargs = pair("LatentConsistencyModelPipeline")
    calls = calls_of(small.unet, large.unet)
    picture(stitched(large, small, 0.25, rule=rule), kwargs, num_inference_steps=steps)
    assert calls == [0] * of_small + [1] * (steps - of_small)


def test_by_timestep_the_share_of_a_shifted_schedule_is_larger():
    large, small, kwargs = pair("StableDiffusion3Pipeline")
    large.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = stitched(large, small, 0.4, rule="time")
    picture(pipe, kwargs, num_inference_steps=10)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    expected = int((scheduler.timesteps >= 600).sum())
    assert expected > 4
    assert pipe.plugins.report().plugins["t_stitch"].total("small") == expected
    pipe.plugins.configure("t_stitch", rule="steps")
    picture(pipe, kwargs, num_inference_steps=10)
    assert pipe.plugins.report().plugins["t_stitch"].total("small") == 4


def test_by_timestep_heuns_two_calls_stay_together():
    large, small, kwargs = pair("StableDiffusionPipeline")
    large.scheduler = diffusers.HeunDiscreteScheduler.from_config(large.scheduler.config)
    calls = calls_of(small.unet, large.unet)
    picture(stitched(large, small, 0.5, rule="time"), kwargs, num_inference_steps=5)
    t = large.scheduler.timesteps[::2]
    assert calls == [0] * (2 * int((t >= 500).sum())) + [1] * (9 - 2 * int((t >= 500).sum()))
    assert 0 < calls.index(1) < 9


def test_image_to_image_counts_the_steps_that_run():
    large, small, kwargs = pair("StableDiffusionImg2ImgPipeline")
    calls = calls_of(small.unet, large.unet)
    pipe = stitched(large, small, 0.5)
    picture(pipe, kwargs, num_inference_steps=10, strength=0.6)
    assert calls == [0] * 3 + [1] * 3


# what else is on the pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("own_text", [False, True])
def test_the_small_pipelines_own_controlnet_runs_in_its_steps(own_text, guess_mode):
    large, small, kwargs = pair("StableDiffusionControlNetPipeline", own_text)
    kwargs["guess_mode"] = guess_mode
    if own_text:
        narrow(small)
    alone = picture(small, kwargs)
    calls = calls_of(small.controlnet, large.controlnet)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    pipe.plugins.configure("t_stitch", fraction=0.5)
    calls.clear()
    picture(pipe, kwargs)
    assert calls == [0] * own_text + [0, 0, 1, 1]  # it also runs once when the small pipeline is asked for its conditioning


def test_without_one_the_large_controlnet_serves_a_unet_of_the_same_layout():
    large, small, kwargs = pair("StableDiffusionControlNetPipeline")
    parts = {name: part for name, part in small.components.items() if name != "controlnet"}
    plain = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    small.controlnet = large.controlnet
    alone = picture(small, kwargs)  # the small U-Net under the large one's ControlNet
    assert torch.equal(picture(stitched(large, plain, 1.0), kwargs), alone)


def test_a_controlnet_does_not_fit_a_unet_of_another_layout():
    large, small, _ = pair("StableDiffusionControlNetPipeline", own_text=True)
    narrow(small)
    parts = {name: part for name, part in small.components.items() if name != "controlnet"}
    plain = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(Unsupported, match=r"residuals do not fit its unet \(block_out_channels.*ControlNet of its own"):
        stitched(large, plain, 0.5)
    small.controlnet = diffusers.MultiControlNetModel([small.controlnet])
    with pytest.raises(Unsupported, match="1 MultiControlNetModel, this pipeline 1 ControlNetModel"):
        stitched(large, small, 0.5)


@needs_peft
def test_a_lora_on_the_large_model_shows_in_its_steps_only():
    large, small, kwargs = pair("StableDiffusionPipeline")
    pipe = stitched(large, small, 1.0)
    alone = picture(pipe, kwargs)
    pipe.plugins.configure("t_stitch", fraction=0.5)
    before = picture(pipe, kwargs)
    add_lora(pipe, SD)
    assert not torch.equal(picture(pipe, kwargs), before)
    pipe.plugins.configure("t_stitch", fraction=1.0)
    assert torch.equal(picture(pipe, kwargs, cross_attention_kwargs={"scale": 0.5}), alone)


@needs_peft
def test_four_lcm_steps_with_a_lora_on_both():
    large, small, kwargs = pair("StableDiffusionPipeline")
    kwargs |= {"guidance_scale": 1.0, "num_inference_steps": 4}
    for pipe in (large, small):
        add_lora(pipe, SD)
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)  # draws noise at every step
    alone, baseline = picture(small, kwargs), picture(large, kwargs)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    pipe.plugins.configure("t_stitch", fraction=0.0)
    assert torch.equal(picture(pipe, kwargs), baseline)
    pipe.plugins.configure("t_stitch", fraction=0.5)
    assert not torch.equal(picture(pipe, kwargs), baseline)
    assert pipe.plugins.report().plugins["t_stitch"].counts == {"small": {"cond": 2}, "large": {"cond": 2}}


@pytest.mark.parametrize("own_text", [False, True])
def test_an_ip_adapter_on_the_large_model_shows_in_its_steps_only(own_text):
    large, small, kwargs = pair("StableDiffusionPipeline", own_text)
    alone = picture(small, kwargs)
    pipe = stitched(large, small, 0.5)
    before = picture(pipe, kwargs)
    add_ip_adapter(pipe, SD)
    images = [torch.randn(2, 1, EMBED, generator=torch.Generator().manual_seed(9))]
    assert not torch.equal(picture(pipe, kwargs, ip_adapter_image_embeds=images), before)
    pipe.plugins.configure("t_stitch", fraction=1.0)
    assert torch.equal(picture(pipe, kwargs, ip_adapter_image_embeds=images), alone)


def test_an_ip_adapter_on_the_small_model_alone_is_refused_also_when_it_comes_later():
    large, small, kwargs = pair("StableDiffusionPipeline")
    pipe = stitched(large, small, 0.5)
    add_ip_adapter(small, SD)
    with pytest.raises(Unsupported, match="has an IP-Adapter and this one none"):
        picture(pipe, kwargs)


@pytest.mark.parametrize(("mine", "other"), [(True, False), (False, True)])
def test_flux_with_and_without_guidance_distillation(mine, other):
    large, small, kwargs = pair("FluxPipeline")
    for pipe, embeds in ((large, mine), (small, other)):
        with common.seeded(int(embeds)):
            model = type(pipe.transformer).from_config({**pipe.transformer.config, "guidance_embeds": embeds})
        common.randomise(model)
        pipe.register_modules(transformer=model.eval().requires_grad_(False))
    kwargs.pop("negative_prompt")
    alone = picture(small, kwargs)
    baseline = picture(large, kwargs)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    pipe.plugins.configure("t_stitch", fraction=0.0)
    assert torch.equal(picture(pipe, kwargs), baseline)


def test_a_guidance_distilled_large_unet_with_a_small_one_that_takes_no_guidance_input():
    """LCM-SDXL with an LCM-LoRA on SSD-1B: the pipeline runs without guidance and the small U-Net gets no guidance embedding."""
    large, small, kwargs = pair("StableDiffusionPipeline")
    other_guidance(None, large)
    alone = picture(small, kwargs, guidance_scale=1.0)
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs, guidance_scale=7.5), alone)
    with pytest.raises(Unsupported, match="time_cond_proj_dim = 16, this one None"):
        stitched(small, large, 0.5)


def test_a_model_in_two_parts_with_a_small_one_of_one_part():
    made, small = make("WanPipeline@2.2", 0), make("WanPipeline", 1).pipe
    small.vae = made.pipe.vae
    kwargs = {**made.kwargs, "output_type": "latent", "guidance_scale_2": None}
    calls = calls_of(small.transformer, made.pipe.transformer, made.pipe.transformer_2)
    pipe = stitched(made.pipe, small, 0.75)
    picture(pipe, kwargs)
    assert calls == [0] * 6 + [2] * 2  # two branches a step
    pipe.plugins.configure("t_stitch", fraction=1.0)
    kwargs.pop("guidance_scale_2")
    assert torch.equal(picture(pipe, kwargs, guidance_scale_2=5.0), picture(small, kwargs))
    with pytest.raises(Unsupported, match="has a transformer_2 and this pipeline has none"):
        stitched(small, made.pipe, 0.5)


def test_an_encoder_that_the_small_pipeline_lacks_is_the_large_ones():
    large, small, kwargs = pair("StableDiffusionPipeline")
    alone = picture(small, kwargs)
    small.text_encoder = small.tokenizer = None
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), large.encode_prompt("a cat", "cpu", 1, True, ""), strict=True))
    pipe = stitched(large, small, 1.0)
    assert torch.equal(picture(pipe, kwargs), alone)
    kwargs = {name: value for name, value in kwargs.items() if "prompt" not in name}
    assert torch.isfinite(picture(pipe, kwargs, **embeds)).all()


def test_embeddings_of_the_large_text_encoder_are_refused_where_the_small_one_has_another():
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), large.encode_prompt("a cat", "cpu", 1, True, ""), strict=True))
    kwargs = {name: value for name, value in kwargs.items() if "prompt" not in name}
    pipe = stitched(large, small, 0.5)
    with pytest.raises(Unsupported, match="prompt_embeds, negative_prompt_embeds"):
        picture(pipe, kwargs, **embeds)
    pipe.plugins.configure("t_stitch", fraction=0.0)
    assert torch.isfinite(picture(pipe, kwargs, **embeds)).all()


# other plugins ----------------------------------------------------------------------------------------------------------------------


def test_deepcache_on_the_large_part_starts_with_a_whole_step_in_either_order():
    pytest.importorskip("diffgraft_deepcache")
    results = []
    for order in ((0, 1), (1, 0)):
        large, small, kwargs = pair("StableDiffusionPipeline")
        specs = [("t_stitch", {"model": small, "fraction": 0.5}), ("deepcache", {"interval": 3})]
        whole = []
        first_layer(large.unet).register_forward_pre_hook(lambda *_, whole=whole: whole.append(False))
        leaf = large.unet.mid_block.resnets[0].conv1
        leaf.register_forward_hook(lambda *_, whole=whole: whole.__setitem__(-1, True))
        pipe = load_pipeline(large, plugins=[specs[i] for i in order])
        results.append(picture(pipe, kwargs, num_inference_steps=10))
        assert whole == [True, False, False, True, False]  # steps 5 to 9
    assert torch.equal(*results)


def test_plugins_further_in_see_the_large_models_calls_only_and_those_further_out_all():
    large, small, kwargs = pair("StableDiffusionPipeline")
    inner = Probe()
    pipe = stitched(large, small, 0.5, beside=[inner])
    alone = picture(pipe, kwargs)
    assert inner.denoised == inner.blocks == [2, 3]
    pipe.plugins.clear()
    outer = Probe()
    pipe = load_pipeline(large, plugins=[outer, ("t_stitch", {"model": small, "fraction": 0.5})])
    assert torch.equal(picture(pipe, kwargs), alone)
    assert outer.denoised == [0, 1, 2, 3]
    assert outer.blocks == [2, 3]


def test_blocks_that_both_models_share_are_hooked_in_the_large_models_steps_only():
    large, small, kwargs = pair("StableDiffusionPipeline")
    small.unet.mid_block = large.unet.mid_block
    probe = Probe()
    picture(stitched(large, small, 0.5, beside=[probe]), kwargs)
    assert probe.blocks == [2, 3]


def test_plugins_on_the_small_pipeline_stay_out():
    large, small, kwargs = pair("StableDiffusionPipeline", own_text=True)
    alone = picture(stitched(large, small, 0.5), kwargs)
    large.plugins.clear()
    probe = Probe()
    load_pipeline(small, plugins=[probe])
    pipe = stitched(large, small, 0.5)
    probe.denoised.clear()
    assert torch.equal(picture(pipe, kwargs), alone)
    assert small.plugins.list() == ("probe",)
    assert probe.blocks == []


# refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [-0.1, 1.1, (0.6, 0.5), (), "much", float("nan"), float("inf")])
def test_bad_shares_are_refused(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        load_pipeline("no-such-pipeline", plugins=[("t_stitch", {"fraction": fraction})])


def test_models_and_shares_must_match():
    large, small, _ = pair("StableDiffusionPipeline")
    with pytest.raises(ConfigError, match="2 shares for 1 models"):
        stitched(large, small, (0.2, 0.2))
    with pytest.raises(ConfigError, match=r"model = None with fraction = \(0.4,\)"):
        load_pipeline(large, plugins=["t_stitch"])
    for bad in (3, [], [small, 3], object()):
        with pytest.raises(ConfigError, match="model"):
            stitched(large, bad, 0.5)
    assert not hasattr(large, "plugins")
    load_pipeline(large, plugins=[("t_stitch", {"fraction": 0})])  # off


def other_dtype(large, small):
    small.unet.to(torch.float64)


def other_guidance(large, small):
    with common.seeded(2):
        small.register_modules(unet=type(small.unet).from_config({**small.unet.config, "time_cond_proj_dim": 16}).eval())


def other_noise(large, small):
    small.scheduler = diffusers.DDIMScheduler.from_config(small.scheduler.config, beta_start=0.0001)


def other_prediction(large, small):
    small.scheduler = diffusers.DDIMScheduler.from_config(small.scheduler.config, prediction_type="v_prediction")


def other_latents(large, small):
    small.vae = make("StableDiffusionPipeline", 4).pipe.vae


WRONG = [
    (other_dtype, "its unet is torch.float64, this one torch.float32; convert"),
    (other_guidance, "time_cond_proj_dim = 16, this one None"),
    (other_noise, "beta_start is 0.0001, here 0.00085"),
    (other_prediction, "predicts v_prediction, this one epsilon"),
    (other_latents, "latent space is another one"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG)
def test_a_small_model_that_cannot_take_over_is_refused(change, reason):
    large, small, _ = pair("StableDiffusionPipeline")
    change(large, small)
    with pytest.raises(Unsupported, match=reason):
        stitched(large, small, 0.5)
    assert not hasattr(large, "plugins")


def test_a_schedulers_default_betas_are_no_statement():
    """CogVideoX relies on its scheduler's defaults; put another class in and diffusers takes that class's."""
    large, small, _ = pair("CogVideoXPipeline")
    large.scheduler = diffusers.EulerDiscreteScheduler.from_config(large.scheduler.config)
    assert large.scheduler.config.beta_schedule != small.scheduler.config.beta_schedule
    stitched(large, small, 0.5)


def test_every_reason_is_named_at_once():
    large, small, _ = pair("StableDiffusionPipeline")
    other_noise(large, small)
    other_dtype(large, small)
    with pytest.raises(Unsupported, match=r"float64.*beta_start"):
        stitched(large, small, 0.5)


def test_the_small_model_follows_a_dtype_that_changes_after_attaching():
    large, small, kwargs = pair("StableDiffusionPipeline")
    pipe = stitched(large, small, 0.5)
    before = picture(pipe, kwargs)
    small.unet.to(torch.float64)
    assert torch.equal(picture(pipe, kwargs), before)
    assert small.unet.dtype == large.unet.dtype == torch.float32
    pipe.to(torch.float64)
    fine = picture(pipe, kwargs)  # from other noise: float64 draws its own
    assert small.unet.dtype == fine.dtype == torch.float64
    assert set(pipe.plugins.report().plugins["t_stitch"].counts) == {"small", "large"}
    large, small, kwargs = pair("StableDiffusionPipeline")
    assert torch.equal(picture(stitched(large.to(torch.float64), small.to(torch.float64), 0.5), kwargs), fine)


def test_two_plugins_that_replace_the_denoiser_clash():
    class Other(Probe):
        name = "other"
        effects = Effects(replaces=frozenset({"denoiser"}))

    large, small, _ = pair("StableDiffusionPipeline")
    with pytest.raises(Exception, match="both replace the denoiser"):
        stitched(large, small, 0.5, beside=[Other()])


def test_monotone_in_the_fraction():
    """The more steps the small model has, the more calls: never fewer."""
    assert all(a <= b for a, b in pairwise(ends_by_steps((x / 100,), 7)[0] for x in range(101)))
