"""ERTACache against its equations, against a residual cache written by hand, and against what must not happen."""

from __future__ import annotations

import copy
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Effects, Paper, Plugin, StepOutput, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft_ertacache import ERTACache
from diffgraft_ertacache import method as m
from diffgraft_ertacache.calibration import Measure, channel_axis
from diffusers import FlowMatchEulerDiscreteScheduler

INF = math.inf
ALL = {"threshold": 10.0, "phi": "off"}
PLAIN = {**ALL, "rectify": False}
FAMILIES = {
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "wan": "WanPipeline",
    "pixart": "PixArtAlphaPipeline",
    "cogvideox": "CogVideoXPipeline",
    "dit": "DiTPipeline",
    "qwen_image": "QwenImagePipeline",
    "ltx": "LTXPipeline",
}


def tiny(family="flux", name=None):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name or FAMILIES[family], 0)
    if family != "dit":
        made.kwargs["output_type"] = "latent"
    return made


def picture(pipe, made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), **kwargs})[0])


def artefact_for(made, tmp_path, steps=5, **knobs):
    """A calibration on this very pipeline, prompt and noise."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "class_labels", "num_inference_steps", "output_type")}
    kwargs = made.kwargs
    label = kwargs.get("class_labels")
    sample = Sample(0, prompt=kwargs.get("prompt"), class_label=label[0] if isinstance(label, list) else label)
    return calibrate(made.pipe, ERTACache(**knobs), [sample], CallSettings(steps=steps, extra=extra), tmp_path / "a.safetensors")


def grafted(made, artefact, **knobs):
    return load_pipeline(made.pipe, plugins=[("ertacache", {"artefact": artefact, **knobs})])


def part(pipe):
    return pipe.plugins.report().plugins["ertacache"]


class Probe(Plugin):
    """Does what ``change(call, next)`` does at the denoiser and keeps what came out."""

    name = "probe"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects()

    def __init__(self, change=lambda call, next: next(call)):
        super().__init__()
        self.change = change
        self.answers = []

    def denoise(self, call, next):
        self.answers.append(self.change(call, next).clone())
        return self.answers[-1]


# the equations ----------------------------------------------------------------------------------------------------------------------


def test_relative_error_is_the_ratio_of_l1_norms():
    cached, true = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[2.0, -2.0], [1.0, 1.0]])
    assert float(m.relative_error(cached, true)) == pytest.approx((1 + 0 + 1 + 3) / 6)


ERRORS = [[INF, INF], [0.1, INF], [0.2, 0.3], [0.1, 0.5], [0.05, 0.05], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("knobs", "ages"),
    [
        ((0.0, 9, 1, 0), [0, 0, 0, 0, 0, 0]),  # errors of 0 are not below 0
        ((0.15, 9, 1, 1), [0, 1, 0, 1, 2, 0]),
        ((0.15, 9, 1, 0), [0, 1, 0, 1, 2, 0]),  # a third in a row was not measured
        ((0.15, 1, 1, 0), [0, 1, 0, 1, 0, 1]),
        ((1.0, 9, 1, 1), [0, 1, 2, 0, 1, 0]),
        ((1.0, 9, 3, 2), [0, 0, 0, 1, 0, 0]),
        ((0.1, 9, 1, 1), [0, 0, 0, 0, 1, 0]),  # below lambda, not equal to it
    ],
)
def test_policy_reuses_where_the_error_since_the_last_computed_step_is_below_lambda(knobs, ages):
    assert m.policy(ERRORS, *knobs) == ages


def test_threshold_for_is_the_smallest_that_computes_so_few():
    for computed in range(3, 7):
        found = m.threshold_for(ERRORS, computed, 9, 1, 0)
        assert m.policy(ERRORS, found, 9, 1, 0).count(0) <= computed
        smaller = [e for row in ERRORS for e in row if e < found * (1 - 1e-5) - 1e-9]
        assert all(m.policy(ERRORS, e, 9, 1, 0).count(0) > computed for e in smaller)
    with pytest.raises(ValueError, match="at most 1 of 6"):
        m.threshold_for(ERRORS, 1, 9, 1, 0)


def test_correction_coefficient_is_clipped():
    error, change = torch.tensor([1.0, 3.0, 0.0, 0.0, 2.0]), torch.tensor([4.0, 2.0, 5.0, 0.0, 0.0])
    assert m.correction_coefficient(error, change).tolist() == [0.75, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("phi", [[1, 0.5, 1, 0.2, 0.0, 1], [1.0] * 6, [1, 0, 0, 0, 0, 1]])
def test_the_grid_is_the_papers_where_the_spacing_is_even(phi):
    T = len(phi)
    way, expected = 0.0, [0.0]  # the paper's loop: time runs from 0 to 1 in sampling order
    for i in range(T):
        dt_c = (1 - way) / (1 - i / T) / T
        way += dt_c * phi[i]
        expected.append(way)
    even = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    found = m.adjusted_sigmas(even, torch.tensor(phi))
    assert torch.allclose(1 - found, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert found[-1] == 0


def test_the_grid_ends_at_exactly_zero_falls_and_stays_without_correction():
    sigmas = torch.cat([torch.linspace(1, 0.02, 9) ** 0.3, torch.zeros(1)])
    assert torch.allclose(m.adjusted_sigmas(sigmas, torch.ones(9)), sigmas, atol=1e-7)
    found = m.adjusted_sigmas(sigmas, torch.tensor([1, 0.3, 0.9, 1, 0.1, 1, 0.5, 0.5, 1]))
    assert found[-1] == 0
    assert bool((found[:-1] > found[1:]).all())
    assert bool((found[2:-1] > sigmas[2:-1]).all()), "shorter steps leave more of the way"


def fitted(guess, true):
    gain, offset = m.rectification(*m.linear_model(m.moments(guess, guess - true)))
    return gain * guess + offset


def test_the_closed_form_is_least_squares_per_channel():
    g = torch.Generator().manual_seed(0)
    guess, true = torch.randn(3, 50, 4, generator=g), torch.randn(3, 50, 4, generator=g)
    true = true + 0.7 * guess + torch.arange(4.0)
    K, B = m.linear_model(m.moments(guess, guess - true))
    for c in range(4):
        x, eps = guess[..., c].flatten().numpy(), (guess - true)[..., c].flatten().numpy()
        slope, intercept = np.polyfit(x, eps, 1)
        assert float(K[c]) / 4 == pytest.approx(slope, abs=1e-4)  # eps = (K v + B) / 4 + 1/2
        assert float(B[c]) / 4 + 0.5 == pytest.approx(intercept, abs=1e-4)
    assert float(((fitted(guess, true) - true) ** 2).mean()) < float(((guess - true) ** 2).mean())


def test_an_affine_error_is_removed_exactly_and_no_error_changes_nothing():
    guess = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    true = guess * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([0.0, -3.0, 1.0])
    assert torch.allclose(fitted(guess, true), true, atol=1e-4)
    assert torch.allclose(fitted(guess, guess), guess, atol=1e-6)
    constant = torch.ones(10, 3)  # no spread to fit a slope to: only the mean is corrected
    assert torch.allclose(fitted(constant, 3 * constant), 3 * constant)


def test_moments_of_parts_add_up():
    x, y = torch.randn(6, 7, 2), torch.randn(6, 7, 2)
    assert torch.allclose(m.moments(x, y), m.moments(x[:2], y[:2]) + m.moments(x[2:], y[2:]), atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "ndim", "axis"), [("bchw", 4, 1), ("bfchw", 5, 2), ("bcfhw", 5, 1), ("packed", 3, -1), ("bcfhw", 3, -1)]
)
def test_channel_axis(layout, ndim, axis):
    family = next(family for family in registry.families().values() if family.latents == layout)
    assert channel_axis(family, ndim) == axis


# reuse ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_is_bit_equal_needs_no_artefact_and_hooks_no_block(family):
    made = tiny(family)
    baseline = picture(made.pipe, made)
    found = []
    denoiser = made.pipe.transformer
    pipe = load_pipeline(made.pipe, plugins=[("ertacache", {"threshold": 0})])
    denoiser.register_forward_pre_hook(lambda d, _: found.append([p for p, x in d.named_modules() if p and "forward" in x.__dict__]))
    assert np.array_equal(picture(pipe, made), baseline)
    assert found[-1] == []


def blocks_of(transformer):
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in lists for block in getattr(transformer, name, ())]


def cached_by_hand(made, compute, steps):
    """A plain residual cache: at steps not in ``compute``, the stack's output is its input + the last computed step's difference.

    Written without diffgraft: every block's forward is replaced. Sequential guidance calls the stack several times a step.
    """
    blocks = blocks_of(made.pipe.transformer)
    state = {"step": 0, "call": 0}
    residuals, starts = {}, {}

    def replaced(number, block, original):
        def forward(*args, **kwargs):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            key = state["call"]
            if number == 0:
                starts[key] = x
            is_last = number == len(blocks) - 1
            if state["step"] in compute:
                out = original(*args, **kwargs)
                if is_last:
                    hidden = next(o for o in out if o is not None and o.shape == x.shape) if isinstance(out, tuple) else out
                    residuals[key] = hidden - starts[key]
                    state["call"] += 1
                return out
            if is_last:
                x = starts[key] + residuals[key]
                state["call"] += 1
            if family_returns(block) == 1:
                return x
            return (context, x)

        return forward

    def family_returns(block):
        return 1 if type(block).__name__ in ("WanTransformerBlock", "BasicTransformerBlock") else 2

    def advance(*args, **kwargs):
        out = step(*args, **kwargs)
        state["step"], state["call"] = state["step"] + 1, 0
        return out

    step = made.pipe.scheduler.step
    made.pipe.scheduler.step = advance
    for number, block in enumerate(blocks):
        block.forward = replaced(number, block, block.forward)
    return picture(made.pipe, made, num_inference_steps=steps)


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "pixart"])
def test_without_corrections_it_is_the_plain_residual_cache(family, tmp_path):
    made, other = tiny(family), tiny(family)
    pipe = grafted(made, artefact_for(made, tmp_path), **PLAIN, max_reuse=2)
    found = picture(pipe, made, num_inference_steps=5)
    assert np.array_equal(found, cached_by_hand(other, {0, 3, 4}, 5))
    counts = part(pipe).counts
    assert all(counts["computed"][branch] == 3 and counts["skipped"][branch] == 2 for branch in counts["computed"])


def test_a_picture_and_its_sound_reuse_each_its_own_residual(tmp_path):
    def both(pipe):
        out = pipe(**{**made.kwargs, "num_inference_steps": 5}, generator=torch.Generator().manual_seed(0))
        return out.frames, out.audio

    made, other = tiny("ltx2", "LTX2Pipeline"), tiny("ltx2", "LTX2Pipeline")
    pipe = grafted(made, artefact_for(made, tmp_path), **PLAIN, max_reuse=2)
    found = both(pipe)
    first, last = other.pipe.transformer.transformer_blocks
    kept, step = {}, {"at": -1}

    def begin(hidden_states, audio_hidden_states, forward=first.forward, **kwargs):
        step["at"] += 1
        kept["start"] = hidden_states, audio_hidden_states
        computed = step["at"] in {0, 3, 4}
        return forward(hidden_states, audio_hidden_states, **kwargs) if computed else kept["start"]

    def end(hidden_states, audio_hidden_states, forward=last.forward, **kwargs):
        if step["at"] in {0, 3, 4}:
            out = forward(hidden_states, audio_hidden_states, **kwargs)
            kept["residual"] = tuple(x - y for x, y in zip(out, kept["start"], strict=True))
            return out
        return tuple(x + y for x, y in zip(kept["start"], kept["residual"], strict=True))

    first.forward, last.forward = begin, end
    assert all(torch.equal(x, y) for x, y in zip(found, both(other.pipe), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_at_the_computed_steps_only(family, tmp_path):
    made = tiny(family)
    artefact = artefact_for(made, tmp_path, steps=4)
    ran = []
    for block in blocks_of(made.pipe.transformer):
        leaf = next(x for name, x in block.named_modules() if name.endswith("to_q"))
        leaf.register_forward_hook(lambda *_: ran.append(1))
    picture(made.pipe, made, num_inference_steps=4)
    whole = len(ran)
    ran.clear()
    pipe = grafted(made, artefact, threshold=10.0)
    first = picture(pipe, made, num_inference_steps=4)
    assert len(ran) == whole // 2
    assert np.isfinite(first).all()
    assert np.array_equal(picture(pipe, made, num_inference_steps=4), first)


class Constant(torch.nn.Module):
    """A block that adds the same to every input: what it adds at one step is what it adds at all."""

    def __init__(self, width):
        super().__init__()
        self.added = torch.nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, hidden_states, encoder_hidden_states=None, temb=None, rotary_emb=None):
        return hidden_states + self.added


def test_a_constant_residual_makes_any_reuse_exact(tmp_path):
    made = tiny("wan")
    made.pipe.transformer.blocks = torch.nn.ModuleList([Constant(24) for _ in range(3)])
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    baseline = picture(made.pipe, made, num_inference_steps=6)
    artefact = artefact_for(made, tmp_path, steps=6)
    assert float(artefact.tensors["error"][1:][artefact.tensors["error"][1:] < INF].max()) < 1e-5
    pipe = grafted(made, artefact, threshold=1e-4)
    found = picture(pipe, made, num_inference_steps=6)
    assert part(pipe).counts["skipped"] == {"cond": 4, "uncond": 4}
    assert np.allclose(found, baseline, atol=1e-3 * np.abs(baseline).max())


class Frozen(Probe):
    """Asks the same at every step: x never changes, t is always the same."""

    effects = Effects(edits=frozenset({"latents", "timestep"}))

    def __init__(self, **more):
        super().__init__()
        self.sample = None
        self.more = more

    def denoise(self, call, next):
        self.sample = call.sample if self.sample is None else self.sample
        asked = call.replace(**{call.family.sample: self.sample, call.family.timestep: torch.full((2,), 500.0)}, **self.more)
        self.answers.append(next(asked).clone())
        return self.answers[-1]

    def step(self, call, next):
        next(call)
        return StepOutput(call.sample)


def test_controlnet_residuals_are_not_added_twice(tmp_path):
    made = tiny("sd3")
    artefact = artefact_for(made, tmp_path)
    transformer = made.pipe.transformer
    added = [torch.randn(2, 16, transformer.inner_dim, generator=torch.Generator().manual_seed(0)) for _ in transformer.transformer_blocks]
    frozen = Frozen(block_controlnet_hidden_states=added)
    pipe = load_pipeline(made.pipe, plugins=[frozen, ("ertacache", {"artefact": artefact, **PLAIN})])
    picture(pipe, made, num_inference_steps=5)
    assert part(pipe).total("skipped") == 3
    for answer in frozen.answers[1:]:
        assert torch.allclose(answer, frozen.answers[0], atol=1e-5)


def test_asked_twice_in_one_step_the_second_answer_is_computed_and_the_first_as_alone(tmp_path):
    made = tiny("sd3")
    artefact = artefact_for(made, tmp_path)
    alone = picture(grafted(made, artefact, **ALL), made, num_inference_steps=5)
    made.pipe.plugins.clear()
    others = []

    def twice(call, next):
        out = next(call)
        others.append(next(call.replace(encoder_hidden_states=call["encoder_hidden_states"] * 0)))
        return out

    pipe = load_pipeline(made.pipe, plugins=[Probe(twice), ("ertacache", {"artefact": artefact, **ALL})])
    assert np.array_equal(picture(pipe, made, num_inference_steps=5), alone)
    assert part(pipe).total("skipped") == 3
    assert len(others) == 5


def test_a_swallowed_computed_step_lets_no_residual_grow_too_old(tmp_path):
    made = tiny("sd3")
    artefact = artefact_for(made, tmp_path, steps=7)
    probe = Probe(lambda call, next: call.sample * 0 if call.step.index in (0, 3) else next(call))
    pipe = load_pipeline(made.pipe, plugins=[probe, ("ertacache", {"artefact": artefact, **ALL, "max_reuse": 2})])
    picture(pipe, made, num_inference_steps=7)
    assert part(pipe).counts == {"computed": {"both": 3}, "skipped": {"both": 2}}  # 1, 4, 6 and 2, 5


def test_guidance_cut_in_mid_run_starts_the_cache_again(tmp_path):
    made = tiny("sd3")
    artefact = artefact_for(made, tmp_path, steps=6)

    def cut(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 0.0
            return {name: x.chunk(2)[-1] for name, x in tensors.items()}
        return tensors

    pipe = grafted(made, artefact, **ALL)
    inputs = ["prompt_embeds", "pooled_prompt_embeds"]
    picture(pipe, made, num_inference_steps=6, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=inputs)
    assert part(pipe).counts == {"computed": {"both": 1, "cond": 2}, "skipped": {"both": 2, "cond": 1}}


def test_guidance_on_with_an_artefact_of_none_uses_the_conditional_model(tmp_path):
    made = tiny("sd3")
    made.kwargs["guidance_scale"] = 1.0
    artefact = artefact_for(made, tmp_path)
    assert artefact.facts["branches"] == ["cond"]
    pipe = grafted(made, artefact, **ALL)
    picture(pipe, made, num_inference_steps=5, guidance_scale=4.0)
    assert part(pipe).counts["skipped"] == {"both": 3}


def test_two_transformers_never_share_a_residual(tmp_path):
    made = tiny("wan", "WanPipeline@2.2")
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    order = []
    for name in ("transformer", "transformer_2"):
        getattr(made.pipe, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    picture(made.pipe, made, num_inference_steps=6)
    switch = order[::2].index("transformer_2")
    assert 0 < switch < 5
    artefact = artefact_for(made, tmp_path, steps=6)
    errors = artefact.tensors["error"]
    assert all(errors[i, k - 1] == INF for i in range(switch, 6) for k in range(1, i + 1) if i - k < switch)
    pipe = grafted(made, artefact, **ALL)
    picture(pipe, made, num_inference_steps=6)
    ages = m.policy(errors.tolist(), 10.0, 8, 1, 1)
    assert ages[switch] == 0
    assert part(pipe).counts["computed"] == {"cond": ages.count(0), "uncond": ages.count(0)}


# calibration ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_calibration_measures_what_reuse_does(family, tmp_path):
    """Step 1's input is that of the uncached run, so there v~ - v of the cached run is what was measured; rectified it is smaller."""
    made = tiny(family)
    true = Probe()
    pipe = load_pipeline(made.pipe, plugins=[true])
    picture(pipe, made, num_inference_steps=5)
    pipe.plugins.clear()
    artefact = artefact_for(made, tmp_path)
    calibrator = Measure()
    pipe = load_pipeline(made.pipe, plugins=[calibrator])
    picture(pipe, made, num_inference_steps=5)
    norms = pipe.plugins.report().plugins[calibrator.name].records["norms"]
    pipe.plugins.clear()
    calls = len(true.answers) // 5
    layout = registry.families()[family].guidance
    cond = layout.order.index("cond")

    def leading(answers):
        step = answers[calls : 2 * calls]
        return step[cond] if calls > 1 else step[0].chunk(2)[cond]

    v, before = leading(true.answers), leading([None] * calls + true.answers[:calls])
    squares = {}
    for rectify in (False, True):
        reused = Probe()
        pipe = load_pipeline(made.pipe, plugins=[reused, ("ertacache", {"artefact": artefact, **ALL, "rectify": rectify})])
        picture(pipe, made, num_inference_steps=5)
        pipe.plugins.clear()
        error = leading(reused.answers) - v
        squares[rectify] = float((error**2).mean())
        if not rectify:
            assert float(error.abs().sum()) == pytest.approx(float(norms[0, 1, 0]), rel=1e-4)
    assert float(v.abs().sum()) == pytest.approx(float(norms[1, 1, 0]), rel=1e-4)
    assert float((v - before).abs().sum()) == pytest.approx(float(norms[2, 1, 0]), rel=1e-4)
    assert squares[True] < squares[False]
    phi = artefact.tensors["phi.difference"][1, 0]
    assert float(phi) == pytest.approx(min(1.0, max(0.0, 1 - float(norms[0, 1, 0] / norms[2, 1, 0]))), rel=1e-5)


def test_calibration_leaves_the_run_as_it_is(tmp_path):
    made = tiny("flux")
    baseline = picture(made.pipe, made, num_inference_steps=5)
    pipe = load_pipeline(made.pipe, plugins=[Measure()])
    assert np.array_equal(picture(pipe, made, num_inference_steps=5), baseline)


def test_calibration_over_prompts_is_read_from_its_file(tmp_path):
    made = tiny("sd3")
    samples = [Sample(seed, prompt=text) for seed, text in enumerate(("a red apple", "two dogs"))]
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    path = tmp_path / "made.safetensors"
    both = calibrate(made.pipe, ERTACache(max_reuse=2), samples, CallSettings(steps=5, extra=extra), path)
    singles = [
        calibrate(made.pipe, ERTACache(max_reuse=2), [sample], CallSettings(steps=5, extra=extra), tmp_path / "one.safetensors")
        for sample in samples
    ]
    assert both.tensors["error"].shape == (5, 2)
    assert both.facts["prompts"] == 2
    known = both.tensors["error"] < INF
    mean = (singles[0].tensors["error"] + singles[1].tensors["error"]) / 2
    assert torch.allclose(both.tensors["error"][known], mean[known])
    assert int(known.sum()) == 4 + 3
    pipe = load_pipeline(made.pipe, plugins=[("ertacache", {"artefact": str(path), **ALL})])
    picture(pipe, made, num_inference_steps=5)
    assert part(pipe).counts == {"computed": {"both": 3}, "skipped": {"both": 2}}  # the artefact knows no older residual


def test_a_single_step_can_be_calibrated_and_reuses_nothing(tmp_path):
    made = tiny("flux")
    baseline = picture(made.pipe, made, num_inference_steps=1)
    pipe = grafted(made, artefact_for(made, tmp_path, steps=1), **ALL)
    assert np.array_equal(picture(pipe, made, num_inference_steps=1), baseline)


# timestep adjustment ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["difference", "velocity"])
def test_the_schedule_is_the_adjusted_one(kind, tmp_path):
    made = tiny("sd3")
    artefact = artefact_for(made, tmp_path)
    made.pipe.scheduler.set_timesteps(5)
    base = made.pipe.scheduler.sigmas.clone()
    pipe = grafted(made, artefact, threshold=10.0, phi=kind)
    picture(pipe, made, num_inference_steps=5)
    phi = [1.0, *(float(artefact.tensors[f"phi.{kind}"][i, i - 1]) for i in (1, 2, 3)), 1.0]
    assert min(phi) < 0.99
    scheduler = made.pipe.scheduler
    assert torch.allclose(scheduler.sigmas, m.adjusted_sigmas(base, torch.tensor(phi)))
    assert scheduler.sigmas[-1] == 0
    assert torch.allclose(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
    assert not part(pipe).notes
    pipe.plugins.configure("ertacache", phi="off")
    picture(pipe, made, num_inference_steps=5)
    assert torch.equal(made.pipe.scheduler.sigmas, base)


def test_steps_of_size_nought_are_the_plain_run_with_fewer_steps(tmp_path):
    """What phi = 0 means: a reused step moves nothing, and the computed ones share the way."""
    made = tiny("sd3")
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    artefact = artefact_for(made, tmp_path)
    artefact.tensors["phi.difference"].zero_()
    pipe = grafted(made, artefact, threshold=10.0)
    found = picture(pipe, made, num_inference_steps=5)
    sigmas = made.pipe.scheduler.sigmas.unique().flip(0)
    assert len(sigmas) == 3  # two computed steps
    pipe.plugins.clear()
    wanted = picture(made.pipe, made, num_inference_steps=2, sigmas=sigmas[:-1].tolist())
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_image_to_image_adjusts_the_tail_that_runs(tmp_path):
    made = tiny("flux", "FluxImg2ImgPipeline")
    made.kwargs["strength"] = 0.6
    artefact = artefact_for(made, tmp_path, steps=10)
    assert artefact.made_for.steps == 6
    picture(made.pipe, made, num_inference_steps=10)
    base = made.pipe.scheduler.sigmas.clone()
    pipe = grafted(made, artefact, threshold=10.0)
    picture(pipe, made, num_inference_steps=10)
    found = made.pipe.scheduler.sigmas
    assert torch.equal(found[:6], base[:6])  # up to and including the first step's end, which is computed
    assert not torch.allclose(found[6:-1], base[6:-1], rtol=1e-4)
    assert found[-1] == 0


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [(None, "UniPCMultistepScheduler is not"), (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling")],
)
def test_other_schedulers_keep_their_grid_and_the_report_says_so(scheduler, words, tmp_path):
    made = tiny("wan")
    made.pipe.scheduler = scheduler or made.pipe.scheduler
    picture(made.pipe, made, num_inference_steps=5)
    base = made.pipe.scheduler.sigmas.clone()
    pipe = grafted(made, artefact_for(made, tmp_path), threshold=10.0)
    picture(pipe, made, num_inference_steps=5)
    assert torch.equal(made.pipe.scheduler.sigmas, base)
    assert [words in note and "phi = 1" in note for note in part(pipe).notes] == [True]


# refusals ---------------------------------------------------------------------------------------------------------------------------


def test_without_an_artefact_it_says_how_to_make_one():
    made = tiny("flux")
    pipe = load_pipeline(made.pipe, plugins=["ertacache"])
    with pytest.raises(ConfigError, match=r"artefact = None.*diffgraft calibrate ertacache --pipeline"):
        picture(pipe, made)


def test_another_number_of_steps_is_refused_and_the_pipeline_stays_whole(tmp_path):
    made = tiny("flux")
    baseline = picture(made.pipe, made)
    pipe = grafted(made, artefact_for(made, tmp_path), threshold=10.0)
    for steps in (3, 9):
        with pytest.raises(ArtefactMismatch, match=f"made for 5, found {steps}"):
            picture(pipe, made, num_inference_steps=steps)
    pipe.plugins.clear()
    assert np.array_equal(picture(made.pipe, made), baseline)


def test_a_run_cannot_reuse_longer_than_was_measured(tmp_path):
    made = tiny("flux")
    artefact = artefact_for(made, tmp_path)
    with pytest.raises(ConfigError, match=r"max_reuse = 99: the calibration measured residuals up to 8 steps old.*max_reuse=99"):
        grafted(made, artefact, max_reuse=99)
    pipe = grafted(made, artefact, max_reuse=8)
    with pytest.raises(ConfigError, match="max_reuse = 9"):
        pipe.plugins.configure("ertacache", max_reuse=9)


@pytest.mark.parametrize(
    ("knobs", "key"),
    [({"threshold": -0.1}, "threshold"), ({"phi": "yes"}, "phi"), ({"max_reuse": 0}, "max_reuse"), ({"first": 0}, "first"),
     ({"last": -1}, "last"), ({"artefact": 3}, "artefact"), ({"lambda": 0.1}, "lambda")],
)  # fmt: skip
def test_bad_knobs(knobs, key):
    with pytest.raises(ConfigError, match=key):
        ERTACache(**knobs)


def test_unets_and_blocks_without_one_stream_are_refused():
    made = tiny("sd", "StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="ertacache does not work on StableDiffusionPipeline"):
        load_pipeline(made.pipe, plugins=["ertacache"])
    for takes, returns, joined, why in (
        (("x",), ("y",), "none", "takes x and returns y"),
        (("hidden_states",), ("hidden_states", "skip"), "none", "returns hidden_states, skip"),
        (("hidden_states",), ("hidden_states",), "mixed", "as many tokens of text in each row as that has"),
    ):
        block = SimpleNamespace(is_layer=False, path="blocks.0", takes=takes, returns=returns, stream=takes[0], joined=joined)
        with pytest.raises(Unsupported, match=rf"blocks\.0 .*{why}"):
            ERTACache().check(SimpleNamespace(pipe=made.pipe, blocks=[block], given={}))


def test_the_artefact_is_not_changed_by_a_run(tmp_path):
    made = tiny("flux")
    artefact = artefact_for(made, tmp_path)
    before = copy.deepcopy(artefact.tensors)
    picture(grafted(made, artefact, threshold=10.0), made, num_inference_steps=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in artefact.tensors.items())
    assert isinstance(artefact, Artefact)
