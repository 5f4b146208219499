"""Phased DMD: the score identity of a subinterval, runs against diffusers' own loops, the source of a phase, refusals."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import (
    ArtefactMismatch,
    ConfigError,
    Conflict,
    DiffgraftError,
    Effects,
    Need,
    Paper,
    Plugin,
    Schedule,
    Unsupported,
    load_pipeline,
)
from diffgraft.installed import registry
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.matching import MatchingFitter, matching_gradient
from diffgraft_phased_dmd import PHASES, PhasedDmd, method
from diffgraft_phased_dmd.fitting import PhasedFitter
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

pytest.importorskip("peft")
FAMILIES = {"FluxPipeline": "flux", "QwenImagePipeline": "qwen_image", "WanPipeline": "wan", "WanPipeline@2.2": "wan"}
SCALE = {"flux": "true_cfg_scale", "qwen_image": "true_cfg_scale", "wan": "guidance_scale"}
EXAMPLES = [Example(text) for text in ("an apple", "a star", "a boat")]


def tiny(name: str = "FluxPipeline") -> Any:
    """A tiny pipeline and its call arguments, without guidance and a number of steps; latents come out."""
    family = next(f for f in registry.families().values() if name.split("@")[0] in f.pipelines)
    module, function = family.tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name, 0)
    left_out = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "negative_prompt")
    made.kwargs = {key: value for key, value in made.kwargs.items() if key not in left_out} | {"output_type": "latent"}
    made.pipe.set_progress_bar_config(disable=True)
    return made


def lora(name: str, folder: Any, seed: int, scale: float = 0.3) -> Any:
    """A LoRA file of random weights for the (each) denoiser; ``scale`` 0: of zeros where it counts."""
    import peft
    from peft.utils import get_peft_model_state_dict

    pipe, files = tiny(name).pipe, {}
    for attribute in ("transformer", "transformer_2"):
        if (model := getattr(pipe, attribute, None)) is None:
            continue
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
        generator = torch.Generator().manual_seed(seed + len(files))
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(scale * torch.randn(value.shape, generator=generator) if scale or "lora_A" in key else torch.zeros(()))
        files[attribute] = folder / f"{name}-{attribute}-{seed}.safetensors"
        type(pipe).save_lora_weights(
            folder, **{"transformer_lora_layers": get_peft_model_state_dict(model)}, weight_name=files[attribute].name
        )
    return files if len(files) > 1 else files["transformer"]


def latents(pipe: Any, made: Any, seed: int = 0, **kwargs: Any) -> Tensor:
    return pipe(**{**made.kwargs, **kwargs, "generator": torch.Generator().manual_seed(seed)})[0]


def with_euler(made: Any, **config: Any) -> Any:
    """The tiny pipeline with the scheduler that the experts are for."""
    old = made.pipe.scheduler.config
    shift = {"shift": old["flow_shift"]} if "flow_shift" in old else {}
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(old, **{**shift, **config})
    return made


# the formulas ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.3, 0.75])
def test_noise_on_x_s_gives_the_flow_s_own_marginal(s):
    t = torch.linspace(s + 0.01, 1, 50, dtype=torch.float64)
    a, b = method.between(t, s)
    assert torch.allclose(a * (1 - s), 1 - t)
    assert torch.allclose(b.square() + (a * s).square(), t.square())
    if s == 0:
        assert torch.allclose(b, t)


@pytest.mark.parametrize("t", [0.8, 0.9, 0.99])
def test_monte_carlo_score_of_a_gaussian(t):
    """x_0 ~ N(m, c^2): what -eps / b, and v*, are on average at x_t is linear in x_t, and the closed form of the score and the velocity."""
    m, c, s, n = 0.7, 0.5, 0.75, 2_000_000
    generator = torch.Generator().manual_seed(0)
    x0, e, eps = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    x0 = m + c * x0
    x_s, level = (1 - s) * x0 + s * e, torch.tensor(t, dtype=torch.float64)
    a, b = method.between(level, s)
    x_t = a * x_s + b * eps
    var = ((1 - t) * c) ** 2 + t * t
    middle = x_t - x_t.mean()

    def regressed(y: Tensor) -> tuple[float, float]:
        slope = float((middle * (y - y.mean())).mean() / middle.square().mean())
        return slope, float(y.mean() - slope * x_t.mean())

    near = pytest.approx([-1 / var, (1 - t) * m / var], abs=0.01)
    assert list(regressed(-eps / b)) == near
    velocity = method.velocity_target(x_s, eps, level, s)
    slope, offset = regressed(velocity)
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    true = -(points - (1 - t) * m) / var
    assert torch.allclose(method.score(points, slope * points + offset, level), true, atol=0.03)
    assert torch.allclose(velocity, -(x_t - t * eps / b) / (1 - t), atol=1e-6)  # the card's form of it
    if t == 0.8:
        biased = regressed(eps - x_s)  # the target of clean data does not do for x_s
        assert abs(float(method.score(points, biased[0] * points + biased[1], level)[0] - true[0])) > 0.03


def test_monte_carlo_score_of_points():
    """x_0 in {-1, 0, 1, 2} (the paper's toy): means of v* in narrow bins of x_t against the mixture's own velocity."""
    t, s, n = 0.85, 0.5, 1_000_000
    generator = torch.Generator().manual_seed(1)
    places = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    x0 = places[torch.randint(4, (n,), generator=generator)]
    e, eps = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    x_s, level = (1 - s) * x0 + s * e, torch.tensor(t, dtype=torch.float64)
    a, b = method.between(level, s)
    x_t, target = a * x_s + b * eps, method.velocity_target(x_s, eps, level, s)
    for point in (-0.5, 0.2, 0.9):
        inside = (x_t - point).abs() < 0.05
        share = torch.softmax(-((point - (1 - t) * places) ** 2) / (2 * t * t), 0)
        clean = float((share * places).sum())
        assert float(target[inside].mean()) == pytest.approx((point - clean) / t, abs=0.03)


def test_the_last_phase_is_plain_dmd():
    x0, eps, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    t = torch.tensor([0.1, 0.5, 0.98]).view(3, 1, 1)
    x_t = (1 - t) * x0 + t * eps
    assert torch.allclose(method.velocity_target(x0, eps, t, 0.0), eps - x0, atol=1e-6)
    assert torch.allclose(method.phase_estimate(x_t, v, t, 0.0), x_t - t * v, atol=1e-4)
    assert torch.equal(method.weight(t, 0.0, 10), torch.ones_like(t))
    assert torch.isfinite(method.velocity_target(x0, eps, torch.ones(3, 1, 1), 0.75)).all()


def test_the_estimate_of_a_phase_is_tweedies():
    """E[x_s | x_t] of Gaussian data by the exact velocity is the regression of x_s on x_t."""
    m, c, s, t = 0.7, 0.5, 0.6, 0.9
    level, x = torch.tensor(t, dtype=torch.float64), torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    a, _ = method.between(level, s)
    var_s, var = ((1 - s) * c) ** 2 + s * s, ((1 - t) * c) ** 2 + t * t
    v = (x - (m + (1 - t) * c * c / var * (x - (1 - t) * m))) / t
    expected = (1 - s) * m + a * var_s / var * (x - (1 - t) * m)
    assert torch.allclose(method.phase_estimate(x, v, level, s), expected)


def test_the_weight_is_clamped_where_t_comes_near_s():
    t, s = torch.tensor([0.7501, 0.76, 0.99]), 0.75
    _, b = method.between(t, s)
    assert torch.allclose(method.weight(t, s, 10), (1 / b.square()).clamp(max=10) * b.square())
    assert float(method.weight(t, s, 10)[-1]) == 1
    square = method.weight(t, s, 10) * method.velocity_target(torch.zeros(3), torch.ones(3), t, s).square()
    assert bool((square <= 10.01 * (t + (1 - t) * 9).square()).all())  # without it 1 / b^2 times as much: 6,000 at the first


@pytest.mark.parametrize("level", [1.0, 0.9, 0.875, 0.75, 0.7496, 0.74, 0.5])
def test_a_step_from_a_boundary_belongs_to_the_next_phase(level):
    assert method.phase_of(level, (0.75,)) == (0 if level > 0.7505 else 1)
    assert method.phase_of(level, ()) == 0
    assert method.phase_of(level, (0.9, 0.75, 0.5)) == {1.0: 0, 0.9: 1, 0.875: 1, 0.75: 2, 0.7496: 2, 0.74: 2, 0.5: 3}[level]


# tables ---------------------------------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_published_models(tmp_path):
    """Wan2.2-Lightning: 1, .75, .5, .25 with shift 5. Qwen-Image-Lightning: base_shift = max_shift = ln 3, exponential."""
    import math

    qwen = FlowMatchEulerDiscreteScheduler(
        base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None, time_shift_type="exponential", use_dynamic_shifting=True
    )
    wan = FlowMatchEulerDiscreteScheduler(shift=5.0)
    for name, published, scheduler in (("WanPipeline", "wan2.2-lightning", wan), ("QwenImagePipeline", "qwen-image-lightning", qwen)):
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=math.log(3))
        made = tiny(name)
        pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": lora(name, tmp_path, 1), "shift": published}})
        times: list[float] = []
        latents(pipe, made, callback_on_step_end=lambda p, i, t, k, times=times: (times.append(float(t)), k)[1])
        assert times == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
        pipe.plugins.clear()


def test_an_own_table_is_what_the_steps_begin_at(tmp_path):
    made = with_euler(tiny())
    sigmas = (1.0, 0.8, 0.3)
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": lora("FluxPipeline", tmp_path, 1), "sigmas": sigmas}})
    ours = latents(pipe, made)
    assert pipe.plugins.report().steps == 3
    pipe.plugins.clear()
    plain = with_euler(tiny(), use_dynamic_shifting=False, shift=1.0)
    plain.pipe.load_lora_weights(lora("FluxPipeline", tmp_path, 1))
    assert torch.allclose(ours, latents(plain.pipe, plain, num_inference_steps=3, sigmas=list(sigmas)), atol=1e-6)


def timesteps(pipe: Any, made: Any, **kwargs: Any) -> list[float]:
    found: list[float] = []
    latents(pipe, made, callback_on_step_end=lambda p, i, t, k: (found.append(float(t)), k)[1], **kwargs)
    return found


def with_unipc(made: Any) -> Any:
    made.pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return made


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline", "WanPipeline@2.2"])
def test_the_pipelines_own_table_is_that_of_its_own_scheduler(name, tmp_path):
    """UniPC, as Wan is published with: a run, a fit and the plain pipeline step through the same levels."""
    made = with_unipc(tiny(name))
    plain = timesteps(made.pipe, made, num_inference_steps=4, **{SCALE[FAMILIES[name]]: 1.0})
    assert plain == [999, 900, 750, 500]
    knobs = {"phase_1": lora(name, tmp_path, 1), "boundaries": ()}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    assert timesteps(pipe, made) == pytest.approx(plain, abs=1e-3)
    pipe.plugins.clear()
    assert timesteps(made.pipe, made, num_inference_steps=4, **{SCALE[FAMILIES[name]]: 1.0}) == plain
    if "@" not in name:
        found = fit(
            with_unipc(tiny(name)).pipe, PhasedDmd(), EXAMPLES, settings(name), tmp_path / "x.safetensors", FitPlan(1, 2), knobs={"rank": 2}
        )
        assert [1000 * level for level in found.facts["levels"]] == pytest.approx([*plain, 0])


def test_a_level_of_two_stages_is_one_step(tmp_path):
    made = tiny("WanPipeline")
    made.pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plain = timesteps(made.pipe, made, num_inference_steps=4, guidance_scale=1.0)
    assert len(plain) == 7
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": lora("WanPipeline", tmp_path, 1)}})
    assert timesteps(pipe, made) == pytest.approx(sorted(set(plain), reverse=True), abs=1e-3)


def test_euler_draws_no_noise(tmp_path):
    file, ours = lora("FluxPipeline", tmp_path, 1), []
    for stochastic in (False, True):
        made = with_euler(tiny(), stochastic_sampling=stochastic)
        ours.append(latents(load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file}}), made))
    assert torch.equal(*ours)


# runs -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_phase_is_the_plain_lora(name, tmp_path):
    """Bit for bit what diffusers makes of the LoRA in four steps without guidance, and gone afterwards."""
    file, made = lora(name, tmp_path, 1), with_euler(tiny(name))
    before = latents(made.pipe, made, num_inference_steps=4)
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file}})
    ours = latents(pipe, made)
    report = pipe.plugins.report()
    assert report.steps == 4
    assert sum(report.forwards.values()) == 4  # no guidance branch
    pipe.plugins.clear()
    assert torch.equal(latents(pipe, made, num_inference_steps=4), before)
    plain = with_euler(tiny(name))
    for attribute, each in (file if isinstance(file, dict) else {"transformer": file}).items():
        getattr(plain.pipe, attribute).load_lora_adapter(str(each), prefix="transformer")
    wanted = latents(plain.pipe, plain, num_inference_steps=4, **{SCALE[FAMILIES[name]]: 1.0})
    assert torch.equal(ours, wanted)
    assert not torch.equal(ours, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_zeros_leave_the_run_of_few_steps(name, tmp_path):
    file, made = lora(name, tmp_path, 2, scale=0.0), with_euler(tiny(name))
    plain = latents(made.pipe, made, num_inference_steps=4, **{SCALE[FAMILIES[name]]: 1.0})
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file, "phase_2": file, "boundaries": [0.8], "steps": None}})
    assert torch.equal(latents(pipe, made, num_inference_steps=4), plain)


def test_the_expert_changes_at_the_boundary(tmp_path):
    """Against diffusers' own switch of adapters after the second step; the boundary is the level at which the third begins."""
    first, second = (lora("FluxPipeline", tmp_path, seed) for seed in (1, 2))
    made = with_euler(tiny(), use_dynamic_shifting=False, shift=3.0)
    knobs = {"phase_1": first, "phase_2": second, "boundaries": (0.75,)}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    ours = latents(pipe, made)
    counted = pipe.plugins.report().plugins["phased_dmd"]
    assert [counted.total(name) for name in PHASES[:2]] == [2, 2]
    pipe.plugins.clear()
    plain = with_euler(tiny(), use_dynamic_shifting=False, shift=3.0)
    plain.pipe.load_lora_weights(first, adapter_name="one")
    plain.pipe.load_lora_weights(second, adapter_name="two")
    plain.pipe.set_adapters("one")

    def switch(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        if step == 1:
            pipe.set_adapters("two")
        return kwargs

    assert torch.equal(ours, latents(plain.pipe, plain, num_inference_steps=4, callback_on_step_end=switch))


class Lower(Plugin):
    """Edits the schedule after the plugins inside it."""

    name = "lower"
    paper = Paper("a probe", "0000.00000", "lower levels")
    families = ("flux",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"schedule"}))

    def schedule(self, call, next):
        sigmas = next(call).sigmas.square()
        return Schedule(sigmas[:-1] * 1000, sigmas)


def test_the_expert_is_that_of_the_level_that_is_run(tmp_path):
    """Steps begin at 1, .81, .5625, .25 where an outer plugin squares 1, .9, .75, .5."""
    knobs = {"phase_1": lora("FluxPipeline", tmp_path, 1), "phase_2": lora("FluxPipeline", tmp_path, 2), "boundaries": 0.85, "shift": 3.0}
    for outer, wanted in (([], [2, 2]), ([Lower()], [1, 3])):
        made = with_euler(tiny())
        pipe = load_pipeline(made.pipe, plugins=[*outer, PhasedDmd(**knobs)])
        latents(pipe, made)
        counted = pipe.plugins.report().plugins["phased_dmd"]
        assert [counted.total(name) for name in PHASES[:2]] == wanted


def test_renoising_is_the_loop_by_hand(tmp_path):
    file, made = lora("FluxPipeline", tmp_path, 1), with_euler(tiny(), use_dynamic_shifting=False, shift=3.0)
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file, "sampler": "renoise"}})
    seen: list[tuple[float, Tensor]] = []
    ours = latents(pipe, made, callback_on_step_end=lambda p, i, t, k: (seen.append((float(t), k["latents"].clone())), k)[1])
    pipe.plugins.clear()
    plain = with_euler(tiny(), use_dynamic_shifting=False, shift=3.0, stochastic_sampling=True)
    plain.pipe.load_lora_weights(file)
    generator = torch.Generator().manual_seed(0)
    step = plain.pipe.scheduler.step  # the pipeline does not hand its generator on
    plain.pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs, generator=generator)
    wanted = plain.pipe(**plain.kwargs, num_inference_steps=4, generator=generator)[0]
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert len(seen) == 4


def test_a_users_lora_stays_beside(tmp_path):
    style, file = lora("FluxPipeline", tmp_path, 3), lora("FluxPipeline", tmp_path, 1)
    made = with_euler(tiny())
    made.pipe.load_lora_weights(style, adapter_name="style")
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file}})
    ours = latents(pipe, made)
    pipe.plugins.clear()
    made.pipe.load_lora_weights(file, adapter_name="few")
    made.pipe.set_adapters(["style", "few"])
    assert torch.allclose(ours, latents(made.pipe, made, num_inference_steps=4), atol=1e-6)


def test_a_run_of_several_rows_is_the_rows(tmp_path):
    files = [lora("FluxPipeline", tmp_path, seed) for seed in (1, 2)]
    made = with_euler(tiny())
    knobs = {"phase_1": files[0], "phase_2": files[1], "boundaries": (0.6,), "sampler": "renoise", "steps": None}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    made.kwargs["prompt"] = ["an apple", "a star"]
    both = pipe(**made.kwargs, num_inference_steps=4, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])[0]
    made.kwargs["prompt"] = "a star"
    assert torch.allclose(both[1:], latents(pipe, made, seed=1, num_inference_steps=4), atol=1e-5)


def test_emoji_flux_is_drawn_in_four_forwards_whatever_its_own_guidance(tmp_path):
    pipe = load_pipeline("emoji-flux", plugins={"phased_dmd": {"phase_1": zeros(tmp_path)}})
    pipe.set_progress_bar_config(disable=True)
    pipe("a star", generator=torch.Generator().manual_seed(0))
    assert sum(pipe.plugins.report().forwards.values()) == 4
    with pytest.raises(ConfigError, match="guidance='keep'"):
        pipe("a star", true_cfg_scale=2.0)
    pipe("a star", true_cfg_scale=1.0)
    pipe.plugins.configure("phased_dmd", guidance="keep")
    pipe("a star")
    assert sum(pipe.plugins.report().forwards.values()) == 8


def zeros(folder: Any) -> Any:
    """A LoRA of zeros for emoji-flux."""
    import peft
    from peft.utils import get_peft_model_state_dict

    pipe = load_pipeline("emoji-flux")
    pipe.transformer.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer), weight_name="zeros.safetensors")
    return folder / "zeros.safetensors"


# the fit --------------------------------------------------------------------------------------------------------------------------------

GUIDED = {"FluxPipeline": {"true_cfg_scale": 2.0, "negative_prompt": ""}, "WanPipeline": {"guidance_scale": 2.0}}


def settings(name: str) -> CallSettings:
    """Of calls like those of the tiny pipeline."""
    given = {key: value for key, value in tiny(name).kwargs.items() if key not in ("prompt", "output_type", "generator", "latents")}
    return CallSettings(steps=4, extra=given | GUIDED[name])


drawn: list[Tensor] = []
points: list[Any] = []


class Seen(PhasedFitter):
    """Keeps what the student draws, and where it is compared."""

    def sample(self, session, batch, calls):
        drawn.append(super().sample(session, batch, calls).detach())
        return drawn[-1]

    def noised(self, x, batch):
        points.append(super().noised(x, batch))
        return points[-1]


class Watched(PhasedDmd):
    fitting = Seen


def learn(name: str, out: Any, plugin: Any, steps: int = 2, **knobs: Any) -> Any:
    drawn.clear()
    points.clear()
    pipe = with_euler(tiny(name)).pipe
    return fit(pipe, plugin, EXAMPLES, settings(name), out, FitPlan(steps, 2), knobs={"rank": 2, "student_every": 1, **knobs})


@pytest.mark.parametrize("name", GUIDED)
def test_the_source_of_a_phase_is_the_earlier_experts_output(name, tmp_path):
    """An untrained second expert is the model itself: x_0 is the first expert's steps and then the model's, from the batch's own noise."""
    first = lora(name, tmp_path, 1)
    learn(name, tmp_path / "two.safetensors", Watched(boundaries=(0.75,), shift=3.0), steps=1, earlier=(str(first),))
    noise = torch.randn(drawn[0].shape, generator=torch.Generator().manual_seed(FitPlan(1, 2).drawn(1, 0)))
    made = with_euler(tiny(name))
    zero = lora(name, tmp_path, 2, scale=0.0)
    knobs = {"phase_1": first, "phase_2": zero, "boundaries": (0.75,), "shift": 3.0}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    rows = FitPlan(1, 2).rows(0, 3)
    made.kwargs |= {"prompt": [EXAMPLES[row].prompt for row in rows], "latents": noise}
    assert torch.allclose(latents(pipe, made), drawn[0], atol=1e-4)
    pipe.plugins.clear()
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {**knobs, "phase_1": zero}})
    assert not torch.allclose(latents(pipe, made), drawn[0], atol=1e-4)  # without the earlier expert it is another


@pytest.mark.parametrize(("sampler", "gradients"), [("euler", "all"), ("renoise", "truncated")])
def test_a_phase_ends_at_its_boundary_and_is_compared_above_it(sampler, gradients, tmp_path):
    plugin = Watched(boundaries=(0.75,), shift=3.0, sampler=sampler)
    learn("FluxPipeline", tmp_path / "one.safetensors", plugin, steps=6, gradients=gradients)
    for x, point in zip(drawn, points, strict=True):
        assert float(point.levels.s.min()) > 0.75
        assert torch.allclose(point.t, point.levels.s.flatten() * 1000)
        assert float(x.std()) > 0.6  # there is noise of 0.75 in it still


def test_one_phase_is_compared_as_plain_dmd_is(tmp_path):
    class Both(PhasedFitter):
        def noised(self, x, batch):
            kept = batch.generator.get_state()
            ours = super().noised(x, batch)
            batch.generator.set_state(kept)
            plain = MatchingFitter.noised(self, x, batch)
            for a, b in ((ours.x, plain.x), (ours.t, plain.t), (ours.target, plain.target)):
                assert torch.allclose(a, b, atol=1e-4)
            v = torch.randn_like(ours.x)
            assert torch.allclose(self.clean(ours, v), MatchingFitter.clean(self, plain, v), atol=1e-3)
            points.append(ours)
            return ours

    class One(PhasedDmd):
        fitting = Both

    learn("FluxPipeline", tmp_path / "one.safetensors", One())
    assert len(points) == 2


def test_what_is_learned_is_an_expert(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    found = learn("FluxPipeline", one, PhasedDmd(boundaries=(0.75,), shift=3.0), rate=0.01)
    assert (found.facts["phase"], found.facts["levels"]) == (1, pytest.approx([1, 0.9, 0.75, 0.5, 0]))
    learn("FluxPipeline", two, PhasedDmd(boundaries=(0.75,), shift=3.0), rate=0.01, earlier=str(one))
    made = tiny()
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": one, "phase_2": two, "boundaries": 0.75, "shift": 3.0}})
    with_experts = latents(pipe, made)
    pipe.plugins.clear()
    assert not torch.equal(with_experts, latents(load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": one, "shift": 3.0}}), made))


def test_gradient_towards_the_teacher_in_a_phase():
    """A student whose x_s lies m too high of a N(0, 1): its samples are moved down, by what the two scores differ."""
    s, m = 0.6, 2.0
    generator = torch.Generator().manual_seed(0)
    x_s = (1 - s) * m + ((1 - s) ** 2 + s * s) ** 0.5 * torch.randn(4, 64, generator=generator)
    t = torch.full((4, 1), 0.8)
    a, b = method.between(t, s)
    x_t = a * x_s + b * torch.randn(x_s.shape, generator=generator)
    var = (1 - t) ** 2 + t * t
    real, fake = (x_t - (c + (1 - t) / var * (x_t - (1 - t) * c)) for c in (0.0, m))
    estimates = [method.phase_estimate(x_t, each / t, t, s) for each in (fake, real)]
    difference = b.square() * (1 - t) * m / var / a
    assert torch.allclose(estimates[0] - estimates[1], difference.expand_as(x_s), atol=1e-4)
    assert bool((matching_gradient(x_s, *estimates) > 0).all())


def test_a_fit_is_in_as_many_steps_as_a_run(tmp_path):
    out = tmp_path / "x.safetensors"
    for plugin in (PhasedDmd(steps=8), PhasedDmd(steps=8, shift=3.0)):
        with pytest.raises(ConfigError, match="--inference-steps 8"):
            learn("FluxPipeline", out, plugin, steps=1)
    assert learn("FluxPipeline", out, PhasedDmd(sigmas=(1.0, 0.5)), steps=1).facts["levels"] == [1, 0.5, 0]
    assert len(learn("FluxPipeline", out, PhasedDmd(steps=None), steps=1).facts["levels"]) == 5


# refusals -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"phase_2": "b"}, "phase_1 is missing"),
        ({"phase_1": "a", "phase_2": "b"}, "one boundary fewer"),
        ({"phase_1": "a", "boundaries": (0.5,)}, "one boundary fewer"),
        ({"boundaries": (0.5, 0.6)}, "each below the one before"),
        ({"boundaries": (1.5,)}, "at most 1"),
        ({"sigmas": (1.0, 0.5, 0.5)}, "each below the one before"),
        ({"sigmas": (1.0, 0.0)}, "above 0"),
        ({"sigmas": (0.8, 0.5)}, "pure noise"),
        ({"sigmas": (1.0, 0.5), "shift": 3.0}, "leave shift out"),
        ({"sigmas": (1.0, 0.5), "steps": 4}, "leave steps out"),
        ({"shift": -1.0}, "above 0"),
        ({"shift": 1e9}, "at most 1000"),
        ({"shift": "wan"}, "shift"),
        ({"steps": 0}, "steps"),
        ({"strength": 3.0}, "strength"),
        ({"phase_1": ["a.safetensors"]}, r"phase_1.*\['a.safetensors'\] is no LoRA: give one file"),
        ({"phase_2": 3}, "phase_2.*3 is no LoRA: give one file"),
        ({"boundaries": True}, "boundaries"),
    ],
)
def test_bad_knobs_are_told(knobs, words):
    with pytest.raises(ConfigError, match=words):
        PhasedDmd(**knobs)


def test_bad_calls_are_refused_before_the_denoiser(tmp_path):
    file, made = lora("FluxPipeline", tmp_path, 1), with_euler(tiny())
    calls: list[int] = []
    made.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file, "shift": 3.0}})
    for words, kwargs in {
        "knows 4": {"num_inference_steps": 8},
        "true_cfg_scale = 2": {"true_cfg_scale": 2.0, "negative_prompt": ""},
        "neither shift nor sigmas": {"sigmas": [1.0, 0.7, 0.5, 0.2]},
    }.items():
        with pytest.raises(ConfigError, match=words):
            latents(pipe, made, **kwargs)
    pipe.plugins.clear()
    knobs = {"phase_1": file, "phase_2": file, "boundaries": (0.1,), "shift": 3.0}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    with pytest.raises(ConfigError, match="no step for phase 2"):
        latents(pipe, made)
    assert not calls


def test_one_boundary_may_be_a_whole_number():
    assert PhasedDmd(boundaries=1).config.boundaries == (1.0,)
    assert PhasedDmd(boundaries=0.9).config.boundaries == (0.9,)


def test_a_phase_without_a_step_is_noted_where_any_number_goes(tmp_path):
    file, made = lora("FluxPipeline", tmp_path, 1), with_euler(tiny())
    knobs = {"phase_1": file, "phase_2": file, "boundaries": (0.01,), "shift": 5.0, "steps": None}
    pipe = load_pipeline(made.pipe, plugins={"phased_dmd": knobs})
    latents(pipe, made, num_inference_steps=4)
    assert "no step for phase 2" in " ".join(pipe.plugins.report().plugins["phased_dmd"].notes)


def test_stages_of_other_sizes_are_a_conflict(tmp_path):
    pytest.importorskip("diffgraft_bottleneck_sampling")
    knobs = {"phase_1": lora("FluxPipeline", tmp_path, 1)}
    for plugins in ({"phased_dmd": knobs, "bottleneck_sampling": {}}, {"bottleneck_sampling": {}, "phased_dmd": knobs}):
        with pytest.raises(Conflict, match="calibrated"):
            load_pipeline(with_euler(tiny()).pipe, plugins=plugins)


def test_other_loras_are_refused(tmp_path):
    made = with_euler(tiny())
    with pytest.raises(ArtefactMismatch, match="no LoRA of this"):
        load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": lora("QwenImagePipeline", tmp_path, 1)}})
    with pytest.raises(DiffgraftError, match="nowhere"):
        load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": tmp_path / "nowhere.safetensors"}})
    file = lora("FluxPipeline", tmp_path, 1)
    made.pipe.load_lora_weights(file)
    made.pipe.fuse_lora()
    with pytest.raises(Unsupported, match="fused"):
        load_pipeline(made.pipe, plugins={"phased_dmd": {"phase_1": file}})
    two = lora("WanPipeline@2.2", tmp_path, 1)
    with pytest.raises(ConfigError, match="transformer_2"):
        load_pipeline(tiny("WanPipeline@2.2").pipe, plugins={"phased_dmd": {"phase_1": two["transformer"]}})


def test_a_fit_says_what_it_cannot_learn(tmp_path):
    out, file = tmp_path / "x.safetensors", str(lora("FluxPipeline", tmp_path, 1))
    with pytest.raises(ConfigError, match="none is left"):
        learn("FluxPipeline", out, PhasedDmd(), earlier=(file,))
    with pytest.raises(ConfigError, match="no step for phase 2"):
        learn("FluxPipeline", out, PhasedDmd(boundaries=(0.1,), shift=3.0))
    pipe = tiny("WanPipeline@2.2").pipe
    with pytest.raises(Unsupported, match="one denoiser"):
        fit(pipe, PhasedDmd(), EXAMPLES, settings("WanPipeline"), out, FitPlan(1, 2), knobs={"rank": 2})


def test_without_experts_nothing_is_done():
    made = tiny()
    plain = latents(made.pipe, made, num_inference_steps=3)
    pipe = load_pipeline(made.pipe, plugins=["phased_dmd"])
    assert torch.equal(latents(pipe, made, num_inference_steps=3), plain)
    assert "inactive" in " ".join(pipe.plugins.report().plugins["phased_dmd"].notes)
    assert PhasedDmd().is_neutral
    assert [need.knob for need in PhasedDmd.needs if isinstance(need, Need)] == list(PHASES)
