"""Diversity distillation: the paper's equations, its identities against the pipelines alone and against hand-written loops, refusals."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffgraft import ConfigError, Paper, Plugin, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.methods.predictions import SignalNoise, clean_estimate
from diffgraft_diversity_distillation import DiversityDistillation, method
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

SD = "StableDiffusionPipeline"
FAMILIES = {
    SD: "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "PixArtAlphaPipeline": "pixart",
    "WanPipeline": "wan",
}
PROMPTS = ["a red apple on the left", "two green dogs"]


def tiny(name: str = SD) -> Any:
    """A tiny pipeline and its call arguments; latents come out."""
    family = next(f for f in registry.families().values() if name in f.pipelines)
    module, function = family.tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name, 0)
    made.kwargs["output_type"] = "latent"
    return made


def denoisers(pipe: Any) -> list[Any]:
    return [model for name in ("unet", "transformer", "transformer_2") if (model := getattr(pipe, name, None)) is not None]


def other(name: str = SD) -> Any:
    """The same tiny pipeline with other denoiser weights: a base model."""
    pipe = tiny(name).pipe
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for model in denoisers(pipe):
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return pipe


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    for model in denoisers(pipe):
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
        model.eval().requires_grad_(False)


def latents(pipe: Any, made: Any, seed: int = 0, **kwargs: Any) -> Tensor:
    return pipe(**{**made.kwargs, **kwargs, "generator": torch.Generator().manual_seed(seed)})[0]


def scale_of(name: str) -> str:
    return registry.families()[FAMILIES[name]].guidance.scale


class PlainGuidance(Plugin):
    """uncond + w (cond - uncond), where a pipeline does something more (Qwen-Image keeps the norm)."""

    name = "plain_guidance"
    paper = Paper("a probe", "0000.00000", "the formula")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def guide(self, call, next):
        return call.uncond + call.scale * (call.cond - call.uncond)


def base_alone(name: str, base: Any, made: Any, **kwargs: Any) -> Tensor:
    """The base's own run; with the formula for guidance where its pipeline has another."""
    if name != "QwenImagePipeline":
        return latents(base, made, **kwargs)
    load_pipeline(base, plugins=[PlainGuidance])
    try:
        return latents(base, made, **kwargs)
    finally:
        base.plugins.clear()


def lcm(pipe: Any) -> Any:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def report(pipe: Any) -> Any:
    return pipe.plugins.report().plugins["diversity_distillation"]


@contextmanager
def counting(*unets: Any):
    """Rows that each of the U-Nets really computes."""
    rows = [0] * len(unets)

    def count(i: int):
        def hook(module: Any, args: Any) -> None:
            rows[i] += len(args[0])

        return hook

    handles = [unet.conv_in.register_forward_pre_hook(count(i)) for i, unet in enumerate(unets)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


# the equations ----------------------------------------------------------------------------------------------------------------------


def test_guidance():
    uncond, cond = torch.randn(2, 3, 4)
    assert torch.allclose(method.guided(uncond, cond, 3.0), -2 * uncond + 3 * cond)
    for w in (0.0, 1.0):
        assert method.guided(uncond, cond, w) is cond


def timesteps(scheduler: Any, n: int) -> Tensor:
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def test_handoff_is_the_nearest_timestep_of_the_base():
    trailing = {"timestep_spacing": "trailing"}
    base = timesteps(EulerDiscreteScheduler(**trailing), 20)  # 999, 949, ...
    distilled = timesteps(EulerDiscreteScheduler(**trailing), 4)  # 999, 749, 499, 249
    for k in range(4):
        j = method.handoff(base, distilled[k])
        assert j == 5 * k
        assert abs(base[j] - distilled[k]) == min(abs(t - distilled[k]) for t in base)
    assert method.handoff(base, None) == 20
    assert method.handoff(distilled, distilled[1]) == 1, "the same schedule: j = k"


def test_the_codes_first_defaults_never_run_the_base():
    """DDIM (leading) with N_B = 4 and LCM with N_D = 4, k = 1: 751 is nearest to 759, so j = 0."""
    base = timesteps(DDIMScheduler(steps_offset=1), 4)
    assert base.tolist() == [751, 501, 251, 1]
    assert method.handoff(base, timesteps(LCMScheduler(), 4)[1]) == 0
    assert method.handoff(timesteps(DDIMScheduler(steps_offset=1), 20), timesteps(LCMScheduler(), 4)[1]) == 4


def test_scales_of_exploding_and_preserving_samples():
    x0, eps, sigma = torch.randn(5, 4), torch.randn(5, 4), torch.tensor(7.0)
    exploding = x0 + sigma * eps
    a = (1 + sigma**2).rsqrt()
    preserving = a * x0 + sigma * a * eps
    one, r = method.scale_of(a, sigma * a), method.scale_of(torch.tensor(1.0), sigma)
    assert r == pytest.approx(50**0.5)
    assert torch.allclose(method.rescaled(exploding, r, one), preserving, atol=1e-6)
    assert torch.allclose(method.rescaled(preserving, one, r), exploding, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_preview_of_the_exact_score_is_the_posterior_mean(kind):
    """Data 0.3 N(-1, .2^2) + 0.7 N(2, .5^2): the x0 estimate of its exact denoiser is E[x0 | x_t], here by quadrature."""
    a, s = (torch.tensor(v, dtype=torch.float64) for v in ((0.4, 0.6) if kind == "flow" else (0.6, 0.8)))
    weights, means, deviations = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 2.0], [0.2, 0.5]))
    x = torch.linspace(-3, 4, 50, dtype=torch.float64).requires_grad_()
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.Normal(a * means, (a**2 * deviations**2 + s**2).sqrt())
    )
    (score,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    x = x.detach()
    eps = -s * score
    x0 = (x - s * eps) / a
    output = {"epsilon": eps, "v_prediction": a * eps - s * x0, "flow": eps - x0}[kind]
    grid = torch.linspace(-6, 8, 100_001, dtype=torch.float64)
    prior = (weights * torch.exp(-((grid[:, None] - means) ** 2) / (2 * deviations**2)) / deviations).sum(1)
    joint = prior * torch.exp(-((x[:, None] - a * grid) ** 2) / (2 * s**2))
    expected = (joint * grid).sum(1) / joint.sum(1)
    assert torch.allclose(clean_estimate(x, output, SignalNoise(a, s), kind), expected, atol=1e-6, rtol=0)


# identities -------------------------------------------------------------------------------------------------------------------------


def test_k_0_is_the_distilled_model_alone():
    made = tiny()
    add_lora(lcm(made.pipe))
    alone = latents(made.pipe, made, guidance_scale=1.0)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=0)])
    assert torch.equal(latents(made.pipe, made, guidance_scale=1.0), alone)


@pytest.mark.parametrize("own", [1.0, 7.5])
def test_b_is_d_without_guidance_is_the_pipeline_alone(own):
    made = tiny()
    alone = latents(made.pipe, made, guidance_scale=own)
    same = type(made.pipe).from_pipe(made.pipe)
    w = {1.0: 1.0, 7.5: 7.5}[own]
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=same, guidance_scale=w)])
    assert torch.equal(latents(made.pipe, made, guidance_scale=own), alone)
    assert report(made.pipe).total("base") == (1 if own == 1 else 2)


@pytest.mark.parametrize("own", ["unguided", "guided"])
@pytest.mark.parametrize("name", FAMILIES)
def test_k_beyond_the_end_is_the_base_on_the_distilled_schedule(name, own):
    """Also that the base's guidance is w_B and its conditioning complete, whatever the pipeline's own guidance does."""
    made, base, scale = tiny(name), other(name), scale_of(name)
    batch: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": ["blurry", "a drawing"], "num_inference_steps": 2}
    if name in (SD, "StableDiffusionXLPipeline", "FluxPipeline"):
        batch["num_images_per_prompt"] = 2
    expected = base_alone(name, base, made, **batch, **{scale: 4.0})
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=4.0)])
    found = latents(made.pipe, made, **batch, **{scale: 1.0 if own == "unguided" else 2.0})
    assert torch.allclose(found, expected, atol=2e-4), float((found - expected).abs().max())
    assert report(made.pipe).total("distilled") == 0


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", SD])
def test_without_a_negative_prompt_the_base_is_guided_by_the_empty_one(name):
    made, base, scale = tiny(name), other(name), scale_of(name)
    made.kwargs.pop("negative_prompt")
    two = {"prompt": PROMPTS, "num_inference_steps": 2}
    expected = base_alone(name, base, made, **two, **{scale: 4.0}, negative_prompt=["", ""])
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=4.0)])
    assert torch.allclose(latents(made.pipe, made, **two, **{scale: 1.0}), expected, atol=2e-4)


@pytest.mark.parametrize("own", [1.0, 3.0])
def test_a_base_with_its_own_text_encoder_gets_its_own_conditioning(own):
    made, base = tiny(), other()
    with torch.no_grad():
        for p in base.text_encoder.parameters():
            p.mul_(1.3)
    for w in (1.0, 4.0):
        expected = latents(base, made, guidance_scale=w)
        load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=w)])
        assert torch.allclose(latents(made.pipe, made, guidance_scale=own), expected, atol=2e-4), w
        made.pipe.plugins.clear()


def test_base_arguments_reach_the_base_only():
    made, base = tiny("FluxPipeline"), other("FluxPipeline")
    expected = latents(base, made, guidance_scale=6.0, true_cfg_scale=4.0, negative_prompt="old")
    knobs = {"steps": 9, "model": base, "guidance_scale": 4.0, "base_arguments": {"guidance_scale": 6.0, "negative_prompt": "old"}}
    for own in (1.0, 2.0):
        load_pipeline(made.pipe, plugins=[DiversityDistillation(**knobs)])
        assert torch.allclose(latents(made.pipe, made, guidance_scale=1.0, true_cfg_scale=own), expected, atol=2e-4)
        made.pipe.plugins.clear()


def by_hand(pipe: Any, made: Any, answer: Any, n: int = 4) -> Tensor:
    """A run of D's scheduler in which ``answer(i, x, t, cond, uncond)`` predicts the noise of step i."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(n)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(answer(i, x, t, cond, uncond), t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("k", [1, 2])
def test_lora_off_for_the_first_steps_equals_a_loop_by_hand(k):
    made = tiny()
    add_lora(lcm(made.pipe))
    unet, w = made.pipe.unet, 5.0
    made.kwargs.update(height=64, width=64)

    def answer(i: int, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        if i >= k:
            return unet(x, t, cond).sample
        unet.disable_adapters()
        both = unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample
        unet.enable_adapters()
        return both[:1] + w * (both[1:] - both[:1])

    expected = by_hand(made.pipe, made, answer)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=k, guidance_scale=w)])
    found = latents(made.pipe, made, guidance_scale=1.0)
    assert torch.allclose(found, expected, atol=1e-4)
    part = report(made.pipe)
    assert (part.total("base"), part.total("distilled")) == (2 * k, 4 - k)


def test_two_stages_of_a_second_order_scheduler_are_one_step():
    made, base = tiny(), other()
    made.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(made.pipe.scheduler.config)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, guidance_scale=1.0)])
    with counting(base.unet, made.pipe.unet) as rows:
        latents(made.pipe, made, guidance_scale=1.0, num_inference_steps=3)
    assert rows == [2, 3]


@pytest.mark.parametrize(("k", "w"), [(1, 7.0), (2, 7.0), (1, 1.0), (0, 7.0)])
def test_number_of_evaluations(k, w):
    made, base = tiny(), other()
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=k, model=base, guidance_scale=w)])
    with counting(base.unet, made.pipe.unet) as rows:
        latents(made.pipe, made, guidance_scale=1.0)
    assert sum(rows) == method.forwards(k, k, 4, w)
    assert rows[1] == 4 - k


def test_the_guidance_embedding_of_a_consistency_model_is_kept_from_its_base():
    made, base = tiny(), other()
    torch.manual_seed(0)
    from diffgraft_pipelines.tiny.sd import unet

    made.pipe.unet = unet(time_cond=16).eval().requires_grad_(False)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=4.0)])
    expected = latents(base, made, guidance_scale=4.0)
    assert torch.allclose(latents(made.pipe, made, guidance_scale=8.0), expected, atol=2e-4)  # D takes 8.0 as an embedding: unguided


def test_image_to_image_counts_the_steps_that_are_run():
    name = "StableDiffusionImg2ImgPipeline"
    made, base = tiny(name), other(name)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=4.0)])
    args = {"strength": 0.5, "num_inference_steps": 6}
    expected = latents(base, made, guidance_scale=4.0, **args)
    assert torch.allclose(latents(made.pipe, made, guidance_scale=1.0, **args), expected, atol=2e-4)
    made.pipe.plugins.configure("diversity_distillation", steps=1)
    latents(made.pipe, made, guidance_scale=1.0, **args)
    assert (report(made.pipe).total("base"), report(made.pipe).total("distilled")) == (2, 2)


def test_a_base_without_controlnet_answers_for_a_pipeline_with_one():
    made, base = tiny("StableDiffusionControlNetPipeline"), other()
    base.vae, base.text_encoder = made.pipe.vae, made.pipe.text_encoder  # of the same latent space
    twin = type(made.pipe).from_pipe(made.pipe, unet=base.unet)
    expected = latents(twin, made, guidance_scale=1.0)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=1.0)])
    assert torch.allclose(latents(made.pipe, made, guidance_scale=1.0), expected, atol=2e-4)
    made.pipe.plugins.configure("diversity_distillation", guidance_scale=4.0)  # the base takes no control picture when it is listened to
    assert not torch.allclose(latents(made.pipe, made, guidance_scale=1.0), expected, atol=1e-2)


@pytest.mark.parametrize("name", [SD, "StableDiffusionXLPipeline"])
def test_an_ip_adapters_picture_reaches_the_base_that_shares_the_denoiser(name):
    from diffgraft.testing.tiny import EMBED, add_ip_adapter

    made = tiny(name)
    add_ip_adapter(made.pipe, registry.families()[FAMILIES[name]])
    same = type(made.pipe).from_pipe(made.pipe)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=same, guidance_scale=3.0)])
    pictures = [[torch.randn(1, 1, EMBED, generator=torch.Generator().manual_seed(i))] for i in range(2)]
    one, two = (latents(made.pipe, made, guidance_scale=1.0, ip_adapter_image_embeds=picture) for picture in pictures)
    assert not torch.allclose(one, two, atol=1e-3)


def test_the_prompt_is_encoded_again_only_where_the_unconditional_half_is_missing():
    made, base = tiny(), other()
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=2, model=base)])
    encoded: list[int] = []
    handles = [p.text_encoder.register_forward_hook(lambda *a: encoded.append(1)) for p in (made.pipe, base)]
    latents(made.pipe, made, guidance_scale=3.0)
    guided = len(encoded)
    latents(made.pipe, made, guidance_scale=1.0)
    assert (guided, len(encoded) - guided) == (2, 1 + 2), "cond and uncond of the run; cond of the run, both of the base once"
    for handle in handles:
        handle.remove()


# the base's own schedule --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, "StableDiffusionXLPipeline", "FluxPipeline", "WanPipeline"])
def test_j_is_n_b_is_the_base_alone(name):
    made, base, scale = tiny(name), other(name), scale_of(name)
    if name == SD:
        lcm(made.pipe)
    if name == "WanPipeline":
        made.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    expected = latents(base, made, num_inference_steps=3, **{scale: 4.0})
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=9, model=base, guidance_scale=4.0, base_steps=3)])
    found = latents(made.pipe, made, num_inference_steps=2, **{scale: 1.0})
    if name == "StableDiffusionXLPipeline":  # the noise is divided by Euler's start scale and multiplied again
        assert torch.allclose(found, expected, atol=1e-4)
    else:
        assert torch.equal(found, expected)


def test_the_handoff_equals_two_loops_by_hand():
    """B: DDIM, 20 steps, w = 5, down to the timestep nearest to D's second; D: LCM from its second step on with the first noise."""
    made, base = tiny(), other()
    lcm(made.pipe)
    ddim = DDIMScheduler.from_config(base.scheduler.config)
    ddim.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    cond, uncond = base.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    x = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler = LCMScheduler.from_config(made.pipe.scheduler.config)
    scheduler.set_timesteps(4)
    j = int((ddim.timesteps - scheduler.timesteps[1]).abs().argmin())
    assert j == 4
    for t in ddim.timesteps[:j]:
        both = base.unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample
        x = ddim.step(both[:1] + 5.0 * (both[1:] - both[:1]), t, x, return_dict=False)[0]
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(made.pipe.unet(x, t, cond).sample, t, x, generator=generator, return_dict=False)[0]
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, guidance_scale=5.0, base_steps=20, preview=True)])
    with counting(base.unet, made.pipe.unet) as rows:
        found = latents(made.pipe, made, guidance_scale=1.0)
    assert torch.allclose(found, x, atol=1e-4)
    assert sum(rows) == method.forwards(j, 1, 4, 5.0)
    part = report(made.pipe)
    assert (part.total("base"), part.total("distilled")) == (2 * j, 3)
    assert part.records["x0"].shape == (j + 3, 1, 4, 8, 8)
    assert part.notes[0] == "the base made 4 of its 20 steps, then the distilled model went on at its step 1"


@pytest.mark.parametrize("exploding", ["base", "distilled", "both"])
def test_latents_change_their_scale_with_the_scheduler(exploding):
    """B and D are one exact denoiser of N(0, 1) data, eps = s x at scale 1: then every scheduler keeps the spread at its own scale."""
    trailing = {"timestep_spacing": "trailing"}
    made, base = tiny(), tiny().pipe
    for pipe, which in ((base, "base"), (made.pipe, "distilled")):
        cls = EulerDiscreteScheduler if exploding in (which, "both") else DDIMScheduler
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **trailing)
        abar = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
        pipe.unet.forward = lambda sample, t, *a, abar=abar, **k: ((1 - abar[int(t)]).sqrt() * sample,)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, steps=2, base_steps=30, guidance_scale=1.0)])
    out = latents(made.pipe, made, guidance_scale=1.0, num_inference_steps=20)
    assert out.std() == pytest.approx(1, rel=0.15)  # a scale left out would be off by sqrt(1 + sigma^2), about 9 here


def test_a_base_made_of_lora_and_from_pipe_has_its_lora_off():
    """``from_pipe`` with another scheduler shares the denoiser: that is the base with a schedule of its own."""
    made = tiny()
    plain = tiny()
    expected = latents(plain.pipe, plain, num_inference_steps=3, guidance_scale=4.0)
    add_lora(lcm(made.pipe))
    base = type(made.pipe).from_pipe(made.pipe, scheduler=plain.pipe.scheduler)
    knobs = {"steps": 9, "guidance_scale": 4.0, "base_steps": 3}
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, **knobs)])
    assert torch.equal(latents(made.pipe, made, num_inference_steps=2, guidance_scale=1.0), expected)
    made.pipe.plugins.configure("diversity_distillation", model=None)  # the same on the pipeline's own scheduler
    found = latents(made.pipe, made, num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(found, latents(lcm(plain.pipe), plain, num_inference_steps=3, guidance_scale=4.0))


def test_a_base_that_would_do_nothing_is_refused():
    made, base = tiny(), other()
    lcm(made.pipe)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, base_steps=4)])
    with pytest.raises(ConfigError, match=r"base_steps = 4: the base's first timestep, 751, is the nearest to that of the handoff, 759"):
        latents(made.pipe, made, guidance_scale=1.0)
    assert not hasattr(base, "plugins"), "nothing stays on the base"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_scheduler_with_a_memory_cannot_be_entered_in_the_middle(name):
    made, base = tiny(), other()
    made.pipe.scheduler = getattr(diffusers, name).from_config(made.pipe.scheduler.config)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, base_steps=8)])
    with pytest.raises(Unsupported, match=f"base_steps = 8: the pipeline's {name} needs the steps before it"):
        latents(made.pipe, made, guidance_scale=1.0)


# preview and LoRA strength ------------------------------------------------------------------------------------------------------------


class SchedulersEstimate(PlainGuidance):
    """Keeps what the scheduler says about x0."""

    name = "schedulers_estimate"
    guide = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def step(self, call, next):
        out = next(call)
        self.seen.append(out.x0)
        return out


def test_the_preview_changes_nothing_and_is_what_the_scheduler_estimates():
    made, probe = tiny(), SchedulersEstimate()
    plain = latents(made.pipe, made)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=0, preview=True), probe])
    assert torch.equal(latents(made.pipe, made), plain)
    assert torch.allclose(report(made.pipe).records["x0"], torch.stack(probe.seen), atol=1e-4)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline"])
def test_the_last_preview_is_the_picture(name):
    made, base = tiny(name), other(name)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, preview=True)])
    out = latents(made.pipe, made)
    x0 = report(made.pipe).records["x0"]
    assert x0.shape == (4, *out.shape)
    assert torch.allclose(x0[-1], out, atol=1e-3)
    assert not torch.allclose(x0[0], out, atol=1e-2)


@pytest.mark.parametrize("name", [SD, "FluxPipeline"])
def test_lora_strength_is_diffusers_own_scale(name):
    made = tiny(name)
    add_lora(made.pipe)
    key = "cross_attention_kwargs" if name == SD else "joint_attention_kwargs"
    full, expected = latents(made.pipe, made), latents(made.pipe, made, **{key: {"scale": 0.3}})
    assert not torch.equal(full, expected)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(steps=0, lora_strength=0.3)])
    assert torch.equal(latents(made.pipe, made), expected)
    made.pipe.plugins.configure("diversity_distillation", lora_strength=0.6)
    assert torch.allclose(latents(made.pipe, made, **{key: {"scale": 0.5}}), expected, atol=1e-5), "the user's scale counts too"
    made.pipe.plugins.clear()
    assert torch.equal(latents(made.pipe, made), full)


# refusals -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, {"steps": 0, "lora_strength": 0.5}])
def test_without_a_base_and_without_a_lora(knobs):
    made = tiny()
    plain = latents(made.pipe, made)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(**knobs)])  # the LoRA may come later
    with pytest.raises(Unsupported, match="carries no LoRA"):
        latents(made.pipe, made)
    made.pipe.plugins.clear()
    assert torch.equal(latents(made.pipe, made), plain)


@pytest.mark.parametrize(
    ("name", "knobs", "match"),
    [
        (
            "StableDiffusionImg2ImgPipeline",
            {"base_steps": 8},
            "base_steps = 8: StableDiffusionImg2ImgPipeline does not start from pure noise",
        ),
        ("PixArtAlphaPipeline", {"steps": 0, "lora_strength": 0.5}, "lora_strength = 0.5: PixArtAlphaPipeline takes none of"),
        ("FluxPipeline", {"model": "half"}, "its transformer is in torch.float16, this one in torch.float32"),
    ],
)
def test_refused_before_anything_is_touched(name, knobs, match):
    made = tiny(name)
    if knobs.get("model") == "half":
        knobs = {"model": other(name).to(torch.float16)}
    with pytest.raises(Unsupported, match=match):
        load_pipeline(made.pipe, plugins=[DiversityDistillation(**knobs)])
    assert not hasattr(made.pipe, "plugins")


@pytest.mark.parametrize(
    "knobs", [{"steps": -1}, {"guidance_scale": -1}, {"base_steps": 0}, {"lora_strength": 0}, {"model": 3}, {"base_arguments": 3}, {"k": 1}]
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        DiversityDistillation(**knobs)


def test_embeddings_are_refused_where_the_base_has_another_text_encoder():
    made, base = tiny(), other()
    with torch.no_grad():
        for p in base.text_encoder.parameters():
            p.mul_(1.3)
    cond, _ = made.pipe.encode_prompt("a", "cpu", 1, False)
    made.kwargs.update(prompt=None, prompt_embeds=cond, negative_prompt=None)
    for knobs in ({}, {"base_steps": 8}):
        load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, **knobs)])
        with pytest.raises(Unsupported, match="prompt_embeds: embeddings of"):
            latents(made.pipe, made, guidance_scale=1.0)
        made.pipe.plugins.clear()


def test_embeddings_are_refused_where_the_base_needs_the_prompt():
    made, base = tiny(), other()
    cond, _ = made.pipe.encode_prompt("a", "cpu", 1, False)
    made.kwargs.update(prompt=None, prompt_embeds=cond, negative_prompt=None)
    load_pipeline(made.pipe, plugins=[DiversityDistillation(model=base, guidance_scale=1.0)])
    assert torch.isfinite(latents(made.pipe, made, guidance_scale=1.0)).all()
    made.pipe.plugins.configure("diversity_distillation", guidance_scale=4.0)
    with pytest.raises(Unsupported, match="prompt_embeds"):
        latents(made.pipe, made, guidance_scale=1.0)
