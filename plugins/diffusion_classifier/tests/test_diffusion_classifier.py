"""diffusion_classifier: the contract; the equations against closed forms and the official code's formulas; what is scored, and by whom."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft.methods.conditioning import sibling
from diffgraft.methods.decoding import to_latents
from diffgraft.methods.rewards import find_reward
from diffgraft.testing import Case, contract_sample
from diffgraft_diffusion_classifier import DiffusionClassifier, __version__, fit_weights, reward
from diffgraft_diffusion_classifier.method import (
    Level,
    accuracy,
    error,
    flow_schedule,
    late,
    noised,
    spread,
    target,
    vp_schedule,
    weighted,
    weighting,
)
from diffgraft_diffusion_classifier.scoring import Scorer
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image

SD, SDXL, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
NAMES = (SD, SDXL, SD3, FLUX)
PROMPTS = ["a red apple on the left", "two green dogs", "a big panda", "a small frog"]
CASES = contract_sample("diffusion_classifier", __version__)
REWARD = "diffgraft_diffusion_classifier:reward"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# --- tools --------------------------------------------------------------------------------------------------------------------------------


def side(made) -> int:
    return made.kwargs["height"]


def pictures(n, pixels=64):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (n, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((pixels, pixels)) for each in coarse]


def classifier(name, **knobs):
    """(the tiny pipeline, a plugin that measures at its size)."""
    made = make(name)
    return made.pipe, DiffusionClassifier(**{"timesteps": 3, "size": (side(made), side(made)), **knobs})


def heard(pipe):
    """The denoiser's calls from now on."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    calls, plain = [], model.forward

    def forward(*args, **kwargs):
        calls.append(dict(zip(("sample", "timestep"), args, strict=False)) | kwargs)
        return plain(*args, **kwargs)

    model.forward = forward
    return calls


def clean(pipe, plugin, images):
    scorer = Scorer(pipe, plugin)
    arrays = [np.asarray(image.resize(scorer.size[::-1]), dtype=np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    return scorer, pixels


# --- the schedule of the official code ----------------------------------------------------------------------------------------------------


def test_the_times_are_those_that_the_official_code_prints():
    abar = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double().tolist()
    sd = [level.t for level in spread(vp_schedule(abar), 30, 10)]
    assert sd == [32.0 + 33 * i for i in range(30)]  # SD: 32 to 989
    sd3 = [level.t for level in spread(flow_schedule(1000, 3.0), 30, 20)]
    assert len(sd3) == 30
    assert sd3[:3] == pytest.approx([65.965576, 151.079147, 226.655365], abs=1e-4)
    assert sd3[-1] == pytest.approx(993.243225, abs=1e-4)


def test_late_times_are_thirty_of_the_noisier_half():
    schedule = flow_schedule(1000, 3.0)
    fresh = np.array(FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps)
    valid = fresh[(fresh >= 500) & (fresh <= 1000)]
    wanted = valid[np.linspace(0, len(valid) - 1, 30).astype(int)]
    assert [level.t for level in late(schedule, 30)] == pytest.approx(wanted[::-1].tolist(), abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_the_schedulers(shift):
    fresh = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert [level.s for level in flow_schedule(1000, shift)] == pytest.approx(fresh.sigmas[:1000].tolist(), abs=1e-6)
    assert all(level.a + level.s == pytest.approx(1) for level in flow_schedule(1000, shift))


# --- the official code's formulas, written out, on the same inputs ------------------------------------------------------------------------


def official(name, pipe, pixels, prompts, bank, times, normed):
    """err_t [pairs, T] of picture i under prompt i, as the official code's pipelines compute it (means for samples of the posterior)."""
    moments = pipe.vae.encode(pixels).latent_dist.mode()
    config = pipe.vae.config
    rows = []
    if name in (SD, SDXL):
        z = moments * config.scaling_factor
        scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
        if name == SD:
            hidden, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
            more = {}
        else:
            hidden, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
            shape = pixels.shape[-2:]
            ids = pipe._get_add_time_ids(shape, (0, 0), shape, hidden.dtype, text_encoder_projection_dim=pooled.shape[-1])
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.repeat(len(prompts), 1)}}
        for t, noise in zip(times, bank, strict=True):
            noise = noise[None].repeat(len(z), 1, 1, 1)
            x = scheduler.add_noise(z, noise, torch.tensor([t] * len(z)))
            scheduler._step_index = None
            x = scheduler.scale_model_input(x, torch.tensor(t))
            found = pipe.unet(x, t, encoder_hidden_states=hidden, **more).sample
            rows.append((found, noise))
    else:
        z = (moments - config.shift_factor) * config.scaling_factor
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        b, c, h, w = z.shape
        if name == SD3:
            hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        else:
            hidden, pooled, text_ids = pipe.encode_prompt(prompts, None)
            ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", z.dtype)
        for t, noise in zip(times, bank, strict=True):
            if name == FLUX:
                noise = FluxPipeline._unpack_latents(noise[None], 8 * h, 8 * w, 8)
                assert noise.shape[1:] == z.shape[1:]
            noise = noise.expand_as(z)
            x = scheduler.scale_noise(z, torch.tensor([t] * b), noise)
            told = torch.tensor([t] * b)
            if name == SD3:
                found = pipe.transformer(x, timestep=told, encoder_hidden_states=hidden, pooled_projections=pooled).sample
            else:
                guidance = torch.zeros(b) if pipe.transformer.config.guidance_embeds else None
                found = pipe.transformer(
                    hidden_states=FluxPipeline._pack_latents(x, b, c, h, w),
                    timestep=told / 1000,
                    guidance=guidance,
                    pooled_projections=pooled,
                    encoder_hidden_states=hidden,
                    txt_ids=text_ids,
                    img_ids=ids,
                ).sample
                found = FluxPipeline._unpack_latents(found, 8 * h, 8 * w, 8)
            rows.append((found, noise - z))
    differences = [(found - wanted).reshape(len(z), -1) for found, wanted in rows]
    return torch.stack([d.norm(p=2, dim=1) if normed else (d**2).mean(1) for d in differences], 1)


@pytest.mark.parametrize("normed", [False, True], ids=["mse", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_the_official_formulas(name, normed):
    pipe, plugin = classifier(name, timesteps=30, norm="l2" if normed else "mse", margin={SD3: 20, FLUX: 12}.get(name, 10))
    scorer, pixels = clean(pipe, plugin, pictures(2))
    z = scorer.latents(pixels)
    found = scorer.errors(z, [(0, PROMPTS[0]), (1, PROMPTS[1])])
    bank = torch.randn(30, *z.shape[1:], generator=torch.Generator().manual_seed(0))
    times = [level.t for level in scorer.levels]
    if name in (SD3, FLUX):  # its times are looked up in the scheduler's own
        own = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config).timesteps
        times = [float(own[(own - t).abs().argmin()]) for t in times]
    with torch.no_grad():
        wanted = official(name, pipe, pixels, PROMPTS[:2], bank, times, normed)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)


def test_a_relative_score_is_the_official_retrieval_distance():
    pipe, plugin = classifier(SD, timesteps=30, norm="l2")
    scorer, pixels = clean(pipe, plugin, pictures(2))
    z = scorer.latents(pixels)
    bank = torch.randn(30, *z.shape[1:], generator=torch.Generator().manual_seed(0))
    times = [level.t for level in scorer.levels]
    with torch.no_grad():
        dist = official(SD, pipe, pixels, PROMPTS[:2], bank, times, True) - official(SD, pipe, pixels, ["", ""], bank, times, True)
    assert plugin.score(pipe, pictures(2), PROMPTS[:2]) == pytest.approx((-dist.mean(1)).tolist(), rel=1e-3, abs=1e-5)


# --- closed forms -------------------------------------------------------------------------------------------------------------------------


class Mixture:
    """A mixture of Gaussians N(m, v I) in two dimensions: its density, and the noise that its exact denoiser predicts."""

    def __init__(self, means, v):
        self.means, self.v = torch.tensor(means, dtype=torch.float64), v

    def log_density(self, z):
        d = (z[:, None] - self.means).square().sum(-1)
        return torch.logsumexp(-d / (2 * self.v), 1) - math.log(2 * math.pi * self.v * len(self.means))

    def predict(self, x, level):
        variance = level.a**2 * self.v + level.s**2
        off = x[:, None] - level.a * self.means
        shares = (-off.square().sum(-1) / (2 * variance)).softmax(1)
        return level.s * (shares[..., None] * off).sum(1) / variance


CLASSES = (Mixture([[-1.5, 0.0], [1.5, 0.5]], 0.2), Mixture([[0.0, 1.5], [0.3, -1.5]], 0.3), Mixture([[0.0, 0.0]], 1.0))


def test_weighted_by_the_log_snr_the_errors_are_the_log_likelihood():
    """-log p(z | c) = 1/2 integral of E |eps - eps_hat|^2 d log SNR + const (Kingma et al. 2021), on a conditional mixture."""
    logs = torch.linspace(-9, 9, 73, dtype=torch.float64)
    levels = [Level(0, math.sqrt(1 / (1 + math.exp(-u))), math.sqrt(1 / (1 + math.exp(u)))) for u in logs.tolist()]
    step = float(logs[1] - logs[0])
    weights = torch.full((len(levels),), step * len(levels), dtype=torch.float64)  # `weighted` takes the mean over the levels
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    draws = 1500
    found = []
    for mixture in CLASSES:
        noises = torch.Generator().manual_seed(1)  # the same for every class
        errors = []
        for level in levels:
            noise = torch.randn(draws, 2, generator=noises, dtype=torch.float64)
            many, drawn = z.repeat_interleave(draws, 0), noise.repeat(len(z), 1)
            off = error(mixture.predict(noised(many, drawn, level), level), target("epsilon", many, drawn, level), "mse")
            errors.append(off.view(len(z), draws).mean(1).double())
        found.append(weighted(torch.stack(errors, 1), weights))
    found = torch.stack(found, 1)  # a mean over 2 dimensions is their sum / 2, the integral's half
    true = torch.stack([-mixture.log_density(z) for mixture in CLASSES], 1)
    torch.testing.assert_close(found - found[:, :1], true - true[:, :1], rtol=0.02, atol=0.06)
    clear = true.sort(1).values.diff(dim=1)[:, 0] > 0.1
    assert clear.sum() > 15
    assert (found.argmin(1) == true.argmin(1))[clear].all()


def exact(pipe, spread_of_classes=0.6, v=0.05):
    """Makes the denoiser of a tiny SD that of Gaussian classes N(m(prompt), v I) in latent space; gives m."""
    weights = torch.randn(32, 4 * 8 * 8, generator=torch.Generator().manual_seed(5))
    abar = pipe.scheduler.alphas_cumprod

    def means(hidden):
        feature = torch.nn.functional.normalize(hidden.mean(1) - hidden.mean((1, 2), keepdim=True)[:, 0], dim=1)
        return spread_of_classes * (feature @ weights).view(-1, 4, 8, 8)

    def forward(sample, timestep, encoder_hidden_states, **kwargs):
        a, s = abar[timestep].sqrt(), (1 - abar[timestep]).sqrt()
        return (s * (sample - a * means(encoder_hidden_states)) / (a * a * v + s * s),)

    pipe.unet.forward = forward
    hidden, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    return means(hidden), v


def test_on_gaussian_classes_the_best_prompt_is_the_bayes_label():
    """Through a pipeline whose denoiser is exact, near the borders of the classes."""
    pipe, _ = classifier(SD)
    means, v = exact(pipe)
    generator = torch.Generator().manual_seed(3)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j] * 8
    share = torch.rand(len(pairs), generator=generator).view(-1, 1, 1, 1) * 0.3 + 0.35  # between two means, near the border
    first, second = (torch.stack([means[pair[k]] for pair in pairs]) for k in (0, 1))
    z = first + share * (second - first) + v**0.5 * torch.randn(len(pairs), 4, 8, 8, generator=generator)
    distances = (z[:, None] - means[None]).square().flatten(2).sum(2)
    bayes, gaps = distances.argmin(1), distances.sort(1).values.diff(dim=1)[:, 0]
    whole = torch.zeros(len(z), 4)
    for seed in range(3):
        scorer = Scorer(pipe, DiffusionClassifier(timesteps=50, margin=0, size=(64, 64), seed=seed))
        errors = scorer.errors(z, [(i, prompt) for i in range(len(z)) for prompt in PROMPTS]).view(len(z), 4, 50)
        whole += weighted(errors, scorer.weights)
    agrees, clear = whole.argmin(1) == bayes, gaps > 0.15  # half a nat is 0.05
    assert agrees.float().mean() > 0.9
    assert clear.float().mean() > 0.8
    assert agrees[clear].all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_weights_of_epsilon_make_one_error_of_all_predictions(kind):
    generator = torch.Generator().manual_seed(0)
    z, noise, off = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).unbind(0)
    level = Level(0, 0.3, 0.7) if kind == "flow" else Level(0, 0.6, 0.8)
    x = noised(z, noise, level)
    said = target(kind, z, noise, level) + off
    if kind == "flow":
        eps = x + level.a * said
    elif kind == "v_prediction":
        eps = level.s * x + level.a * said
    else:
        eps = (x - level.a * said) / level.s if kind == "sample" else said
    wanted = (eps - noise).square().mean(1)
    found = weighting("epsilon", [level], kind) * error(said, target(kind, z, noise, level), "mse")
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=0)


def test_the_schemes_of_flow_models():
    levels = flow_schedule(1000, 3.0)[20:980:33]
    sigmas = torch.tensor([level.s for level in levels])
    for scheme in ("sigma_sqrt", "cosmap"):
        wanted = compute_loss_weighting_for_sd3(scheme, sigmas)
        torch.testing.assert_close(weighting(scheme, levels, "flow"), wanted, rtol=1e-5, atol=0)
    assert (weighting("uniform", levels, "flow") == 1).all()


# --- identities ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, FLUX])
def test_equal_prompts_have_equal_scores(name):
    pipe, plugin = classifier(name)
    images, again = pictures(2), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    values = plugin.errors(pipe, images, again).values
    assert values.shape == (2, 3, 3)
    assert torch.equal(values[:, 0], values[:, 2])
    assert not torch.equal(values[:, 0], values[:, 1])
    assert plugin.score(pipe, images, ["", ""]) == pytest.approx([0, 0], abs=1e-7)


@pytest.mark.parametrize("name", [SD, SD3])
def test_the_order_and_the_size_of_batches_do_not_matter(name):
    pipe, plugin = classifier(name, batch=1)
    images = pictures(3)
    straight = plugin.errors(pipe, images, PROMPTS).values
    turned = plugin.errors(pipe, images[::-1], PROMPTS[::-1]).values
    assert torch.equal(straight, turned.flip(0, 1))
    for batch in (2, 5, 64):
        other = DiffusionClassifier(**{**plugin.own_knobs, "batch": batch}).errors(pipe, images, PROMPTS).values
        torch.testing.assert_close(other, straight, rtol=1e-4, atol=1e-6)


def test_a_weight_of_one_time_alone_is_that_times_error():
    pipe, plugin = classifier(SD)
    images = pictures(3)
    values = plugin.errors(pipe, images, PROMPTS).values
    for k in range(3):
        one = DiffusionClassifier(**{**plugin.own_knobs, "weights": tuple(3.0 * (i == k) for i in range(3)), "relative": False})
        assert one.classify(pipe, images, PROMPTS) == values[..., k].argmin(1).tolist()
        assert one.score(pipe, images, PROMPTS[:3]) == pytest.approx([-float(values[i, i, k]) for i in range(3)], rel=1e-5)


def test_every_prompt_and_picture_meets_the_same_noise():
    pipe, plugin = classifier(SD, batch=2)
    images = pictures(2)
    scorer, _ = clean(pipe, plugin, images)
    calls = heard(pipe)
    plugin.errors(pipe, images, PROMPTS)
    z = torch.cat([scorer.latents(torch.from_numpy(np.asarray(i)).permute(2, 0, 1)[None].float() / 127.5 - 1) for i in images])
    noises: dict[int, list[torch.Tensor]] = {}
    for call in calls:
        level = next(level for level in scorer.levels if level.t == int(call["timestep"]))
        noises.setdefault(int(call["timestep"]), []).extend((call["sample"] - level.a * z) / level.s)
    assert len(noises) == 3
    for drawn in noises.values():
        assert len(drawn) == 8
        for noise in drawn[1:]:
            torch.testing.assert_close(noise, drawn[0], rtol=1e-3, atol=1e-3)
    first = [drawn[0] for drawn in noises.values()]
    assert float((first[0] - first[1]).abs().mean()) > 0.5
    assert plugin.errors(pipe, images, PROMPTS[:1]).values.equal(plugin.errors(pipe, images, PROMPTS[:1]).values)
    other = DiffusionClassifier(**{**plugin.own_knobs, "seed": 1})
    assert not torch.equal(other.errors(pipe, images, PROMPTS[:1]).values, plugin.errors(pipe, images, PROMPTS[:1]).values)


def test_a_picture_is_the_mode_of_its_posterior_and_nothing_is_drawn_from_torchs_own_generator():
    pipe, plugin = classifier(SD)
    scorer, pixels = clean(pipe, plugin, pictures(2))
    before = torch.get_rng_state()
    z = scorer.latents(pixels)
    plugin.score(pipe, pictures(2), PROMPTS[:2])
    assert torch.equal(torch.get_rng_state(), before)
    posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(z, posterior.mean * pipe.vae.config.scaling_factor)
    assert float((z - posterior.sample() * pipe.vae.config.scaling_factor).abs().max()) > 1e-3
    torch.testing.assert_close(z, to_latents(pipe, load_pipeline(sibling(pipe)).plugins.family, pixels))


@pytest.mark.parametrize("name", [SD, FLUX])
def test_forwards_and_rows_follow_from_the_batch(name):
    pipe, plugin = classifier(name, batch=4)
    calls = heard(pipe)
    measured = plugin.errors(pipe, pictures(3), PROMPTS[:3])  # 9 pairs: batches of 4, 4, 1
    assert measured.forwards == len(calls) == 3 * 3
    assert measured.times == tuple(sorted(measured.times))
    assert {len(call.get("sample", call.get("hidden_states"))) for call in calls} == {4, 1}
    calls.clear()
    assert plugin.errors(pipe, pictures(3), PROMPTS[:3] * 2).forwards == 9  # what is asked twice has one answer
    assert len(calls) == 9


# --- who is asked, and what stays ---------------------------------------------------------------------------------------------------------


def test_caches_and_guidance_take_no_part():
    if not importlib.util.find_spec("diffgraft_deepcache"):
        pytest.skip("deepcache is not installed")
    pipe, plugin = classifier(SD)
    plain = plugin.errors(pipe, pictures(2), PROMPTS).values
    unet, vae = dict(vars(pipe.unet)), dict(vars(pipe.vae))
    load_pipeline(pipe, plugins=["deepcache", plugin])
    assert torch.equal(pipe.plugins["diffusion_classifier"].errors(pipe, pictures(2), PROMPTS).values, plain)
    pipe.plugins.clear()
    assert vars(pipe.unet).keys() == unet.keys()
    assert vars(pipe.vae).keys() == vae.keys()
    assert not hasattr(pipe, "plugins")


def test_a_run_tells_the_scores_of_its_pictures():
    made = make(SD)
    kwargs = {**made.kwargs, "num_inference_steps": 2, "prompt": PROMPTS[:2], "negative_prompt": None}
    plain = made.pipe(**{**kwargs, "output_type": "pil"}, generator=torch.Generator().manual_seed(0)).images
    load_pipeline(made.pipe, plugins=[DiffusionClassifier(timesteps=2, scores=True, norm="l2")])
    found = {}
    for kind in ("pil", "np", "pt", "latent"):
        out = made.pipe(**{**kwargs, "output_type": kind}, generator=torch.Generator().manual_seed(0))
        report = made.pipe.plugins.report().plugins["diffusion_classifier"]
        found[kind] = report.records["scores"]
        assert any(note.startswith("scores under the prompts: ") for note in report.notes)
        if kind == "pil":
            assert all(np.array_equal(a, b) for a, b in zip(out.images, plain, strict=True))
    on_it = DiffusionClassifier(timesteps=2, size=(side(made), side(made)), norm="l2")
    assert found["pil"].tolist() == pytest.approx(on_it.score(made.pipe, plain, PROMPTS[:2]), abs=1e-6)
    torch.testing.assert_close(found["np"], found["pt"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pil"], found["np"], rtol=0.2, atol=0.05)  # up to 8 bits
    several = {**kwargs, "num_images_per_prompt": 2, "output_type": "latent", "return_dict": False}
    made.pipe(**several, generator=torch.Generator().manual_seed(0))
    assert made.pipe.plugins.report().plugins["diffusion_classifier"].records["scores"].shape == (4,)


def test_a_run_without_a_text_says_so():
    made = make(SD)
    hidden, empty = made.pipe.encode_prompt(PROMPTS[:1], "cpu", 1, True)
    load_pipeline(made.pipe, plugins=[DiffusionClassifier(scores=True)])
    kwargs = {key: value for key, value in made.kwargs.items() if "prompt" not in key}
    made.pipe(**{**kwargs, "prompt_embeds": hidden, "negative_prompt_embeds": empty, "num_inference_steps": 1})
    assert "embeddings" in str(made.pipe.plugins.report())


def test_rbf_search_climbs_the_score():
    """Registered as a reward; asked in the middle of a run, it judges by the very denoiser that is running."""
    if not importlib.util.find_spec("diffgraft_rbf_search"):
        pytest.skip("rbf_search is not installed")
    made = make(FLUX)
    own = DiffusionClassifier(timesteps=2, relative=False)
    search = ("rbf_search", {"reward": REWARD, "max_nfe": 8, "particles": 4, "record": True, "interpolant": "linear", "grid": "pipeline"})
    load_pipeline(made.pipe, plugins=[search, own])
    kwargs = {**made.kwargs, "num_inference_steps": 2, "prompt": PROMPTS[0], "output_type": "pil"}
    [image] = made.pipe(**kwargs, generator=torch.Generator().manual_seed(0)).images
    report = made.pipe.plugins.report().plugins["rbf_search"]
    rewards = report.records["reward"]
    assert rewards.numel() == 8
    assert rewards.unique().numel() > 4  # candidates are told apart
    sized = DiffusionClassifier(timesteps=2, relative=False, size=(side(made), side(made)))
    [again] = sized.score(made.pipe, [image], [PROMPTS[0]])
    assert float((rewards.flatten() - again).abs().min()) < 1e-5
    [told] = [note for note in report.notes if note.startswith("reward of the result: ")]
    assert float(told.split(": ")[1]) == pytest.approx(again, abs=1e-3)


def test_it_is_registered_as_a_reward():
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'[project.entry-points."diffgraft.rewards"]\ndiffusion_classifier = "{REWARD}"\n' in declared
    assert find_reward("reward", REWARD).scores is reward


def test_a_pipelines_score_is_a_reward_for_another_one():
    pipe, plugin = classifier(SD)
    judge = find_reward("reward", plugin.reward(pipe))
    assert judge.name == "diffusion_classifier"
    assert judge(pictures(2), PROMPTS[:2]) == plugin.score(pipe, pictures(2), PROMPTS[:2])


# --- weights of times ---------------------------------------------------------------------------------------------------------------------


def planted(n, seed):
    """(errors [n, 3, 6], labels): time 4 tells the label, time 1 tells the contrary, the others nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    errors = 1 + 0.3 * torch.randn(n, 3, 6, generator=generator)
    errors[torch.arange(n), labels, 4] -= 0.4
    errors[torch.arange(n), labels, 1] += 0.4
    return errors, labels


def test_fitted_weights_find_the_times_that_tell():
    train, held, fresh = planted(300, 0), planted(100, 1), planted(300, 2)
    before = accuracy(*fresh, torch.ones(6))
    for options in ({}, {"held": held}, {"degree": 5, "steps": 400}, {"l1": 0.01}):
        weights = torch.tensor(fit_weights(*train, rate=0.05, **options))
        assert weights.argmax() == 4
        assert weights[1] < 0
        assert accuracy(*fresh, weights) > before + 0.2, options
    positive = torch.tensor(fit_weights(*train, rate=0.05, positive=True, steps=300))
    assert (positive > 0).all()
    assert positive.argmax() == 4


def test_a_fit_takes_the_steps_of_adam_on_the_cross_entropy():
    """The first steps written out; begun at 0 (each weight by itself), or at the constant 1 (a polynomial)."""
    errors, labels = planted(20, 0)
    for degree in (None, 2):
        powers = torch.eye(6) if degree is None else torch.stack([torch.linspace(-1, 1, 6) ** i for i in range(3)])
        free = torch.zeros(len(powers))
        free[0] = 0.0 if degree is None else 1.0
        m, v = torch.zeros_like(free), torch.zeros_like(free)
        one_hot = torch.nn.functional.one_hot(labels, 3).float()
        for step in range(1, 4):
            used = free @ powers
            shares = (-(errors * used).mean(-1)).softmax(1)
            gradient = powers @ (((one_hot - shares)[..., None] * errors).sum((0, 1)) / (6 * len(labels)))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            free = free - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(torch.tensor(fit_weights(errors, labels, degree=degree, steps=3)), used, rtol=1e-3, atol=1e-5)


def test_fitted_weights_are_a_knob():
    pipe, plugin = classifier(SD)
    values = plugin.errors(pipe, pictures(4), PROMPTS).values
    weights = plugin.fit_weights(values, [0, 1, 2, 3], steps=3)
    assert weights == plugin.fit_weights(values, torch.arange(4), steps=3)
    load_pipeline(pipe, plugins=[plugin])
    pipe.plugins.configure("diffusion_classifier", weights=weights)
    chosen = pipe.plugins["diffusion_classifier"].classify(pipe, pictures(4), PROMPTS)
    assert chosen == (values * torch.tensor(weights)).mean(-1).argmin(1).tolist()


@pytest.mark.parametrize(
    ("labels", "options"), [([0, 4], {}), ([0], {}), ([0.0, 1.0], {}), ([0, 1], {"steps": 0}), ([0, 1], {"degree": -1})]
)
def test_a_fit_of_nothing_is_refused(labels, options):
    with pytest.raises(ConfigError, match="fit_weights: "):
        fit_weights(torch.rand(2, 4, 5), labels, **options)


def test_a_tie_is_wrong():
    errors = torch.tensor([[[1.0], [1.0], [2.0]], [[1.0], [0.5], [2.0]]])
    assert accuracy(errors, torch.tensor([0, 1]), torch.ones(1)) == 0.5


# --- bad input ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "prompts", "text"),
    [
        (2, PROMPTS[:3], "2 pictures and 3 prompts"),
        (2, "a cat", "2 pictures and one text"),
        (1, [3], "prompts: 3 is no text"),
        ([torch.zeros(3, 8, 8)], ["a"], r"images\[0\] is a Tensor"),
        (["no/such/file.png"], ["a"], "no/such/file.png"),
    ],
)
def test_bad_pairs_are_refused_before_the_denoiser_is_asked(images, prompts, text):
    pipe, plugin = classifier(SD)
    calls = heard(pipe)
    with pytest.raises(ConfigError, match=text):
        plugin.score(pipe, pictures(images) if isinstance(images, int) else images, prompts)
    assert not calls


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ("a cat", "prompts = 'a cat': give a list"),
        ([], "at least one"),
        ([["a"], ["a", "b"]], "the same number"),
        ([["a", "b"]], "2 pictures but 1 lists"),
        ([["a", 4], ["a", "b"]], "4 is no text"),
    ],
)
def test_bad_choices_are_refused(prompts, text):
    pipe, plugin = classifier(SD)
    with pytest.raises(ConfigError, match=text):
        plugin.classify(pipe, pictures(2), prompts)


def test_nothing_has_no_scores():
    pipe, plugin = classifier(SD)
    assert plugin.score(pipe, [], []) == plugin.classify(pipe, [], ["a", "b"]) == []
    assert plugin.errors(pipe, [], ["a", "b"]).values.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"timesteps": 600}, "timesteps = 600"),
        ({"margin": 500}, "margin = 500"),
        ({"weights": (1.0, 2.0)}, "weights = 2 numbers, but errors are measured at 3 levels"),
    ],
)
def test_levels_outside_the_schedule_are_refused_when_it_is_put_on(knobs, text):
    pipe, plugin = classifier(SD, **knobs)
    with pytest.raises(ConfigError, match=text):
        load_pipeline(pipe, plugins=[plugin])
    assert not hasattr(pipe, "plugins")
    with pytest.raises(ConfigError, match=text):
        plugin.score(pipe, pictures(1), PROMPTS[:1])


def test_a_size_that_latents_have_not_is_refused():
    pipe, plugin = classifier(SD, size=(16, 17))
    with pytest.raises(ConfigError, match=r"size = .*multiples of"):
        plugin.score(pipe, pictures(1), PROMPTS[:1])


def test_other_pipelines_are_refused_with_the_reason():
    plugin = DiffusionClassifier()
    with pytest.raises(Unsupported, match="does not work on WanPipeline"):
        plugin.score(make("WanPipeline").pipe, pictures(1), PROMPTS[:1])
    pipe = StableDiffusionImg2ImgPipeline(**make(SD).pipe.components, requires_safety_checker=False)
    with pytest.raises(Unsupported, match="text-to-image"):
        plugin.reward(pipe)
    pipe, plugin = classifier(SD)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(Unsupported, match=r"EDM.s epsilon"):
        plugin.score(pipe, pictures(1), PROMPTS[:1])


def test_a_cache_of_diffusers_itself_is_refused():
    pipe, plugin = classifier(FLUX)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(Unsupported, match=r"disable_cache\(\)"):
        plugin.score(pipe, pictures(1), PROMPTS[:1])
    pipe.transformer.disable_cache()
    plugin.score(pipe, pictures(1), PROMPTS[:1])


def test_a_reward_that_no_run_asks_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no run does.*reward\(pipe\)"):
        reward(pictures(1), PROMPTS[:1])
