"""ConsisSR: both ends of t_s, the noise that is added, the colour fixes, the adapter's layer and files, refusals, the fit, the contract."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Effects, Paper, Plugin, Unsupported, find_family, load_pipeline, unload
from diffgraft.methods.decoding import to_latents, to_pixels
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit, fit_call
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.published import Weights
from diffgraft.testing import Case, contract_sample
from diffgraft_consissr import ConsisSR, __version__
from diffgraft_consissr.adapter import KEYS, LAYOUT, Adapter, cross_layers, image_tokens, original_names, seen
from diffgraft_consissr.method import adain, image_part, low_band, moments, resized, smaller, wavelet
from diffgraft_consissr.pictures import card, enlarged, pixels_of
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import nn

CASES = contract_sample("consissr", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""
NAMES = ("StableDiffusionPipeline", "StableDiffusionUpscalePipeline", "StableDiffusionXLPipeline")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Innermost: keeps the latents and the timestep of each denoiser call."""

    name = "watch"
    paper = Paper("none", "", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents"}))
    seen: ClassVar[list[Any]] = []

    def denoise(self, call, next):
        self.seen.append((call.latents.clone(), float(call.step.t)))
        return next(call)


def run(name: str, made: Any = None, scheduler: Any = None, call: dict[str, Any] | None = None, **knobs: Any) -> Any:
    """The result of a run of a tiny pipeline, with these knobs or plain; nothing is left on it."""
    made = made or make(name)
    pipe = made.pipe
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    Watch.seen.clear()
    load_pipeline(pipe, plugins=[ConsisSR(**knobs), Watch] if knobs else [Watch])
    given = {
        **made.kwargs,
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **(call or {}),
    }
    try:
        return pipe(**given).images
    finally:
        unload(pipe)


def large(side: int = 64) -> torch.Tensor:
    return resized(pixels_of("sr", card(16)), (side, side))


def as_sr(x: torch.Tensor) -> torch.Tensor:
    return (x + 1) / 2


def side_of(name: str) -> int:
    made = make(name)
    return run(name, made, call={"output_type": "pt"}).shape[-1]


def trained(made: Any, seed: int = 0) -> Weights:
    """An adapter of random numbers, W too, for a tiny pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = Adapter([*cross_layers(made.pipe.unet).values()], 4, 16)
        for value in adapter.parameters():
            nn.init.normal_(value, std=0.3)
    return Weights({key: value.detach() for key, value in adapter.state_dict().items()})


# the start ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["spread", "cut"])
def test_a_run_begins_at_what_the_scheduler_calls_the_noised_picture(name, spacing):
    made = make(name)
    side = side_of(name)
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config)
    run(name, made)
    noise = Watch.seen[0][0]
    run(name, made, sr=as_sr(large(side)), start=0.6, spacing=spacing, colour="none")
    x, t = Watch.seen[0]
    z = to_latents(made.pipe, find_family(type(made.pipe)), large(side))
    expected = made.pipe.scheduler.add_noise(z, noise, torch.tensor([int(t)]))
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)
    assert t == (599 if spacing == "spread" else 501)
    assert len(Watch.seen) == (4 if spacing == "spread" else 3)


def test_the_noise_of_euler_is_that_of_add_noise_in_its_own_unit():
    made = make("StableDiffusionPipeline")
    side = side_of("StableDiffusionPipeline")
    euler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    run("", made, euler)
    noise = Watch.seen[0][0] / euler.init_noise_sigma
    run("", made, sr=as_sr(large(side)), start=0.6, colour="none", spacing="cut")
    x, t = Watch.seen[0]
    z = to_latents(made.pipe, find_family(type(made.pipe)), large(side))
    euler.set_timesteps(4)
    torch.testing.assert_close(x, euler.add_noise(z, noise, torch.tensor([t], dtype=euler.timesteps.dtype)), rtol=0, atol=1e-5)


def test_with_flow_sigmas_the_start_is_a_straight_mix():
    made = make("StableDiffusionPipeline")
    side = side_of("StableDiffusionPipeline")
    flow = DPMSolverMultistepScheduler.from_config(made.pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction")
    run("", made, flow)
    noise = Watch.seen[0][0]
    run("", made, sr=as_sr(large(side)), start=0.6, colour="none")
    x, _ = Watch.seen[0]
    z = to_latents(made.pipe, find_family(type(made.pipe)), large(side))
    flow.set_timesteps(4)
    s = 0.6 * float(flow.sigmas[0])
    torch.testing.assert_close(x, (1 - s) * z + s * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_at_the_training_s_end_it_is_the_plain_run_of_the_same_noise(name):
    assert run(name, start=1.0, sr="bicubic", image=card(), colour="none").equal(run(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_towards_0_the_super_resolved_picture_comes_out(name, kind):
    """Of a denoiser that says nothing of the noise: what is left is the noise of the lowest level, at most."""
    made = make(name)
    side = side_of(name)
    scheduler = kind.from_config(made.pipe.scheduler.config, prediction_type="epsilon")
    z = to_latents(made.pipe, find_family(type(made.pipe)), large(side))
    errors = [
        float((run(name, made, scheduler, {"num_inference_steps": 1}, sr=as_sr(large(side)), start=start, colour="none") - z).std())
        for start in (0.9, 0.2, 0.001)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.12 * max(1.0, float(z.std()))


def test_the_bundled_upscaler_gives_the_round_trip_of_the_picture_that_it_begins_at():
    pytest.importorskip("diffgraft_checkpoints_more")
    from diffgraft_checkpoints.emoji.plain_sr import load
    from diffgraft_checkpoints_more.bundled import HERE

    network = load(HERE / "emoji-sr")
    pipe = load_pipeline("emoji-sr", plugins=[ConsisSR(sr=network, start=0.001, colour="none")])
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a small carrot on the right on a purple background", num_inference_steps=1, output_type="pt").images
    low = pixels_of("image", HERE / "emoji-sr" / "start.png")
    family = find_family(type(pipe))
    with torch.no_grad():
        trip = (to_pixels(pipe, family, to_latents(pipe, family, network(low).clamp(-1, 1)), {}) / 2 + 0.5).clamp(0, 1)
    assert float((out - trip).abs().mean()) < 0.01


def test_it_begins_where_the_image_to_image_pipeline_of_diffusers_begins():
    """The same noise and picture: `strength` there, t_s and spacing='cut' here; only the mode of the autoencoder is taken, not a sample."""
    made = make("StableDiffusionPipeline")
    side = side_of("StableDiffusionPipeline")
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config)
    there = StableDiffusionImg2ImgPipeline(**{key: made.pipe.components[key] for key in made.pipe.components})
    there.set_progress_bar_config(disable=True)
    z = to_latents(made.pipe, find_family(type(made.pipe)), large(side))
    arguments = {key: value for key, value in made.kwargs.items() if key not in ("height", "width", "latents")}
    arguments |= {"num_inference_steps": 10, "output_type": "latent", "strength": 0.6}
    theirs = there(**{**arguments, "image": z, "generator": torch.Generator().manual_seed(0)}).images
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    steps, t_s = 10, 501  # leading steps: 901, 801, ... of which the last six are taken
    mine = run("", made, call={"num_inference_steps": steps, "latents": noise}, sr=as_sr(large(side)), start=t_s / 1000, spacing="cut",
               colour="none")  # fmt: skip
    assert len(Watch.seen) == 6
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_several_pictures_of_several_prompts():
    made = make("StableDiffusionPipeline")
    side = side_of("StableDiffusionPipeline")
    both = torch.cat([large(side), large(side).flip(-1)])
    call = {"prompt": ["a", "b"], "negative_prompt": None, "num_images_per_prompt": 2}
    run(
        "", made, call={**call, "generator": [torch.Generator().manual_seed(0) for _ in range(4)]}, sr=as_sr(both), start=0.5, colour="none"
    )
    x = Watch.seen[0][0]
    assert x[0].equal(x[1])
    assert x[2].equal(x[3])
    assert not torch.allclose(x[0], x[2], atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_spread_start_of_the_upscaler_is_the_loop_of_plain_diffusers(guidance):
    """x_ts = sqrt(abar) z + sqrt(1 - abar) n at t_s, the call's steps evenly below it, DDIM's formula; nothing of the plugin is asked."""
    made = make("StableDiffusionUpscalePipeline")
    pipe, image, steps, t_s = made.pipe, card(16), 4, 0.6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    call = {"image": image, "num_inference_steps": steps, "guidance_scale": guidance, "prompt": "a", "negative_prompt": "b"}
    mine = run("", made, call=call, sr=as_sr(large(64)), start=t_s, colour="none")

    draws, abar = torch.Generator().manual_seed(0), pipe.scheduler.alphas_cumprod.double()
    low = pipe.image_processor.preprocess(image)
    noisy = torch.randn(low.shape, generator=draws)
    level = torch.tensor([made.kwargs.get("noise_level", 20)])
    low = pipe.low_res_scheduler.add_noise(low, noisy, level)
    z = pipe.vae.encode(large(side_of_upscaled(pipe))).latent_dist.mode() * pipe.vae.config.scaling_factor
    n = torch.randn(z.shape, generator=draws)
    text, without = pipe.encode_prompt("a", "cpu", 1, True, "b")
    T, gap = 1000, t_s * 1000 / steps
    times = [round(t_s * T - i * gap) - 1 for i in range(steps)]
    assert times == [599, 449, 299, 149]
    x = abar[599].sqrt() * z.double() + (1 - abar[599]).sqrt() * n.double()
    for i, t in enumerate(times):
        with torch.no_grad():
            said = [
                pipe.unet(torch.cat([x.float(), low], 1), t, encoder_hidden_states=words, class_labels=level).sample.double()
                for words in ((text, without) if guidance > 1 else (text,))
            ]
        out = said[0] if guidance <= 1 else said[1] + guidance * (said[0] - said[1])
        a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
        x0, eps = (
            (a * x - s * out, s * x + a * out) if pipe.scheduler.config.prediction_type == "v_prediction" else ((x - s * out) / a, out)
        )
        after = abar[times[i + 1]] if i + 1 < steps else torch.as_tensor(pipe.scheduler.final_alpha_cumprod).double()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(mine.double(), x, rtol=0, atol=1e-4 * float(x.abs().max()))


def side_of_upscaled(pipe: Any) -> int:
    return 16 * pipe.vae_scale_factor


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 20)])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_size_are_brought_to_one_that_diffusers_takes(name, size):
    """A multiple of 8, whatever the autoencoder's factor is; of an upscaler its own."""
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    made = make(name)
    call = {"output_type": "pt"}
    if name == "StableDiffusionUpscalePipeline":
        call["image"] = made.kwargs["image"]
    else:
        made.kwargs.pop("height", None)
        made.kwargs.pop("width", None)
    out = run(name, made, call=call, image=picture, sr="bicubic", start=0.5)
    assert bool(out.isfinite().all())
    if name != "StableDiffusionUpscalePipeline":
        assert tuple(out.shape[-2:]) == tuple(max(4 * side // 8, 1) * 8 for side in size)


# colours ------------------------------------------------------------------------------------------------------------------------------


def test_adain_has_the_means_and_deviations_of_the_other_picture():
    x, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), 0.3 * torch.rand(2, 3, 32, 32, dtype=torch.float64) ** 2 + 0.1
    for found, wanted in zip(moments(adain(x, y)), moments(y), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for found, wanted in zip(moments(adain(x.float(), y.float())), moments(y.float()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(adain(x, x), x, rtol=0, atol=1e-12)
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert adain(flat, y[:1, :, :8, :8].float()).isfinite().all()


def test_wavelet_exchanges_the_low_band_and_nothing_else():
    x, y = torch.rand(1, 3, 64, 64, dtype=torch.float64), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(wavelet(x, x), x)
    torch.testing.assert_close(wavelet(x, y) - x, low_band(y) - low_band(x))
    torch.testing.assert_close(wavelet(x + 0.3, y), wavelet(x, y))  # no cast of x is left
    torch.testing.assert_close(low_band(torch.full((1, 3, 40, 40), 0.7)), torch.full((1, 3, 40, 40), 0.7))
    fine = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    fine[..., ::2] = 0.2  # stripes, and a cast
    slope = torch.linspace(0.2, 0.8, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    inside = (..., slice(32, 33), slice(32, 33))
    torch.testing.assert_close(low_band(wavelet(fine + 0.5, slope))[inside], slope[inside], rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["pil", "np", "pt"])
def test_colours_are_those_of_the_upscaled_low_quality_picture(form):
    name, image = "StableDiffusionUpscalePipeline", card(16)
    made = make(name)
    call = {"output_type": form, "image": image}
    plain, fixed = (run(name, made, call=call, colour=colour) for colour in ("none", "adain"))

    def pixels(images):
        x = torch.stack([torch.from_numpy(np.array(im)).movedim(-1, 0) / 255 for im in images]) if form == "pil" else images
        return torch.from_numpy(x).movedim(-1, 1) if isinstance(x, np.ndarray) else x

    plain, fixed = pixels(plain), pixels(fixed)
    y = as_sr(resized(pixels_of("image", image), tuple(fixed.shape[-2:])))
    torch.testing.assert_close(fixed, adain(plain, y).clamp(0, 1), rtol=0, atol=2e-3 if form == "pil" else 1e-6)
    torch.testing.assert_close(fixed.mean((2, 3)), y.mean((2, 3)), rtol=0, atol=0.03)  # but for what is cut off at black and white
    assert len(run(name, made, call={**call, "return_dict": True}, colour="wavelet")) == 1


# the adapter's layer ------------------------------------------------------------------------------------------------------------------


def test_the_image_part_is_a_softmax_over_its_tokens():
    n, pixels, tokens, heads, d = 2, 5, 3, 2, 4
    q, k, v = (torch.randn(n, length, heads * d, dtype=torch.float64) for length in (pixels, tokens, tokens))
    W, b = torch.randn(d, d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    found = image_part(q, k, v, W, b, heads)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / d**0.5, -1)
        torch.testing.assert_close(found[..., part], weights @ v[..., part] @ W.T + b)


READ = ("to_q", "to_k", "out")


def test_the_adapter_s_layer_is_the_papers_equation_from_its_first_number_to_its_last():
    """A run's layers, each afresh in numpy and float64: c_img = MLP(features), K' and V' of it, both softmaxes, W by heads, their sum."""
    made = make("StableDiffusionPipeline")
    state = {key: value.double().numpy() for key, value in trained(made).tensors.items()}
    layers, lam, kept = cross_layers(made.pipe.unet), 0.7, {}

    def keep(path, part):
        def hook(module, given):
            kept.setdefault((path, part), given[0].detach().double().numpy())

        return hook

    parts = [(path, part, attn.to_out[0] if part == "out" else getattr(attn, part)) for path, attn in layers.items() for part in READ]
    hooks = [module.register_forward_pre_hook(keep(path, part)) for path, part, module in parts]
    run("", made, call={"num_inference_steps": 1, "guidance_scale": 3.0}, image=card(16), weights=trained(made), scale=lam, colour="none")
    for hook in hooks:
        hook.remove()

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(torch.from_numpy(x) / 2**0.5).numpy())

    eye = Adapter([*layers.values()], 4, 16).eye.double()
    eye.load_state_dict({key.removeprefix("eye."): torch.from_numpy(value) for key, value in state.items() if key.startswith("eye.")})
    f = eye(pixels_of("image", card(16)).double()).detach().numpy()
    f = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5) * state["tokens.0.weight"] + state["tokens.0.bias"]
    for key, then in (("tokens.1", gelu), ("tokens.4", gelu), ("tokens.6", lambda x: x)):
        f = then(f @ state[f"{key}.weight"].T + state[f"{key}.bias"])
    assert f.shape[:2] == (1, 16)
    for i, (path, attn) in enumerate(layers.items()):
        own = {part: getattr(attn, part).weight.detach().double().numpy() for part in ("to_q", "to_k", "to_v")}
        x, text = kept[path, "to_q"], kept[path, "to_k"]
        heads = []
        d = own["to_q"].shape[0] // attn.heads
        for h in range(attn.heads):
            at = slice(h * d, (h + 1) * d)
            q = x @ own["to_q"][at].T
            said = softmax(q @ (text @ own["to_k"][at].T).transpose(0, 2, 1) / d**0.5) @ (text @ own["to_v"][at].T)
            k, v = (f @ state[f"layers.{i}.{part}.weight"][at].T for part in ("to_k_ip", "to_v_ip"))
            shown = softmax(q @ k.transpose(0, 2, 1) / d**0.5) @ v
            heads.append(said + lam * (shown @ state[f"layers.{i}.to_out_ip.0.weight"].T + state[f"layers.{i}.to_out_ip.0.bias"]))
        np.testing.assert_allclose(kept[path, "out"], np.concatenate(heads, -1), rtol=0, atol=1e-4 * np.abs(heads[0]).max())
    assert len(kept) == 3 * len(layers)


def test_one_token_is_the_same_for_every_pixel():
    """As in the authors' configuration: a softmax over one token is 1, whatever is asked."""
    q, k, v = torch.randn(1, 7, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    found = image_part(q, k, v, torch.eye(4), torch.zeros(4), 2)
    torch.testing.assert_close(found, v.expand(1, 7, 8))


@pytest.mark.parametrize("name", NAMES)
def test_scale_0_and_w_0_are_text_alone_bit_for_bit(name):
    made = make(name)
    plain = run(name, made)
    knobs = {"image": card(), "colour": "none"}
    assert run(name, made, weights=trained(made), scale=0.0, **knobs).equal(plain)
    assert not torch.allclose(run(name, made, weights=trained(made), **knobs), plain, atol=1e-3)
    new = fit_call(made.pipe, ConsisSR(), lambda pipe: pipe(**{**made.kwargs, "num_inference_steps": 2}))
    assert not any(value.any() for key, value in new.tensors.items() if "to_out_ip" in key)
    assert run(name, made, artefact=new, **knobs).equal(plain)


def test_a_layer_is_its_own_processor_with_the_image_part_before_its_projection():
    made = make("StableDiffusionPipeline")
    state = trained(made).tensors
    (path, attn), i = next(iter(cross_layers(made.pipe.unet).items())), 0
    assert isinstance(attn, Attention)
    assert path.startswith("down_blocks")
    x, text = torch.randn(2, 16, attn.to_q.in_features), torch.randn(2, 5, attn.to_k.in_features)
    tokens = image_tokens(state, seen(state, pixels_of("image", card())))

    from diffgraft_consissr.adapter import ask_with_image, of_layer

    class Call:
        arguments: ClassVar[dict[str, Any]] = {"attn": attn, "hidden_states": x}

        def __getitem__(self, name):
            return self.arguments[name]

        def replace(self, **changes):
            return changes

    found = ask_with_image(Call(), lambda changed: attn.processor(changed["attn"], x, text), of_layer(state, i), tokens, 0.7)
    q, c = attn.to_q(x), tokens.repeat(2, 1, 1)
    k, v = (c @ state[f"layers.{i}.{which}.weight"].T for which in ("to_k_ip", "to_v_ip"))
    more = image_part(q, k, v, state[f"layers.{i}.to_out_ip.0.weight"], state[f"layers.{i}.to_out_ip.0.bias"], attn.heads)
    expected = attn.processor(attn, x, text) + 0.7 * more @ attn.to_out[0].weight.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_a_batch_is_told_of_its_own_picture():
    made = make("StableDiffusionPipeline")
    pictures = [card(), card().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = run("", made, call={"prompt": ["a", "b"], "negative_prompt": None, "generator": seeds}, weights=trained(made), image=pictures,
               colour="none")  # fmt: skip
    for i in range(2):
        alone = run("", made, call={"prompt": "ab"[i], "negative_prompt": None, "generator": torch.Generator().manual_seed(i)},
                    weights=trained(made), image=pictures[i], colour="none")  # fmt: skip
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


# files --------------------------------------------------------------------------------------------------------------------------------


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the authors' names and narrow layers as many as Stable Diffusion 2.1's, and other parts of theirs."""
    sizes = {f"c{i}": 8 * wide for i, wide in enumerate((1, 1, 2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1))} | {f"h{i}": 8 for i in range(16)}
    plain = LAYOUT.synthetic({"i": 16, "d": 32, "f": 16, "e": 4, **sizes}, seed)
    back = {f"layers.{i}.": front for i, front in enumerate(original_names())} | {"tokens.": "cond_stage_model.ft_layers_4."}
    named = {front + key[len(own) :]: value for key, value in plain.items() for own, front in back.items() if key.startswith(own)}
    return named | {
        "control_model.zero_convs.0.0.weight": torch.zeros(1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attnT.to_qkv.weight": torch.zeros(3, 3, 1, 1),
        "first_stage_model.quant_conv.bias": torch.zeros(2),
        "cond_stage_model.model.visual.proj": torch.zeros(2, 2),
        "betas": torch.zeros(10),
    }


def test_the_authors_names_are_read_and_the_rest_of_their_file_is_left(tmp_path):
    from diffgraft.methods.published import read_weights

    state = published()
    torch.save({"state_dict": state}, tmp_path / "ConsisSR.ckpt")
    read = read_weights(LAYOUT, str(tmp_path / "ConsisSR.ckpt"), "consissr", "weights").tensors
    assert len(read) == 16 * 4 + 8
    assert read["layers.6.to_k_ip.weight"].equal(state["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight"])
    assert read["layers.15.to_out_ip.0.bias"].equal(
        state["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out_ip.0.bias"]
    )
    assert read["tokens.6.weight"].equal(state["cond_stage_model.ft_layers_4.6.weight"])
    del state["cond_stage_model.ft_layers_4.6.weight"]
    with pytest.raises(ArtefactMismatch, match=r"tokens\.6\.weight"):
        read_weights(LAYOUT, Weights(state), "consissr", "weights")


def test_an_adapter_of_another_model_or_without_an_eye_is_refused():
    made = make("StableDiffusionPipeline")
    whole = dict(trained(made).tensors)
    blind = {key: value for key, value in whole.items() if not key.startswith("eye.")}

    def refuses(error, words, **knobs):
        with pytest.raises(error, match=words):
            load_pipeline(made.pipe, plugins=[ConsisSR(**knobs)])

    refuses(Unsupported, "16 layers", weights=Weights(published()), vision=lambda x: x)
    refuses(ConfigError, "no eye of its own", weights=Weights(blind))
    refuses(ConfigError, "leave vision out", weights=Weights(whole), vision=lambda x: x)
    refuses(ArtefactMismatch, "part of an eye", weights=Weights({key: x for key, x in whole.items() if key != "eye.places"}))
    refuses(ConfigError, "give one of them", weights=Weights(whole), artefact="x.safetensors")
    wide = {**whole, **{f"layers.0.{n}.weight": torch.zeros(48, 32) for n in ("to_k_ip", "to_v_ip")}}
    refuses(Unsupported, "layer 0", weights=Weights(wide))
    knobs = {"weights": Weights(blind), "image": card(), "colour": "none"}
    with pytest.raises(ConfigError, match=r"vision gave a tensor of \[1, 5\]"):
        run("", made, **knobs, vision=lambda x: torch.zeros(1, 5))
    found = run("", made, **knobs, vision=lambda x: x.mean((2, 3)).repeat(1, 6)[:, :16])
    assert not torch.allclose(found, run("", made), atol=1e-4)


def test_a_clip_of_transformers_may_be_the_eye():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    made = make("StableDiffusionPipeline")
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, patch_size=16, projection_dim=16)).eval()
    blind = {key: value for key, value in trained(made).tensors.items() if not key.startswith("eye.")}
    knobs = {"weights": Weights(blind), "image": card(), "colour": "none"}
    assert run("", made, **knobs, vision=lambda x: clip(resized(x, (32, 32)))).isfinite().all()


# refusals -----------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_told(tmp_path):
    name = "StableDiffusionPipeline"
    with pytest.raises(Unsupported, match="as `image`, and t_s as `strength`"):
        load_pipeline(make("StableDiffusionImg2ImgPipeline").pipe, plugins=[ConsisSR()])
    with pytest.raises(Unsupported, match="consissr does not work"):
        load_pipeline(make("FluxPipeline").pipe, plugins=[ConsisSR()])
    with pytest.raises(ConfigError, match="there is none: give image"):
        run(name, sr="bicubic")
    with pytest.raises(ConfigError, match="colour = 'adain' is taken from"):
        run(name, sr=as_sr(large()))
    with pytest.raises(ConfigError, match="is told of"):
        run(name, weights=trained(make(name)), colour="none")
    with pytest.raises(ConfigError, match="is no network of super-resolution"):
        load_pipeline(make(name).pipe, plugins=[ConsisSR(sr="nothing_of_the_kind")])
    with pytest.raises(ConfigError, match=r"'bicubik' is no network of super-resolution.*did you mean 'bicubic'.*Known: bicubic"):
        load_pipeline(make(name).pipe, plugins=[ConsisSR(sr="bicubik")])
    with pytest.raises(ConfigError, match="no such file"):
        load_pipeline(make(name).pipe, plugins=[ConsisSR(sr=str(tmp_path / "a.png"))])
    with pytest.raises(ConfigError, match="3 pictures, and the call has 1 prompts"):
        run(name, sr=as_sr(large()).repeat(3, 1, 1, 1), colour="none")
    with pytest.raises(ConfigError, match=r"sr gave a tensor of \[1, 2\]"):
        run(name, sr=lambda pixels: torch.zeros(1, 2), image=card())
    with pytest.raises(ConfigError, match="values go from"):
        run(name, image=torch.full((3, 8, 8), 7.0), sr="bicubic")
    with pytest.raises(ConfigError, match="start"):
        run(name, image=card(), sr="bicubic", start=0.002)  # four steps of two times
    karras = EulerDiscreteScheduler.from_config(make(name).pipe.scheduler.config, use_karras_sigmas=True)
    made = make(name)
    if karras.config.get("sigma_max") is not None:
        with pytest.raises(Unsupported, match="spacing='cut'"):
            run(name, made, karras, image=card(), sr="bicubic")
    with pytest.raises(ConfigError, match="timesteps itself"):
        run(name, image=card(), sr="bicubic", call={"timesteps": [900, 500, 100], "num_inference_steps": None})


# the fit ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionUpscalePipeline"])
def test_a_fit_learns_and_its_file_serves_the_model_and_its_siblings(name, tmp_path):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    side = side_of(name)
    before = {key: value.clone() for key, value in made.pipe.unet.state_dict().items()}
    examples = [Example("red", Image.new("RGB", (side, side), (220, 30, 30))), Example("dark", Image.new("RGB", (side, side)))]
    settings = CallSettings(height=side, width=side) if "Upscale" not in name else CallSettings(image=card())
    path = tmp_path / "hpa.safetensors"
    learned = fit(made.pipe, ConsisSR(), examples, settings, path, FitPlan(12, batch=2), knobs={"channels": 4, "width": 16, "rate": 0.01})
    assert learned.tensors.keys() == {key.format(i=i) for key in KEYS for i in range(len(cross_layers(made.pipe.unet)))}
    assert any(value.any() for key, value in learned.tensors.items() if "to_out_ip" in key)
    assert all(value.equal(before[key]) for key, value in made.pipe.unet.state_dict().items())
    knobs = {"image": card(), "colour": "none"}
    found = run(name, made, artefact=path, **knobs)
    assert found.equal(run(name, made, weights=path, **knobs))
    assert not found.equal(run(name, made))
    with pytest.raises(ArtefactMismatch, match="other weights"):
        load_pipeline(make(name, seed=1).pipe, plugins=[ConsisSR(artefact=path)])
    run(name, make(name, seed=1), weights=path, **knobs)


def test_smaller_is_the_mean_of_squares():
    x = pixels_of("image", card(16))
    assert smaller(x, 4).shape == (1, 3, 4, 4)
    torch.testing.assert_close(smaller(x, 4)[0, 0, 0, 0], x[0, 0, :4, :4].mean(), rtol=0, atol=0.5 / 127.5)


@pytest.mark.parametrize("factor", [float("nan"), 255.0])
def test_a_network_that_gives_no_pixels_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="wanted is -1 to 1"):
        enlarged(lambda x: x * factor, torch.ones(1, 3, 8, 8))
