"""BDIA: the solver on data whose score is known, exact round trips through real pipelines, inversion and edits."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Conflict, Plugin, Schedule, Unsupported, load_pipeline, unload
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.lab.recipes import read_record
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.inversion import encode, invert
from diffgraft_bdia import BDIA, BDIAScheduler, FlowBDIAScheduler
from diffgraft_bdia.method import Levels, bdia, clean_and_noise, move
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from typer.testing import CliRunner

MEANS = torch.tensor([-1.5, 0.3, 1.2], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}


def noise_in(x, a, s):
    """eps of the exact denoiser of a Gaussian mixture."""
    variance = (a * SPREADS) ** 2 + s**2
    away = x[..., None] - a * MEANS
    share = (SHARES.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
    return s * (share * away / variance).sum(-1)


def output(scheduler, x, t):
    """What a perfect model of the scheduler's kind predicts."""
    if isinstance(scheduler, FlowBDIAScheduler | FlowMatchEulerDiscreteScheduler):
        s = t.double() / 1000
        eps = noise_in(x, 1 - s, s)
        return eps - (MEANS @ SHARES if s == 1 else (x - s * eps) / (1 - s))
    a = scheduler.alphas_cumprod.double()[t].sqrt()
    s = (1 - a**2).sqrt()
    eps = noise_in(x, a, s)
    return {"epsilon": eps, "v_prediction": a * eps - s * (x - s * eps) / a, "sample": (x - s * eps) / a}[scheduler.config.prediction_type]


def walk(scheduler, z, steps, pair=None):
    """All states of a run."""
    scheduler.set_timesteps(steps)
    if pair is not None:
        scheduler.start_from(*pair)
    states = [z]
    for t in scheduler.timesteps:
        z = scheduler.step(output(scheduler, z.double(), t).to(z.dtype), t, z).prev_sample
        states.append(z)
    return states


def noise(n=200, dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# the solver -----------------------------------------------------------------------------------------------------------------------


def test_the_equation_can_be_solved_for_either_end():
    generator = torch.Generator().manual_seed(0)
    before, back, forth = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    z = torch.randn(16, generator=generator, dtype=torch.float64)
    after = bdia(before, back, forth, 0.7)
    torch.testing.assert_close(after, before - 0.3 * (before - z) - 0.7 * (back - z) + forth - z)  # eq. 17 as it is written
    torch.testing.assert_close(bdia(after, forth, back, 1 / 0.7), before)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_x0_and_noise_come_back_from_every_prediction(kind):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    s = torch.tensor(0.6, dtype=torch.float64)
    at = Levels(1 - s if kind == "flow" else (1 - s**2).sqrt(), s)
    z = at.a * x0 + at.s * eps
    said = {"epsilon": eps, "v_prediction": at.a * eps - at.s * x0, "sample": x0, "flow": eps - x0}[kind]
    found = clean_and_noise(z, said, at, at, kind)
    torch.testing.assert_close(torch.stack(found), torch.stack([x0, eps]))
    torch.testing.assert_close(move(*found, at), z)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_gamma_nought_is_ddim(kind, spacing):
    config = {**SD, "prediction_type": kind, "timestep_spacing": spacing}
    ddim = DDIMScheduler(**config, clip_sample=False)
    ddim.set_timesteps(20)
    z = noise()
    for t in ddim.timesteps:
        z = ddim.step(output(ddim, z, t), t, z).prev_sample
    torch.testing.assert_close(walk(BDIAScheduler(**config, gamma=0.0, precision="float64"), noise(), 20)[-1], z, rtol=0, atol=1e-5)


def test_gamma_nought_is_flow_matching_euler():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(12)
    z = noise(dtype=torch.float32)
    for t in euler.timesteps:
        z = euler.step(output(euler, z.double(), t).float(), t, z).prev_sample
    torch.testing.assert_close(walk(FlowBDIAScheduler(shift=3.0, gamma=0.0), noise(dtype=torch.float32), 12)[-1], z, rtol=0, atol=1e-5)


def test_half_gamma_is_of_second_order():
    """Card: RMS against 500 steps on a mixture; gamma = 0.5 gains the most, gamma = 1 less, and nothing at few steps."""
    reference = walk(BDIAScheduler(**SD, gamma=0.0, precision="float64"), noise(), 500)[-1]

    def error(gamma, steps):
        found = walk(BDIAScheduler(**SD, gamma=gamma, precision="float64"), noise(), steps)[-1]
        return float((found - reference).square().mean().sqrt())

    errors = {gamma: [error(gamma, steps) for steps in (10, 20, 40)] for gamma in (0.0, 0.5, 1.0)}
    assert all(half < one < nought for half, one, nought in zip(errors[0.5], errors[1.0], errors[0.0], strict=True)), errors
    assert errors[0.0][0] / errors[0.0][2] < 6, "DDIM is of first order"
    assert errors[0.5][0] / errors[0.5][2] > 6, "halving the step divides the error by more than two"


@pytest.mark.parametrize("cls", [BDIAScheduler, FlowBDIAScheduler])
@pytest.mark.parametrize(("gamma", "steps", "precision", "tolerance"), [
    (1.0, 50, "float64", 1e-9), (0.96, 50, "float64", 1e-9), (0.9, 50, "float64", 1e-9), (0.5, 10, "float64", 1e-9),
    (1.0, 50, "float32", 1e-4), (0.96, 50, "float32", 1e-4),
])  # fmt: skip
def test_a_walk_is_undone(cls, gamma, steps, precision, tolerance):
    options = {"gamma": gamma, "precision": precision, **(SD if cls is BDIAScheduler else {"shift": 3.0})}
    dtype = getattr(torch, precision)
    down = walk(cls(**options), noise(dtype=dtype), steps)
    up = walk(cls(**options, inverse=True), down[-1], steps, down[:-3:-1])
    assert float((up[-1] - down[0]).abs().max()) < tolerance
    assert float((walk(cls(**options), up[-1], steps, up[:-3:-1])[-1] - down[-1]).abs().max()) < tolerance


@pytest.mark.parametrize("cls", [BDIAScheduler, FlowBDIAScheduler])
def test_any_picture_has_a_code(cls):
    """One that no walk of this solver made; DDIM's inversion loses it."""
    options = SD if cls is BDIAScheduler else {"shift": 3.0}
    picture = MEANS[torch.arange(200) % 3] + 0.1 * noise()
    up = walk(cls(**options, precision="float64", inverse=True), picture, 20)
    assert float((walk(cls(**options, precision="float64"), up[-1], 20, up[:-3:-1])[-1] - picture).abs().max()) < 1e-9
    assert float((walk(cls(**options, precision="float64", gamma=0.0), up[-1], 20)[-1] - picture).abs().max()) > 1e-2


@pytest.mark.parametrize(("options", "part"), [
    ({"gamma": 1.5}, "gamma = 1.5"), ({"gamma": 0.0, "inverse": True}, "cannot be undone"), ({"precision": "bfloat16"}, "bfloat16"),
    ({"clip_sample": True}, "clip_sample"), ({"thresholding": True}, "thresholding"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        BDIAScheduler(**options)


def test_an_unstable_inversion_is_refused_before_it_begins():
    scheduler = BDIAScheduler(**SD, gamma=0.5, inverse=True)
    with pytest.raises(ValueError, match=r"gamma = 0.5 cannot be inverted over 50 steps in float32.*a smaller strength.*float64"):
        scheduler.set_timesteps(50)
    scheduler.set_timesteps(8)


# in pipelines ---------------------------------------------------------------------------------------------------------------------

PIPELINES = ("StableDiffusionPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


def call(made, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 6, **changes}
    return made.pipe(**kwargs, generator=torch.Generator().manual_seed(3))[0]


def settings(made):
    return CallSettings(steps=6, extra={k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")})


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("gamma", [1.0, 0.96])
def test_latents_come_back_through_a_pipeline_with_guidance(name, gamma):
    made = make(name)
    load_pipeline(made.pipe, plugins=[BDIA(gamma=gamma)])
    latents = call(made)
    unload(made.pipe)
    code = invert(made.pipe, BDIA(gamma=gamma), latents, Sample(0, str(made.kwargs["prompt"])), settings(made))
    load_pipeline(made.pipe, plugins=[BDIA(gamma=gamma, start=code)])
    assert float((call(made) - latents).abs().max()) < 1e-4
    edited = call(made, prompt="something else")
    assert float((edited - latents).abs().max()) > 1e-3


def test_without_the_step_back_it_says_that_it_did_nothing():
    made = make("StableDiffusionPipeline")
    before = call(made)
    load_pipeline(made.pipe, plugins=[BDIA(gamma=0)])
    assert torch.equal(call(made), before)
    [note] = made.pipe.plugins.report().plugins["bdia"].notes
    assert note.startswith("inactive: gamma is 0")


def test_plain_diffusers_use():
    grafted, plain = make("StableDiffusionPipeline"), make("StableDiffusionPipeline")
    load_pipeline(grafted.pipe, plugins=[BDIA(gamma=0.7)])
    plain.pipe.scheduler = BDIAScheduler.from_config(plain.pipe.scheduler.config, gamma=0.7)
    assert torch.equal(call(grafted), call(plain))


def test_a_scheduler_survives_saving(tmp_path):
    scheduler = BDIAScheduler.from_config(DDIMScheduler(**SD, clip_sample=False).config, gamma=0.7)
    scheduler.save_pretrained(tmp_path)
    loaded = BDIAScheduler.from_pretrained(tmp_path)
    assert loaded.config.gamma == 0.7
    torch.testing.assert_close(walk(loaded, noise(), 5)[-1], walk(scheduler, noise(), 5)[-1])


def test_half_precision_pipelines_keep_exact_states():
    """Latents handed out in bfloat16 and handed back are the states that were kept, not their rounded copies."""
    scheduler = BDIAScheduler(**SD, gamma=1.0)
    scheduler.set_timesteps(10)
    z = noise(dtype=torch.bfloat16)
    for t in scheduler.timesteps:
        z = scheduler.step(output(scheduler, z.double(), t).to(z.dtype), t, z).prev_sample
        assert z.dtype == torch.bfloat16
    kept = scheduler.pair()["noise"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept.to(torch.bfloat16), z)
    assert not torch.equal(kept, z.float())


def test_a_picture_goes_to_latents_and_back():
    made = make("StableDiffusionPipeline")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    latents = encode(made.pipe, registry.find_family(StableDiffusionPipeline), picture, CallSettings())
    assert latents.shape == (1, 4, 8, 8)
    code = invert(made.pipe, BDIA(precision="float64"), picture, Sample(0, "a picture"), settings(made))
    load_pipeline(made.pipe, plugins=[BDIA(precision="float64", start=code)])
    torch.testing.assert_close(call(made, prompt="a picture"), latents, rtol=0, atol=1e-4)


def test_a_code_is_written_and_read(tmp_path):
    made = make("StableDiffusionPipeline")
    path = tmp_path / "code.safetensors"
    latents = call(made)
    invert(made.pipe, BDIA(), latents, Sample(0, str(made.kwargs["prompt"])), settings(made), path)
    load_pipeline(made.pipe, plugins=[BDIA(start=str(path))])
    torch.testing.assert_close(call(made), latents, rtol=0, atol=1e-4)


def test_codes_that_do_not_fit_are_refused(tmp_path):
    made = make("StableDiffusionPipeline")
    code = invert(made.pipe, BDIA(), call(made), Sample(0, "x"), settings(made))
    load_pipeline(made.pipe, plugins=[BDIA(start=code)])
    with pytest.raises(Exception, match=r"steps: made for 6, found 5.*diffgraft invert bdia"):
        call(made, num_inference_steps=5)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins=[BDIA(gamma=0.9, start=code)])
    with pytest.raises(ConfigError, match=r"gamma = 0.9, but start was made with gamma = 1.0"):
        call(made)
    with pytest.raises(ConfigError, match=r"no such file; make one with `diffgraft invert bdia"):
        load_pipeline(make("StableDiffusionPipeline").pipe, plugins=[BDIA(start=str(tmp_path / "none.safetensors"))])
    assert isinstance(code, Artefact)


@pytest.mark.parametrize("own", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 6), (0.6, 3), (0.2, 1), (0.05, 1)])
def test_a_walk_up_may_stop_on_the_way(own, strength, steps):
    """A code of a part of the steps: the run goes down from there, and makes the picture again; an edit keeps more of it."""
    made = make("StableDiffusionPipeline")
    made.pipe.scheduler = own.from_config(made.pipe.scheduler.config)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.7
    code = invert(made.pipe, BDIA(strength=strength), latents, Sample(0, str(made.kwargs["prompt"])), settings(made))
    assert code.made_for.steps == steps
    load_pipeline(made.pipe, plugins=[BDIA(start=code)])
    assert float((call(made) - latents).abs().max()) < 2e-4
    assert made.pipe.plugins.report().steps == steps
    if strength == 0.6:  # one step of six is one of seven too: DDIM's last timestep is always the same
        with pytest.raises(ConfigError, match=r"start was walked up \d of 6 steps.*num_inference_steps=6"):
            call(made, num_inference_steps=7)
        with pytest.raises((ConfigError, ArtefactMismatch)):
            call(made, num_inference_steps=1)


@torch.no_grad()
@pytest.mark.parametrize(("gamma", "strength", "steps"), [(0.9, 1.0, 6), (0.5, 0.6, 3)])
def test_the_walks_are_those_by_hand(gamma, strength, steps):
    """Up a part of the way and down again under another prompt and guidance: eq. 17 in a loop with nothing of the plugin in it."""
    made, n = make("StableDiffusionPipeline"), 6
    pipe = made.pipe.to(torch.float64)
    z0 = 0.7 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bare = {key: value for key, value in made.kwargs.items() if key in ("height", "width", "negative_prompt")}
    knobs = {"gamma": gamma, "precision": "float64"}
    code = invert(pipe, BDIA(**knobs, strength=strength), z0, Sample(0, "a cat"), CallSettings(steps=n, extra=bare))
    load_pipeline(pipe, plugins=[BDIA(**knobs, start=code)])
    edited = pipe("a car", **bare, num_inference_steps=n, guidance_scale=3.0, output_type="latent").images
    unload(pipe)

    def moves(z, i, t, text, w):
        """z's moves to other levels by one answer of the denoiser."""
        tokens = [
            pipe.tokenizer(each, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt")
            for each in (bare["negative_prompt"], text)
        ]
        v0, v = (pipe.unet(z, t, encoder_hidden_states=pipe.text_encoder(each.input_ids)[0]).sample for each in tokens)
        eps = v0 + w * (v - v0)
        x0 = (z - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        return lambda j: abar[j] ** 0.5 * x0 + (1 - abar[j]) ** 0.5 * eps

    pipe.scheduler.set_timesteps(n)
    times = pipe.scheduler.timesteps
    abar = [*pipe.scheduler.alphas_cumprod[times].double(), pipe.scheduler.final_alpha_cumprod.double()]
    before, z = None, z0
    for i in range(n, n - steps, -1):
        to = moves(z, i, times[min(i, n - 1)], "a cat", 1.0)
        before, z = z, to(i - 1) if before is None else (before - to(i + 1)) / gamma + to(i - 1)
    z, before = before, z
    for i in range(n - steps + 1, n):
        to = moves(z, i, times[i], "a car", 3.0)
        before, z = z, gamma * (before - to(i - 1)) + to(i + 1)
    torch.testing.assert_close(edited, z, rtol=0, atol=1e-5)
    assert float((edited - z0).abs().max()) > 1e-3


def test_a_walk_that_stops_early_may_have_a_smaller_gamma():
    scheduler = BDIAScheduler(**SD, gamma=0.5, inverse=True, strength=0.2)
    scheduler.set_timesteps(30)
    assert len(scheduler.timesteps) == 6
    with pytest.raises(ValueError, match="strength = 0"):
        BDIAScheduler(strength=0.0)


OWN = {
    "timesteps": ([951.0, 700.5, 300, 20], [[], [5, 5], [1, 400], [2000, 5], [float("nan")]]),
    "sigmas": ([12.0, 4.0, 1.0, 0.2, 0.0], [[], [1.0], [1.0, 1.0], [0.1, 3.0], [float("inf"), 1.0]]),
}


@pytest.mark.parametrize("name", OWN)
def test_a_schedule_of_the_users_is_run_or_refused_by_us(name):
    made, own = make("StableDiffusionPipeline"), OWN[name][0]
    load_pipeline(made.pipe, plugins=[BDIA])
    told = []

    def look(pipe, i, t, kwargs):
        told.append((float(t), float(pipe.scheduler.sigmas[i])))
        return {}

    call(made, **{name: own}, callback_on_step_end=look)
    assert [pair[name == "sigmas"] for pair in told] == pytest.approx(own[:4])
    for bad in OWN[name][1]:
        with pytest.raises(ConfigError, match=f"bdia.*{name} = "):
            call(made, **{name: bad})
    assert call(made).isfinite().all()


def test_own_timesteps_of_ddim_are_ddims():
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[BDIA])
    wanted = call(made)
    ddim = DDIMScheduler.from_config(made.pipe.scheduler.config)
    ddim.set_timesteps(6)
    torch.testing.assert_close(call(made, timesteps=ddim.timesteps.tolist()), wanted, rtol=0, atol=1e-5)


def test_a_part_of_the_schedule_is_walked_at_its_own_levels():
    """Another plugin's edit of the schedule is followed: the same as these timesteps from the start."""

    class Tail(Plugin):
        name = "tail"
        paper = BDIA.paper
        families = ("*",)
        neutral = {}  # noqa: RUF012

        def schedule(self, call, next):
            made = next(call)
            return Schedule(made.timesteps[2:], made.sigmas[2:])

    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[Tail, BDIA])
    tail = call(made)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins=[BDIA])
    ddim = DDIMScheduler.from_config(made.pipe.scheduler.config)
    ddim.set_timesteps(6)
    torch.testing.assert_close(call(made, timesteps=ddim.timesteps.tolist()[2:]), tail, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_callback_does_to_the_latents_stays(dtype):
    """In place or as a new tensor; the step back, from a state of before the edit, does not cancel it."""

    made = make("StableDiffusionPipeline")
    made.pipe.to(dtype)
    load_pipeline(made.pipe, plugins=[BDIA])

    def end(change):
        return call(made, callback_on_step_end=change).float()

    def in_place(pipe, i, t, kwargs):
        if i == 3:
            kwargs["latents"].mul_(0.5)
        return {}

    def new(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.5} if i == 3 else {}

    def cloned(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"].clone()}

    plain = end(lambda *_: {})
    assert torch.equal(end(cloned), plain), "a clone that nobody edited is no edit"
    assert torch.equal(end(in_place), end(new))
    assert float((end(new) - plain).abs().mean()) > 0.1


def test_an_edit_begins_a_new_walk():
    scheduler = BDIAScheduler(**SD, gamma=1.0)
    scheduler.set_timesteps(10)
    z = noise(dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps[:5]):
        if i == 4:
            z[:100] = 0.25
            wanted = DDIMScheduler(**SD, clip_sample=False)
            wanted.set_timesteps(10)
            wanted = wanted.step(output(scheduler, z.double(), t).float(), t, z).prev_sample
        z = scheduler.step(output(scheduler, z.double(), t).float(), t, z).prev_sample
    torch.testing.assert_close(z[:100], wanted[:100])
    assert not torch.allclose(z[100:], wanted[100:])


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_the_round_trip_is_exact_in_another_unit_too(name):
    made = make(name)
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    load_pipeline(made.pipe, plugins=[BDIA])
    latents = call(made)
    unload(made.pipe)
    code = invert(made.pipe, BDIA(), latents, Sample(0, str(made.kwargs["prompt"])), settings(made))
    load_pipeline(made.pipe, plugins=[BDIA(start=code)])
    assert float((call(made) - latents).abs().max()) < 1e-4


def test_schedulers_that_it_is_not_valid_for_are_refused_and_the_pipeline_works_on():
    made = make("StableDiffusionPipeline")
    own = made.pipe.scheduler
    before = call(made)
    load_pipeline(made.pipe, plugins=[BDIA])
    for scheduler, part in (
        (LCMScheduler.from_config(own.config), "distilled model"),
        (DDPMScheduler.from_config(own.config), "draws noise"),
        (EulerAncestralDiscreteScheduler.from_config(own.config), "draws noise"),
        (DDIMScheduler.from_config(own.config, clip_sample=True), "clip_sample=False"),
    ):
        made.pipe.scheduler = scheduler
        with pytest.raises(Unsupported, match=part):
            call(made)
    unload(made.pipe)
    made.pipe.scheduler = own
    assert torch.equal(call(made), before)


def test_the_line_that_invert_prints_is_run(tmp_path, monkeypatch):
    """With every setting that must be the same on the way back, and a size that the pipeline would not take by itself."""
    make("StableDiffusionPipeline").pipe.save_pretrained(tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((96, 64), 60).convert("RGB").save("wide.png")
    knobs = ("-o", "bdia.strength=0.6", "-o", "bdia.gamma=0.9")
    words = ("--steps", "5", "--prompt", 'it\'s a "cat"', "--negative-prompt", "a dog")
    walk = ("invert", "bdia", "--pipeline", "sd", "--image", "wide.png", "--out", "a code.safetensors")
    told = CliRunner().invoke(app, [*walk, *knobs, *words])
    assert told.exit_code == 0, told.output
    assert "3 of 5 steps" in told.output
    line = shlex.split(told.output.strip().splitlines()[-1])
    assert line[0] == "diffgraft"
    done = CliRunner().invoke(app, line[1:])
    assert done.exit_code == 0, done.output
    assert "3 steps in" in done.output
    record = read_record(Path("out.png"))
    assert record.size == (96, 64)
    assert (record.recipe.prompt, record.recipe.negative_prompt, record.recipe.steps) == ('it\'s a "cat"', "a dog", 5)


def code_for(name, shape=None, steps=2):
    """(a tiny pipeline with its code of random latents put on, the code)."""
    made = make(name)
    given = {key: value for key, value in made.kwargs.items() if key not in ("prompt", "num_inference_steps", "output_type")}
    if shape is None:
        shape = {"WanPipeline": (1, 8, 2, 4, 4), "LTXPipeline": (1, 48, 8), "FluxPipeline": (1, 16, 16)}.get(name, (1, 4, 8, 8))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    code = invert(made.pipe, BDIA(), latents, Sample(0, str(made.kwargs["prompt"])), CallSettings(steps=steps, extra=given))
    load_pipeline(made.pipe, plugins=[BDIA(start=code)])
    return made, code


@pytest.mark.parametrize(("name", "other"), [
    ("StableDiffusionPipeline", {"height": 96}), ("FluxPipeline", {"height": 96}), ("WanPipeline", {"width": 64}),
    ("WanPipeline", {"num_frames": 9}), ("LTXPipeline", {"num_frames": 17}), ("LTXPipeline", {"height": 64}),
])  # fmt: skip
def test_another_size_than_the_codes_is_refused_before_anything_runs(name, other, monkeypatch):
    made, _ = code_for(name)
    assert call(made, num_inference_steps=2).isfinite().all()
    monkeypatch.setattr(made.pipe, "encode_prompt", None)
    with pytest.raises(ConfigError, match=rf"{next(iter(other))} = {next(iter(other.values()))}.*start has"):
        call(made, num_inference_steps=2, **other)


def test_a_code_brings_its_size():
    """The pipeline's own is 64 x 64; width is filled in where only the height is named."""
    made, code = code_for("StableDiffusionPipeline", (1, 4, 12, 8))
    for given in ({"height": None, "width": None}, {"height": 96, "width": None}):
        assert call(made, num_inference_steps=2, **given).shape[-2:] == (12, 8)
    assert code.facts["size"] is None


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_latents_beside_a_code_are_refused(name, monkeypatch):
    made, code = code_for(name)
    monkeypatch.setattr(made.pipe, "encode_prompt", None)
    with pytest.raises(ConfigError, match=r"latents were given.*start says where the run begins; leave them out"):
        call(made, num_inference_steps=2, latents=torch.zeros_like(code.tensors["noise"]))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_code_of_one_picture_gives_several_edits(name):
    """Each of them is the edit that it is alone."""
    made, _ = code_for(name)
    words = {"num_inference_steps": 2, **({"negative_prompt": None} if "negative_prompt" in made.kwargs else {})}
    texts = ["a cat", "a car"]
    both = call(made, prompt=texts, **words)
    alone = torch.cat([call(made, prompt=text, **words) for text in texts])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)
    assert float((both[0] - both[1]).abs().max()) > 1e-4
    several = call(made, prompt="a cat", num_images_per_prompt=2, **words)
    torch.testing.assert_close(several, alone[:1].expand_as(several), rtol=0, atol=1e-4)


def test_a_code_of_several_pictures_wants_as_many():
    made, code = code_for("StableDiffusionPipeline")
    words = {"num_inference_steps": 2, "negative_prompt": None}
    two = dataclasses.replace(code, tensors={k: torch.cat([v, v]) if v.ndim else v for k, v in code.tensors.items()})
    unload(made.pipe)
    load_pipeline(made.pipe, plugins=[BDIA(start=two)])
    assert len(call(made, prompt=["a", "b"], **words)) == 2
    with pytest.raises(ConfigError, match=r"a code of 2 pictures, this call makes 3 \(3 prompts, 1 of each\)"):
        call(made, prompt=["a", "b", "c"], **words)
    with pytest.raises(ConfigError, match=r"a code of 2 pictures, this call makes 1"):
        call(made, prompt="a", **words)
    unload(made.pipe)
    with pytest.raises(ConfigError, match="latents of 2 pictures"):
        invert(made.pipe, BDIA(), torch.zeros(2, 4, 8, 8), Sample(0, "x"), CallSettings(steps=2))


def test_inverting_under_a_cache_is_refused():
    """A plugin's, and one of diffusers' own; a run from a code needs none of that."""
    made = make("FluxPipeline")
    latents, given = call(made, num_inference_steps=2), settings(made)
    cache = FasterCacheConfig(spatial_attention_block_skip_range=2, tensor_format="BCHW", is_guidance_distilled=True)
    made.pipe.transformer.enable_cache(cache)
    with pytest.raises(Conflict, match=r"bdia inversion needs every block"):
        invert(made.pipe, BDIA(), latents, Sample(0, "x"), given)
    made.pipe.transformer.disable_cache()
    load_pipeline(made.pipe, plugins=["ertacache"])
    with pytest.raises(Conflict, match="must be the plain pipeline"):
        invert(made.pipe, BDIA(), latents, Sample(0, "x"), given)


def test_plugins_that_cannot_invert_say_so():
    from diffgraft import Paper

    class Other(Plugin):
        name = "other"
        paper = Paper("none", "0000.00000", "nothing")
        families = ("*",)
        neutral = {}  # noqa: RUF012

        def step(self, call, next):
            return next(call)

    made = make("StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="other cannot invert pictures"):
        invert(made.pipe, Other(), call(made), Sample(0, "x"), settings(made))


def test_a_picture_made_from_a_code_says_so_and_is_made_again(tmp_path, monkeypatch):
    """The code brings the guidance of its walk, which is what the file says; another code under the same name is noticed."""
    make("StableDiffusionPipeline").pipe.save_pretrained(tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("red.png")
    Image.new("RGB", (64, 64), "blue").save("blue.png")

    def call(*words: str, expected: int = 0) -> str:
        done = CliRunner().invoke(app, [*words])
        assert done.exit_code == expected, done.output
        return done.output

    size = ("--steps", "3", "--height", "64", "--width", "64")
    walk = ("invert", "bdia", "--pipeline", "sd", "--prompt", "a", *size, "--out", "code.safetensors")
    call(*walk, "--image", "red.png")
    call("run", "sd", "-p", "bdia", "-o", "bdia.start=code.safetensors", "--prompt", "b", *size, "--out", "a.png")
    assert read_record(Path("a.png")).recipe.guidance_scale == 1
    assert "the same, bit for bit" in call("again", "a.png")
    call(*walk, "--image", "blue.png")
    assert "code.safetensors, which is not there any more or is another file now" in call("again", "a.png", expected=2)


@pytest.mark.parametrize("kind", [BDIAScheduler, FlowBDIAScheduler])
def test_video_to_video_steps_from_the_time_that_the_pipeline_chose(kind):
    """WanVideoToVideoPipeline and AnimateDiff's cut the front of the schedule off without set_begin_index."""
    ends = []
    for says in (True, False):
        scheduler = kind()
        scheduler.set_timesteps(5)
        if says:
            scheduler.set_begin_index(2)
        x = torch.ones(1, 2, 3)
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(x.sin(), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
