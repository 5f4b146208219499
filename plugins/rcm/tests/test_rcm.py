"""rCM: its times, its sampler, the weights that are published, and what is learned by dcm."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import diffgraft_checkpoints
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Plugin, Schedule, Unsupported, load_pipeline, unload
from diffgraft.methods.adapters import adapter_layers
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.published import Weights
from diffgraft.methods.starts import start_from
from diffgraft_pipelines.tiny import make
from diffgraft_rcm import RCM, RCMScheduler
from diffgraft_rcm.fitter import DCMFitter
from diffgraft_rcm.method import clean, consistency_loss, guided, pseudo_huber, published, refined, renoised, rf_time, spread, start
from diffgraft_rcm.weights import LAYOUT, as_diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

QUALITY = (0.98765, 0.93378, 0.85290, 0.60898)
FIRST = (0.98765, 0.78271, 0.60898, 0.40622)
SIZES = {"d": 24, "c": 8, "o": 8, "x": 32, "f": 32, "h": 48, "i": 3}
"""Of the tiny Wan."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(name: str = "WanPipeline") -> tuple[Any, dict[str, Any]]:
    """A plain tiny pipeline and the arguments of its call, which say nothing of guidance."""
    made = make(name)
    pipe: Any = unload(load_pipeline(made.pipe))
    pipe.set_progress_bar_config(disable=True)
    silent = {"guidance_scale", "guidance_scale_2", "true_cfg_scale", "num_inference_steps"}
    return pipe, {key: value for key, value in made.kwargs.items() if key not in silent}


def run(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    return pipe(**{**call, "output_type": "latent", "generator": seeded(), **more})[0]  # type: ignore[no-any-return]


def seen(pipe: Any) -> list[tuple[torch.Tensor, float, torch.Tensor]]:
    """(input, time, output) of each denoiser call that follows, the input as the denoiser's first layer gets it where that is a layer's."""
    kept: list[Any] = []
    first: list[Any] = [None]
    if hasattr(pipe.transformer, "patch_embedding"):
        pipe.transformer.patch_embedding.register_forward_pre_hook(lambda module, args: first.__setitem__(0, args[0].clone()))

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        kept.append((first[0], float(kwargs["timestep"].flatten()[0]), out[0].clone()))

    pipe.transformer.register_forward_hook(hook, with_kwargs=True)
    return kept


# times and formulas ------------------------------------------------------------------------------------------------------------------


def test_the_published_tables() -> None:
    assert published("quality") == pytest.approx(QUALITY, abs=1e-5)
    assert published("first") == pytest.approx(FIRST, abs=1e-5)
    assert [rf_time(math.atan(r)) for r in (1.0, 80.0)] == pytest.approx([0.5, 80 / 81])  # t = tan / (1 + tan)
    scheduler = RCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in QUALITY], abs=1e-2)
    assert scheduler.sigmas[-1] == 0
    for steps in (1, 2, 3):
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas.tolist() == pytest.approx([*QUALITY[:steps], 0], abs=1e-5)
    assert spread(4) == pytest.approx((0.98765, 0.92593, 0.82305, 0.61728), abs=1e-5)
    assert len(spread(50)) == 50


@pytest.mark.parametrize("table", ["quality", "first"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_is_the_walk_in_trigflow(table: str, steps: int) -> None:
    """The paper's own coordinates: x = cos x0 + sin n; the flow model is wrapped as the official wrapper does it."""
    taus = [math.atan(80.0), *({"quality": (1.5, 1.4, 1.0), "first": (1.3, 1.0, 0.6)}[table])][:steps]

    def model(x: torch.Tensor, t: float) -> torch.Tensor:
        return (3 * x).sin() + t * x.roll(1, -1)

    noise = torch.randn(2, 4, 6, dtype=torch.float64, generator=seeded())
    draws = seeded(1)
    x = noise * math.sin(taus[0])  # a sample of the path whose x0 is 0
    for tau, after in zip(taus, [*taus[1:], 0.0], strict=True):
        scale = math.cos(tau) + math.sin(tau)
        v = model(x / scale, math.sin(tau) / scale)
        x0 = x / scale - math.sin(tau) / scale * v
        x = math.cos(after) * x0 + math.sin(after) * torch.randn(x.shape, generator=draws).double() if after else x0
    scheduler = RCMScheduler(times=table)
    scheduler.set_timesteps(steps)
    y, again = scheduler.first(noise), seeded(1)
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(model(y, scheduler.levels[i]), t, y, generator=again).prev_sample
    assert torch.allclose(y, x, atol=1e-12)


@pytest.mark.parametrize("times", ["quality", "first", "spread", (1.0, 0.9, 0.3, 0.01)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_perfect_model_gives_x0_for_any_number_of_steps(times: Any, steps: int) -> None:
    scheduler = RCMScheduler(times=times)
    scheduler.set_timesteps(steps)
    x0 = torch.randn(2, 3, 5, generator=seeded())
    x = scheduler.first(torch.randn(2, 3, 5, generator=seeded(1)))
    for t in scheduler.timesteps:
        x = scheduler.step((x - x0) / (t / 1000), t, x, generator=seeded(2)).prev_sample
    assert torch.allclose(x, x0, atol=1e-5)


@pytest.mark.parametrize("table", ["quality", "first"])
def test_it_is_diffusers_stochastic_sampling_from_latents_of_the_first_level(table: str) -> None:
    ours, theirs = RCMScheduler(times=table), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    ours.set_timesteps(4)
    theirs.set_timesteps(sigmas=list(published(table)))
    assert torch.allclose(ours.timesteps, theirs.timesteps)
    noise = torch.randn(2, 4, 6, generator=seeded())
    x, y = ours.first(noise), published(table)[0] * noise
    one, other = seeded(1), seeded(1)
    for t in ours.timesteps:
        v = (5 * x).cos()
        x = ours.step(v, t, x, generator=one).prev_sample
        y = theirs.step(v, t, y, generator=other).prev_sample
        assert torch.allclose(x, y, atol=1e-6)


def test_a_step_is_a_jump_and_fresh_noise_in_float64() -> None:
    scheduler = RCMScheduler()
    x, v = torch.randn(2, 3, dtype=torch.float64).bfloat16(), torch.randn(2, 3).bfloat16()
    scheduler.set_timesteps(1)
    [t] = scheduler.timesteps
    end, x0 = scheduler.step(v, t, x, return_dict=False)
    assert torch.equal(end, (x.double() - 80 / 81 * v.double()).bfloat16())  # N = 1: x - t v
    assert torch.equal(x0, end)
    scheduler.set_timesteps(2)
    first = scheduler.step(v, t, x, generator=seeded()).prev_sample
    exact = renoised(clean(x.double(), v.double(), published("quality")[0]), torch.randn(2, 3, generator=seeded()), rf_time(1.5))
    assert torch.equal(first, exact.bfloat16())
    end = scheduler.step(torch.zeros_like(v), t, first).prev_sample  # the state is not the rounded one
    assert torch.equal(end, exact.bfloat16())
    moved = first + 1
    assert torch.equal(RCMScheduler.first(scheduler, moved), start(moved, scheduler.levels[0]))


# the plugin ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WanPipeline", "WanPipeline@2.2", "StableDiffusion3Pipeline", "FluxPipeline", "LTXPipeline"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_asks_once_a_step_at_the_tables_times(name: str, steps: int) -> None:
    pipe, call = tiny(name)
    plain = run(pipe, call, num_inference_steps=steps)
    load_pipeline(pipe, plugins=[RCM()])
    calls = seen(pipe) if "@" not in name else []
    out = run(pipe, call, num_inference_steps=steps)
    report = pipe.plugins.report()
    assert sum(report.forwards.values()) == steps
    assert not torch.equal(out, plain)
    if calls:
        scale = 1 if name == "FluxPipeline" else 1000
        assert [t / scale for _, t, _ in calls] == pytest.approx(QUALITY[:steps], abs=1e-5)
    if calls and steps == 1 and name == "WanPipeline":
        x, _, v = calls[0]
        assert torch.allclose(out, x - 80 / 81 * v, atol=1e-6)  # N = 1 gives x - t v
        noise = torch.randn(x.shape, generator=seeded())
        assert torch.allclose(x, 80 / 81 * noise)


def test_a_call_that_says_nothing_has_four_steps_without_guidance() -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[RCM()])
    run(pipe, call)
    assert dict(pipe.plugins.report().forwards) == {"cond": 4}
    run(pipe, call, guidance_scale=1.0)
    assert dict(pipe.plugins.report().forwards) == {"cond": 4}
    pipe.plugins.configure("rcm", times=(0.9, 0.5))
    run(pipe, call)
    assert sum(pipe.plugins.report().forwards.values()) == 2
    pipe.plugins.configure("rcm", times="spread", guided=True)
    run(pipe, call, num_inference_steps=10, guidance_scale=3.0)
    assert sum(pipe.plugins.report().forwards.values()) == 20


def test_a_bundled_checkpoints_own_guidance_is_not_the_users() -> None:
    pipe = load_pipeline("emoji-wan", plugins=[RCM()])
    pipe.set_progress_bar_config(disable=True)
    run(pipe, {"prompt": "a small owl moves up on a red background"}, num_inference_steps=1)
    assert dict(pipe.plugins.report().forwards) == {"cond": 1}
    with pytest.raises(ConfigError, match="guidance_scale = 2"):
        run(pipe, {"prompt": "a small owl moves up on a red background"}, num_inference_steps=1, guidance_scale=2.0)


def test_the_noise_is_the_calls_and_each_samples_own() -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[RCM()])
    prompt = call.pop("prompt")
    both = run(pipe, call, prompt=[prompt] * 2, generator=[seeded(0), seeded(1)])
    alone = run(pipe, call, prompt=prompt, generator=seeded(1))
    assert torch.allclose(both[1:], alone, atol=1e-5)
    torch.manual_seed(1)
    one = run(pipe, call, prompt=prompt)
    torch.manual_seed(2)
    assert torch.equal(one, run(pipe, call, prompt=prompt))


# where a run begins ------------------------------------------------------------------------------------------------------------------


def walk(calls: list[tuple[torch.Tensor, float, torch.Tensor]], times: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    """The end of a run, by hand: from its first input and what the denoiser said, with ``generator`` where it was at the first call."""
    x = calls[0][0].double()
    for (_, told, v), t, after in zip(calls, times, [*times[1:], 0.0], strict=True):
        assert told == pytest.approx(1000 * t, abs=1e-3)
        x = x - t * v.double()
        x = (1 - after) * x + after * torch.randn(x.shape, generator=generator).double() if after else x
    return x


@pytest.mark.parametrize(("times", "steps", "left"), [("first", 2, 1), ("quality", 4, 3), ("spread", 6, 4)])
def test_video_to_video_steps_from_the_time_that_the_pipeline_chose(times: str, steps: int, left: int) -> None:
    """WanVideoToVideoPipeline cuts the front of the schedule off without set_begin_index."""
    pipe, call = tiny("WanVideoToVideoPipeline")
    load_pipeline(pipe, plugins=[RCM(times=times)])
    calls, at = seen(pipe), seeded()
    generator, states = seeded(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: states.append(generator.get_state()))
    out = run(pipe, call, num_inference_steps=steps, generator=generator)
    at.set_state(states[0])
    assert len(calls) == left
    assert torch.allclose(out, walk(calls, RCM(times=times).times(steps)[-left:], at).float(), atol=1e-6)


@pytest.mark.parametrize("stages", [1, 2])
def test_from_noise_it_is_the_walk_written_anew(stages: int) -> None:
    pipe, call = tiny("WanPipeline@2.2" if stages == 2 else "WanPipeline")
    load_pipeline(pipe, plugins=[RCM()])
    calls = seen(pipe)
    if stages == 2:
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
        more = seen(pipe)
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    out = run(pipe, call)
    calls += more if stages == 2 else []
    at = seeded()
    noise = torch.randn(calls[0][0].shape, generator=at)
    assert torch.allclose(calls[0][0], 80 / 81 * noise)
    assert len(calls) == 4
    assert torch.allclose(out, walk(calls, published("quality"), at).float(), atol=1e-6)


class Cut(Plugin):
    """Writes another schedule: every time a fifth smaller."""

    name = "cut"
    paper = RCM.paper
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def schedule(self, call: Any, next: Any) -> Schedule:
        own = next(call)
        return Schedule(0.8 * own.timesteps, 0.8 * own.sigmas)


@pytest.mark.parametrize("inner", [False, True])
def test_a_schedule_that_another_plugin_writes_is_followed(inner: bool) -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[RCM(), Cut()] if inner else [Cut(), RCM()])
    calls, at = seen(pipe), seeded()
    out = run(pipe, call)
    noise = torch.randn(calls[0][0].shape, generator=at)
    times = tuple(0.8 * t for t in published("quality"))
    assert torch.allclose(calls[0][0], times[0] * noise)
    assert torch.allclose(out, walk(calls, times, at).float(), atol=1e-6)


class Start(Plugin):
    """Puts a start of its own in, at the first level."""

    name = "start"
    paper = RCM.paper
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def denoise(self, call: Any, next: Any) -> torch.Tensor:
        return next(call.with_latents(start_from(call, torch.full_like(call.latents, 2.0))) if call.step.call == 0 else call)  # type: ignore[no-any-return]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_start_that_another_plugin_made_is_not_scaled_again(guidance: float) -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[Start(), RCM(times=(0.5, 0.2), guided=True)])
    calls, at = seen(pipe), seeded()
    run(pipe, call, guidance_scale=guidance)
    noise = torch.randn(calls[0][0].shape, generator=at)
    for x, _, _ in calls[: 1 + (guidance > 1)]:
        assert torch.allclose(x, 0.5 * 2 + 0.5 * noise, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_begins_at_its_first_time_from_noise_and_from_the_picture(strength: float) -> None:
    """StableDiffusion3InpaintPipeline at strength 1 begins with unit noise, and in two steps at 0.6 with the noised picture."""

    def first(t: float) -> torch.Tensor:
        pipe, call = tiny("StableDiffusion3InpaintPipeline")
        load_pipeline(pipe, plugins=[RCM(times=(t, 0.1))])
        kept: list[torch.Tensor] = []
        pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: kept.append(args[0].clone()))
        run(pipe, call, strength=strength, num_inference_steps=2)
        return kept[0]

    noise, half = first(1.0), first(0.5)
    picture = 0.0 if strength == 1 else 2 * half - noise
    assert torch.allclose(first(0.2), 0.8 * picture + 0.2 * noise, atol=1e-6)
    assert torch.allclose(half, 0.5 * picture + 0.5 * noise, atol=1e-6)


class Twice(Plugin):
    """Runs the pipeline two times and gives the second."""

    name = "twice"
    paper = RCM.paper
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def run(self, call: Any, next: Any) -> Any:
        next(call)
        return next(call)


def test_each_pass_of_a_run_begins_with_its_own_noise() -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[RCM(), Twice()])
    calls = seen(pipe)
    inner = run(pipe, call)
    assert not torch.allclose(calls[0][0], calls[4][0])  # the generator has gone on
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[Twice(), RCM()])
    assert torch.equal(run(pipe, call), inner)


BAD_CALLS = [
    ({"guidance_scale": 5.0}, "guidance_scale = 5: .*leave guidance_scale out.*guided=True"),
    ({"num_inference_steps": 5}, "5 steps, but times = 'quality' has 4: .*'spread'"),
    ({"num_inference_steps": 50}, "50 steps"),
    ({"sigmas": [1.0, 0.5]}, "says sigmas itself"),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS)
def test_a_call_that_is_none_for_it_is_refused_before_the_denoiser(call: dict[str, Any], words: str) -> None:
    pipe, usual = tiny("StableDiffusion3Pipeline")
    calls = seen(pipe)
    load_pipeline(pipe, plugins=[RCM()])
    with pytest.raises(ConfigError, match=words):
        run(pipe, usual, **call)
    assert not calls


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"times": (0.5, 0.6)}, "smaller than the one before"),
        ({"times": (0.5, 0.5)}, "smaller than the one before"),
        ({"times": (1.5, 0.5)}, "at most 1"),
        ({"times": (0.9, 0.0)}, "above 0"),
        ({"times": (float("nan"),)}, "finite"),
        ({"times": ()}, "at least one"),
        ({"times": (True,)}, "True is no number"),
        ({"times": ("0.9",)}, "'0.9' is no number"),
        ({"times": (0.9, 0.5), "sigma_max": 200.0}, "sigma_max = 200: .*leave it out"),
        ({"times": "best"}, "times"),
        ({"sigma_max": 2.0}, "smaller than the one before"),
        ({"strength": -1.0}, "strength"),
        ({"weights": "rcm.pt", "lora": "dcm.safetensors"}, "weights and lora: .*give one"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RCM(**knobs)


def test_a_pipeline_with_times_of_its_tokens_is_refused() -> None:
    pipe, _ = tiny()
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(Unsupported, match="expand_timesteps"):
        load_pipeline(pipe, plugins=[RCM()])


# the published weights -----------------------------------------------------------------------------------------------------------------


def published_file(path: Path, prefix: str = "net.") -> dict[str, torch.Tensor]:
    """A file as they are published: a pickle, perhaps with a prefix, patches embedded by a linear layer."""
    state = LAYOUT.synthetic(SIZES)
    flat = {**state, "patch_embedding.weight": state["patch_embedding.weight"].flatten(1)}
    torch.save({prefix + key: value for key, value in flat.items()}, path)
    return state


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_published_file_takes_the_place_of_the_weights_and_goes_without_trace(tmp_path: Path, prefix: str) -> None:
    state = published_file(tmp_path / "rcm.pt", prefix)
    pipe, call = tiny()
    before, own = run(pipe, call, num_inference_steps=2), dict(pipe.transformer.named_parameters())
    load_pipeline(pipe, plugins=[RCM(weights=tmp_path / "rcm.pt")])
    now = dict(pipe.transformer.named_parameters())
    theirs = convert_wan_transformer_to_diffusers({key: value.clone() for key, value in state.items()})
    assert now.keys() == theirs.keys() == own.keys()
    assert all(torch.equal(now[name], theirs[name]) for name in theirs)  # diffusers' own converter
    out = run(pipe, call)
    assert pipe.plugins.report().forwards["cond"] == 4
    pipe.plugins.clear()
    after = dict(pipe.transformer.named_parameters())
    assert all(after[name] is own[name] for name in own)
    assert torch.equal(run(pipe, call, num_inference_steps=2), before)
    pipe.transformer.load_state_dict(theirs)
    load_pipeline(pipe, plugins=[RCM()])
    assert torch.equal(run(pipe, call), out)


def test_without_times_it_is_off_whatever_it_was_given(learned: Path) -> None:
    pipe, call = tiny()
    call["guidance_scale"] = 3.0
    before = run(pipe, call, num_inference_steps=3)
    load_pipeline(pipe, plugins=[RCM(times=None, lora=learned)])
    assert torch.equal(run(pipe, call, num_inference_steps=3), before)
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[RCM(times=None, weights=Weights(LAYOUT.synthetic(SIZES)))])
    assert torch.equal(run(pipe, call, num_inference_steps=3), before)
    assert "inactive" in str(pipe.plugins.report())
    pipe.plugins.configure("rcm", times="quality")
    del call["guidance_scale"]
    on = run(pipe, call, num_inference_steps=3)
    pipe.plugins.configure("rcm", times=None)
    assert not torch.equal(run(pipe, call, num_inference_steps=3, guidance_scale=3.0), on)
    assert torch.equal(run(pipe, call, num_inference_steps=3, guidance_scale=3.0), before)


def test_the_layout_is_that_of_wan_1_3b() -> None:
    sizes = {"d": 1536, "c": 16, "o": 16, "x": 4096, "f": 256, "h": 8960, "i": 30}
    with torch.device("meta"):
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    counted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    names = as_diffusers({key: torch.empty(0) for key in LAYOUT.synthetic(SIZES | {"i": 30})})
    assert names.keys() == counted.keys()
    assert counted["patch_embedding.weight"] == (sizes["d"], 16, 1, 2, 2)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = published_file(tmp_path / "rcm.pt")
    pipe, _ = tiny()
    with pytest.raises(Unsupported, match=r"of another Wan .*patch_embedding.weight is"):
        load_pipeline(pipe, plugins=[RCM(weights=Weights(LAYOUT.synthetic(SIZES | {"d": 48})))])
    with pytest.raises(Unsupported, match=r"blocks.2.*is missing"):
        load_pipeline(pipe, plugins=[RCM(weights=Weights(LAYOUT.synthetic(SIZES | {"i": 2})))])
    del state["head.modulation"]
    with pytest.raises(ArtefactMismatch, match=r"head.modulation"):
        load_pipeline(pipe, plugins=[RCM(weights=Weights(state))])
    for name in ("WanPipeline@2.2", "StableDiffusion3Pipeline"):
        with pytest.raises(Unsupported, match=r"one transformer of Wan 2.1"):
            load_pipeline(tiny(name)[0], plugins=[RCM(weights=tmp_path / "rcm.pt")])


# what is learned -----------------------------------------------------------------------------------------------------------------------


def test_the_loss_asks_each_point_for_the_next_ones_answer() -> None:
    x0 = torch.randn(3, 2, 4, generator=seeded(), requires_grad=True)
    end = torch.randn(2, 4, generator=seeded(1))
    loss = consistency_loss(x0, end, 0.1)
    wanted = [pseudo_huber(x0[0] - x0[1], 0.1), pseudo_huber(x0[1] - x0[2], 0.1), pseudo_huber(x0[2] - end, 0.1)]
    assert torch.allclose(loss, torch.stack(wanted).mean(0))
    (slope,) = torch.autograd.grad(loss.sum(), x0)
    d = (x0 - torch.cat([x0[1:], end[None]])).detach()
    assert torch.allclose(slope, d / (d.square() + 0.01).sqrt() / 12, atol=1e-7)  # nothing flows into the target
    assert consistency_loss(end.expand(3, 2, 4), end, 0.1).abs().max() == 0  # a model that is consistent already
    assert guided(torch.tensor(3.0), torch.tensor(1.0), 2.0) == 5
    assert guided(torch.tensor(3.0), None, 2.0) == 3


def test_the_way_is_cut_into_even_parts() -> None:
    assert refined((1.0, 0.6, 0.0), 1.0) == [[1.0, 0.6], [0.6, 0.0]]
    [first, second] = refined((1.0, 0.6, 0.0), 0.2)
    assert first == pytest.approx([1.0, 0.8, 0.6])
    assert second == pytest.approx([0.6, 0.4, 0.2, 0.0])


def fitted(path: Path, plugin: RCM, **knobs: Any) -> tuple[float, list[tuple[torch.Tensor, float, torch.Tensor]], Any]:
    """(loss of a fit's first step, its denoiser calls, the pipeline)."""
    pipe, call = tiny()
    calls = seen(pipe)
    extra = {key: call[key] for key in ("num_frames", "max_sequence_length")}
    settings = CallSettings(guidance_scale=3.0, height=call["height"], width=call["width"], extra=extra)
    found = fit(pipe, plugin, [Example("an owl")], settings, path, FitPlan(1, 2), knobs={"rank": 2, **knobs})
    return found.facts["fit"]["losses"][0], calls, pipe


@pytest.mark.parametrize(
    ("times", "path"), [("quality", published("quality")), ((0.9, 0.5), (0.9, 0.5)), ((0.9, 0.8, 0.6, 0.5, 0.3), (0.9, 0.8, 0.6, 0.5, 0.3))]
)
def test_a_fit_learns_all_times_of_a_run_by_the_formula(tmp_path: Path, times: Any, path: tuple[float, ...]) -> None:
    """The first step's loss, before anything is learned, from the first input alone and the plain pipeline's own denoiser."""
    loss, calls, pipe = fitted(tmp_path / "dcm.safetensors", RCM(times=times), teacher_step=0.3)
    x = next(x for x, t, _ in calls if len(x) == 4 and abs(t - 1000 * path[0]) < 1e-2)[:2].double()  # the first guided call of the walk
    texts = pipe.encode_prompt(["an owl"] * 2, None, True, 1, max_sequence_length=32)

    def v(x: torch.Tensor, t: float, text: torch.Tensor) -> torch.Tensor:
        told = torch.full((2,), 1000 * t)
        with torch.no_grad():
            return pipe.transformer(x.float(), timestep=told, encoder_hidden_states=text, return_dict=False)[0].double()  # type: ignore[no-any-return]

    answers = []
    for t, after in zip(path, [*path[1:], 0.0], strict=True):
        answers.append(x - t * v(x, t, texts[0]))
        parts = math.ceil((t - after) / 0.3)
        for k in range(parts):
            now = t + (after - t) * k / parts
            cond, uncond = (v(x, now, text) for text in texts)
            x = x + (after - t) / parts * (uncond + 3 * (cond - uncond))
    answers.append(x)
    wanted = [float(((a - b).square() + 0.03**2).sqrt().mean() - 0.03) for a, b in pairwise(answers)]
    assert loss == pytest.approx(sum(wanted) / len(wanted), rel=2e-5)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, call = tiny()
    path = tmp_path_factory.mktemp("fit") / "dcm.safetensors"
    extra = {key: call[key] for key in ("num_frames", "max_sequence_length") if key in call}
    settings = CallSettings(guidance_scale=3.0, height=call["height"], width=call["width"], extra=extra)
    before = [value.clone() for value in pipe.transformer.parameters()]
    found = fit(pipe, RCM(), [Example("an owl"), Example("a fox")], settings, path, FitPlan(2, 2), knobs={"rank": 2, "rate": 1e-2})
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.transformer.parameters(), strict=True))
    assert len(found.facts["fit"]["losses"]) == 2
    return path


def test_what_is_learned_is_a_lora_that_diffusers_loads_too(learned: Path) -> None:
    pipe, call = tiny()
    load_pipeline(pipe, plugins=[RCM()])
    plain = run(pipe, call)
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[RCM(lora=learned)])
    ours = run(pipe, call)
    pipe.plugins.configure("rcm", strength=0.0)
    assert torch.allclose(run(pipe, call), plain, atol=1e-5)
    pipe.plugins.clear()
    assert not adapter_layers(pipe.transformer)
    pipe.load_lora_weights(learned.parent, weight_name=learned.name)
    load_pipeline(pipe, plugins=[RCM()])
    theirs = run(pipe, call)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-4)
    pipe.plugins.clear()
    with pytest.raises(Unsupported, match="a LoRA lies on the transformer"):
        load_pipeline(pipe, plugins=[RCM(weights=Weights(LAYOUT.synthetic(SIZES)))])
    pipe.fuse_lora()
    with pytest.raises(Unsupported, match="fused"):
        load_pipeline(pipe, plugins=[RCM(lora=learned)])


def test_the_users_own_lora_acts_beside_it(learned: Path) -> None:
    pipe, call = tiny()
    pipe.load_lora_weights(learned.parent, weight_name=learned.name, adapter_name="mine")
    load_pipeline(pipe, plugins=[RCM()])
    mine = run(pipe, call)
    pipe.plugins.clear()
    load_pipeline(pipe, plugins=[RCM(lora=learned, strength=0.0)])
    assert torch.allclose(run(pipe, call), mine, atol=1e-5)
    pipe.disable_lora()
    off = run(pipe, call)
    pipe.enable_lora()
    assert not torch.allclose(off, mine, atol=1e-4)


def test_a_lora_of_another_model_is_refused() -> None:
    lora = Path(diffgraft_checkpoints.__file__).parent / "bundled" / "emoji-sd-lcm" / "pytorch_lora_weights.safetensors"
    with pytest.raises(ArtefactMismatch, match="LoRA"):
        load_pipeline(tiny()[0], plugins=[RCM(lora=str(lora))])


def test_it_is_called_dcm_and_not_rcm() -> None:
    assert DCMFitter.__name__ == "DCMFitter"
    assert "Jacobian-vector" in RCM.paper.omitted
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "not the paper's own training" in readme
