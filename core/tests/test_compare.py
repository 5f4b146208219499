"""The compare engine: its numbers recomputed by hand, its arms, and a pipeline that is as it was afterwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli_plugins import Idle, OnlyTransformers, Rival, Slow, Sparse
from diffgraft import BrokenPlugin, Bundled, ConfigError, Conflict, Unsupported, load_pipeline
from diffgraft.lab.compare import compare
from diffgraft.lab.compare_picture import FASTER, NEITHER, amplification, colour, comparison_picture, label
from diffgraft.lab.compare_view import speed_text
from diffgraft.lab.figures import fit_steps, latency_of
from diffgraft.lab.instruments import MacMode, missing_formulas
from diffgraft.lab.judging import all_right, load_judge
from diffgraft.lab.metrics import Mean, Spread, psnr, share, ssim, wilson
from diffgraft.lab.results import CompareSettings, Timing, plain
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments, make_pictures, make_samples
from diffgraft_pipelines.tiny import make
from torch.utils.flop_counter import FlopCounterMode

STEPS = 4
CALL = CallSettings(height=64, width=64, guidance_scale=5.0)
SAMPLES = (Sample(0, "a red apple"), Sample(1, "a green pear"), Sample(7, "a red apple"))


class RedJudge:
    """Understands only apples, and is content with every other picture."""

    def score(self, images, prompts):
        if any("apple" not in prompt for prompt in prompts):
            raise ValueError("only apples")
        return {"object": [i % 2 == 0 for i in range(len(images))], "place": [None] * len(images)}


@pytest.fixture(scope="module")
def pipe():
    return make("StableDiffusionPipeline").pipe


@pytest.fixture(scope="module")
def phases():
    return []


@pytest.fixture(scope="module")
def result(pipe, phases):
    settings = CompareSettings(SAMPLES, STEPS, CALL, repeats=3, warmup=1, pilot=1, batch=2)
    return compare(pipe, [Sparse(), Idle()], settings, judge=RedJudge(), on_progress=lambda *told: phases.append(told))


def test_arms(result):
    kinds = [(r.arm.name, r.arm.kind, list(r.arm.plugins)) for r in result.arms[:-1]]
    assert kinds == [
        ("baseline", "baseline", []),
        ("sparse", "plugin", ["sparse"]),
        ("idle", "plugin", ["idle"]),
        ("sparse + idle", "stack", ["sparse", "idle"]),
    ]
    fewer = result.arms[-1].arm
    assert (fewer.kind, fewer.plugins) == ("fewer_steps", {})
    assert fewer.steps == result.equal_time.steps
    assert 1 <= fewer.steps <= STEPS
    assert result.equal_time.matched_to == "sparse + idle"
    assert str(fewer.steps) in str(result.equal_time)
    assert all(len(r.latency.rounds) == 3 for r in result.arms)
    assert [t.sample for t in result.arms[0].latency.rounds] == [0, 1, 2]


def test_ratios_follow_from_the_rounds(result):
    base, arm = result.arm("baseline"), result.arm("sparse")
    seconds = [t.seconds for t in arm.latency.rounds]
    reference = [t.seconds for t in base.latency.rounds]
    assert arm.latency.of_medians == pytest.approx(np.median(reference) / np.median(seconds))
    assert arm.latency.paired.p50 == pytest.approx(np.median(np.divide(reference, seconds)))
    assert arm.latency.paired.low == pytest.approx(min(np.divide(reference, seconds)))
    assert base.latency.of_medians == 1
    assert all(0 < t.denoise_seconds < t.seconds for r in result.arms for t in r.latency.rounds)


def test_macs(result, pipe):
    macs = {r.arm.name: r.macs for r in result.arms}
    assert macs["sparse"].limit == 2  # every second of four calls
    assert macs["idle"].per_run == macs["baseline"].per_run
    assert result.arms[-1].macs.per_run * STEPS == macs["baseline"].per_run * result.equal_time.steps
    with FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter, torch.no_grad():
        pipe.unet(torch.zeros(2, 4, *latent_size(pipe)), 1, torch.zeros(2, pipe.tokenizer.model_max_length, 32))
    assert macs["baseline"].per_run == STEPS * counter.get_total_flops() // 2


def test_product_of_the_parts(result):
    alone = [result.arm("sparse").latency.of_medians]
    found = result.product
    assert found.speedup_of_parts == pytest.approx(alone[0]), "idle said that it did nothing: its ratio is noise"
    assert found.speedup == result.arm("sparse + idle").latency.of_medians
    assert (found.macs_limit_of_parts, found.macs_limit) == (2, 2)
    assert result.to_json()["product"]["macs_limit"] == 2
    assert "MAC limits 2.00x" in str(found)


def latent_size(pipe):
    return 64 // pipe.vae_scale_factor, 64 // pipe.vae_scale_factor


def test_attention_is_counted_on_the_cpu():
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 7, 8)
    with MacMode() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.macs == 2 * (2 * 5 * 7 * 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_macs_are_those_of_torchs_own_counter(mode):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    conv = torch.nn.Conv2d(3, 4, 3)

    def run():
        with mode():
            out = layer(torch.randn(2, 5, 16)).sum() + conv(torch.randn(2, 3, 8, 8)).sum() + torch.randn(3, 4).matmul(torch.randn(4)).sum()
        if out.requires_grad:
            out.backward()

    with MacMode() as counter:
        run()
    with FlopCounterMode(display=False, custom_mapping=missing_formulas()) as slow:
        run()
    assert counter.macs == slow.get_total_flops() // 2 > 0


def test_fidelity_against_pictures_made_by_hand(result, pipe):
    sample = SAMPLES[1]  # in a batch of two in the comparison, alone here
    call = CallSettings(steps=STEPS, height=64, width=64, guidance_scale=5.0)
    baseline = make_pictures(pipe, [sample], call)
    load_pipeline(pipe, [Sparse()])
    try:
        grafted = make_pictures(pipe, [sample], call)
    finally:
        pipe.plugins.clear()
    mse = float(np.mean((grafted.astype(np.float64) - baseline) ** 2))
    near = result.arm("sparse").fidelity
    assert near.psnr[1] == pytest.approx(-10 * math.log10(mse), abs=0.05)
    assert near.psnr_mean == pytest.approx(np.mean(near.psnr))
    assert near.psnr_worst == min(near.psnr)
    assert near.ssim_worst == min(near.ssim) < 1
    assert (near.identical, near.pictures) == (0, 3)


def test_fidelity_against_many_steps(pipe):
    settings = CompareSettings(SAMPLES, STEPS, CALL, repeats=1, warmup=0, pilot=1, batch=2, reference_steps=9)
    result = compare(pipe, [Idle()], settings)
    many = make_pictures(pipe, [SAMPLES[2]], CallSettings(steps=9, height=64, width=64, guidance_scale=5.0))
    assert np.abs(result.reference[2] - many[0]).max() < 1e-4
    baseline, idle, fewer = result.arms
    assert baseline.fidelity.psnr == idle.fidelity.psnr == psnr(baseline.pictures, result.reference)
    assert baseline.fidelity.identical == 0
    assert idle.changed_nothing  # against the baseline, not against the reference
    expected = np.mean(np.subtract(idle.fidelity.psnr, fewer.fidelity.psnr))
    assert result.advantage.mean == pytest.approx(expected)
    assert result.advantage.low <= expected <= result.advantage.high
    shown = label(baseline, result)
    assert any("PSNR" in line for line in shown)
    assert "PSNR" not in " ".join(label(baseline, replace(result, reference=None)))
    assert comparison_picture(result, "tiny").height > comparison_picture(replace(result, reference=None), "tiny").height
    assert result.to_json()["advantage"]["mean"] == result.advantage.mean
    with pytest.raises(ConfigError, match="reference_steps = 4: must be more than the 4 steps"):
        CompareSettings(SAMPLES, STEPS, CALL, reference_steps=4)


def test_on_top_of_another_plugin(pipe):
    settings = CompareSettings(SAMPLES[:1], STEPS, CALL, repeats=1, warmup=0, pilot=1)
    result = compare(pipe, [Idle(), Sparse()], settings, always=["sparse"])
    assert [(r.arm.name, list(r.arm.plugins)) for r in result.arms[:2]] == [("baseline", ["sparse"]), ("idle", ["idle", "sparse"])]
    assert list(result.arms[-1].arm.plugins) == ["sparse"]
    assert result.always == ("sparse",)
    assert result.arm("idle").changed_nothing
    assert not result.arm("baseline").changed_nothing
    assert all(r.macs.per_run == result.arms[0].macs.per_run for r in result.arms[:2])
    with pytest.raises(ConfigError, match="always = nobody: not among the plugins that are compared"):
        compare(pipe, [Idle()], settings, always=["nobody"])
    with pytest.raises(ConfigError, match="at least one that is not part of every arm"):
        compare(pipe, [Idle()], settings, always=["idle"])


def test_mean_with_its_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = Mean.of(values)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * 0.1, found.mean + 1.96 * 0.1), abs=0.02)
    assert Mean.of([1.0] * 5).text("dB") == "+1.00 dB (+1.00 to +1.00, 95 % interval)"
    assert Mean.of([1.0, 3.0]).text("dB") == "+2.00 dB (+1.00 to +3.00, least and most of 2 pictures)"
    assert Mean.of([1.0]).text("dB") == "+1.00 dB (of one picture)"


def test_a_plugin_that_changes_nothing_is_told(result):
    idle = result.arm("idle")
    assert idle.changed_nothing
    assert idle.notes == ["idle: inactive: there was nothing to do"]
    assert (idle.fidelity.identical, idle.fidelity.psnr_mean, idle.fidelity.psnr) == (3, None, [math.inf] * 3)
    assert not result.arm("sparse").changed_nothing
    assert not result.arm("baseline").changed_nothing


def test_an_inactive_plugin_has_no_gain_to_read(result):
    idle, stack = result.arm("idle"), result.arm("sparse + idle")
    assert (idle.inactive, idle.is_idle, idle.reading) == (("idle",), True, "inactive, did nothing")
    assert speed_text(idle).startswith("inactive (")
    assert colour(idle) == NEITHER
    assert label(idle, result)[1] == "inactive, did nothing"
    assert (stack.inactive, stack.is_idle) == (("idle",), False)
    assert "idle: inactive" in label(stack, result)
    assert result.product.speedup_of_parts == result.arm("sparse").latency.of_medians
    raw = {arm["arm"]["name"]: arm for arm in result.to_json()["arms"]}
    assert raw["idle"]["inactive"] == ["idle"]
    assert raw["idle"]["reading"] == "inactive, did nothing"


@pytest.mark.parametrize(("seconds", "noise", "reading", "cell"), [
    ([1.0, 0.9, 1.1], True, "as fast, within noise (1.00x)", "within noise (1.00x)"),
    ([0.5, 0.4, 0.5], False, "2.00x faster", "2.00x"),
    ([2.0, 2.0, 2.5], False, "2.00x slower", "0.50x"),
])  # fmt: skip
def test_a_ratio_whose_rounds_hold_one_is_noise(result, seconds, noise, reading, cell):
    base = [Timing(i, i, 1.0, None, None, None) for i in range(3)]
    latency = latency_of([replace(each, seconds=value) for each, value in zip(base, seconds, strict=True)], base)
    assert latency.within_noise is noise
    item = replace(result.arm("sparse"), latency=latency)
    assert (item.reading, speed_text(item)) == (reading, cell)
    assert (colour(item) == NEITHER) is noise
    assert colour(replace(item, latency=latency_of(base, base))) == NEITHER != FASTER
    assert replace(result, arms=[item, item]).to_json()["arms"][0]["latency"]["within_noise"] is noise


def test_differences_are_amplified_by_one_factor_for_all(result):
    measure = np.zeros((1, 1, 10, 10, 3), np.float32)
    assert amplification([measure, measure + 0.1], measure) == 8
    assert amplification([measure], measure) == 64
    assert amplification([measure + 1], measure) == 1
    page = comparison_picture(result, "tiny")
    assert page.width < 3 * page.height


class Breaks(Sparse):
    """Fails in the run of this number."""

    name = "breaks"
    error: type[BaseException] = KeyboardInterrupt
    at = 0
    runs = 0

    def run(self, call, next):
        Breaks.runs += 1
        if Breaks.runs == Breaks.at:
            raise Breaks.error
        return next(call)


@pytest.mark.parametrize(("at", "error", "during", "whole"), [
    (1, KeyboardInterrupt, "pilot, breaks", 0),
    (3, ZeroDivisionError, "MACs, breaks", 0),
    (6, KeyboardInterrupt, "latency, round 3 of 3, breaks", 2),
    (7, KeyboardInterrupt, "pictures, breaks", 3),
])  # fmt: skip
def test_an_interrupted_comparison_hands_over_what_was_measured(pipe, monkeypatch, at, error, during, whole):
    for name, value in {"at": at, "error": error, "runs": 0}.items():
        monkeypatch.setattr(Breaks, name, value)
    kept = []
    settings = CompareSettings(SAMPLES, 2, CALL, repeats=3, warmup=0, pilot=1, batch=3)
    with pytest.raises(error):
        compare(pipe, [Breaks()], settings, on_unfinished=kept.append)
    [found] = kept
    assert (found.during, found.error, found.whole_rounds) == (during, error.__name__, whole)
    assert not hasattr(pipe, "plugins")
    raw = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert raw["unfinished"] == {"during": during, "error": error.__name__, "whole_rounds": whole}
    assert [arm["arm"]["name"] for arm in raw["arms"]][:2] == ["baseline", "breaks"]
    assert [arm["latency"] is not None for arm in raw["arms"]] == [whole > 0] * len(raw["arms"])
    if at == 7:
        assert raw["arms"][0]["fidelity"]["identical"] == 3
        assert raw["arms"][1]["fidelity"] is None


def test_what_was_skipped(result):
    sparse = result.arm("sparse")
    assert sparse.skipped == {"sparse: skipped": 2}
    assert sparse.denoiser_calls == 4
    assert result.arm("idle").skipped == {}


def test_judge(result):
    verdicts = result.arm("sparse").verdicts
    assert verdicts.raw == {"object": [True, False], "place": [None, None]}
    assert (verdicts.shares["object"].right, verdicts.shares["object"].total) == (1, 2)
    assert "place" not in verdicts.shares
    assert verdicts.shares["all"].right == 1
    assert (verdicts.gained, verdicts.lost) == (0, 0)
    assert any("1 of 3 prompts: only apples" in note for note in result.arms[0].notes)


def test_json_is_plain_and_whole(result):
    raw = json.loads(json.dumps(result.to_json(), allow_nan=False))
    idle = next(arm for arm in raw["arms"] if arm["arm"]["name"] == "idle")
    assert idle["fidelity"]["psnr"] == [None] * 3
    assert [t["seconds"] for t in raw["arms"][0]["latency"]["rounds"]] == [t.seconds for t in result.arms[0].latency.rounds]
    assert raw["arms"][1]["arm"]["plugins"] == {"sparse": {"every": 2, "mode": None}}
    assert raw["arms"][1]["latency"]["rounds"][0]["report"]["plugins"]["sparse"]["counts"]["skipped"] == {"both": 2}
    assert raw["environment"]["versions"]["diffgraft"]
    assert "pictures" not in raw["arms"][0]
    assert raw["schema"] == 1


def test_progress_is_told_to_the_end(phases):
    for phase in ("pilot", "MACs", "latency", "pictures"):
        done = [(d, total) for name, d, total in phases if name == phase]
        assert done[-1][0] == done[-1][1] > 0
        assert done == sorted(done)


def test_the_pipeline_is_as_it_was(result, pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert not hasattr(pipe, "plugins")
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert pipe._progress_bar_config == {"disable": True}
    assert "forward" not in pipe.unet.__dict__


def test_neutral_and_slow_stacks(pipe):
    settings = CompareSettings(SAMPLES[:1], 2, CALL, repeats=1, warmup=0, pilot=1)
    result = compare(pipe, [Idle(off=True), Slow()], settings)
    assert not result.arm("idle").changed_nothing  # set neutral: it does what it was asked
    assert result.arm("slow").changed_nothing
    assert result.arm("slow").macs.limit == pytest.approx(1 / 3)
    assert result.arm("idle").verdicts is None


def test_refused_before_anything_runs(pipe):
    settings = CompareSettings(SAMPLES, STEPS, CALL)
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *a: calls.append(1))
    try:
        with pytest.raises(ConfigError, match="at least one"):
            compare(pipe, [], settings)
        with pytest.raises(Conflict, match="both skip denoiser"):
            compare(pipe, [Sparse(), Rival()], settings)
        with pytest.raises(Unsupported, match="only_transformers"):
            compare(pipe, [OnlyTransformers()], settings)
        load_pipeline(pipe, [Idle()])
        with pytest.raises(Conflict, match="without any"):
            compare(pipe, [Sparse()], settings)
    finally:
        handle.remove()
        pipe.plugins.clear()
    assert calls == []
    assert not hasattr(pipe, "plugins")


@pytest.mark.parametrize("bad", [{"steps": 0}, {"repeats": 0}, {"batch": 0}, {"warmup": -1}, {"samples": ()}])
def test_bad_settings(bad):
    with pytest.raises(ConfigError):
        CompareSettings(**{"samples": SAMPLES, "steps": 3, **bad})


@pytest.mark.parametrize(
    ("whole", "half", "target", "steps", "capped"),
    [
        (1.10, 0.60, 0.50, 20, False),  # 0.1 s fixed and 20 ms a step
        (1.10, 0.60, 0.511, 21, False),
        (1.10, 0.60, 0.05, 1, False),  # nothing is that fast
        (1.10, 0.60, 1.30, 50, True),
        (1.00, 0.40, 0.50, 25, False),  # as if the first step took less than nothing
        (0.50, 0.60, 0.25, 25, False),  # noise turned the slope round
    ],
)
def test_steps_of_equal_time(whole, half, target, steps, capped):
    found = fit_steps(50, whole, 25, half, target, "the stack", {})
    assert (found.steps, found.capped) == (steps, capped)
    assert [replace(found, realised=share).held for share in (0.62, 0.9, 1.3)] == [capped, True, capped]


def test_wilson_and_share():
    low, high = wilson(95, 100)
    assert (low, high) == (pytest.approx(0.8882, abs=1e-4), pytest.approx(0.9785, abs=1e-4))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert share([None, None]) is None
    found = share([True, None, False, True])
    assert (found.right, found.total, found.share) == (2, 3, 2 / 3)
    assert all_right({"a": [True, None, False], "b": [None, None, True]}) == [True, True, False]


def test_psnr_and_ssim():
    black, gray = np.zeros((1, 1, 32, 32, 3), np.float32), np.full((1, 1, 32, 32, 3), 0.1, np.float32)
    assert psnr(gray, black) == [pytest.approx(20.0, abs=1e-4)]
    assert psnr(gray, gray) == [math.inf]
    assert ssim(gray, gray) == [pytest.approx(1.0)]
    assert ssim(gray[:, :, :8], black[:, :, :8]) is None
    video = np.concatenate([gray, black]).transpose(1, 0, 2, 3, 4)
    still = ssim(gray, black)[0]
    assert ssim(video, np.zeros_like(video)) == [pytest.approx((still + 1) / 2)]


def test_a_judge_that_cannot_be_loaded():
    assert load_judge(Bundled("x", "nowhere")) is None
    for judge in ("no_such_module:judge", "diffgraft.lab.compare:no_such_function"):
        with pytest.raises(BrokenPlugin, match="judge of 'x'"):
            load_judge(Bundled("x", "nowhere", judge=judge))


def test_spread():
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.p50, spread.q25, spread.q75, spread.low, spread.high) == (3, 2, 4, 1, 5)


def test_plain_numbers():
    assert plain({"a": [math.inf, float("nan"), 1.5], "b": (torch.float32, None, True)}) == {
        "a": [None, None, 1.5],
        "b": ["torch.float32", None, True],
    }


@pytest.mark.parametrize("name", ["DiTPipeline", "DDIMPipeline", "WanPipeline"])
def test_other_kinds_of_pipelines(name):
    tiny = make(name)
    extra = {k: v for k, v in tiny.kwargs.items() if k in ("num_frames", "height", "width", "max_sequence_length")}
    prompts = ["a red apple"] if name == "WanPipeline" else []
    samples = make_samples(tiny.pipe, [0, 1], prompts)
    call = CallSettings(steps=2, extra=extra)
    together = make_pictures(tiny.pipe, samples, call)
    alone = make_pictures(tiny.pipe, samples[1:], call)
    assert together.ndim == 5
    assert together.shape[0] == 2
    assert together.shape[-1] == 3
    assert (together.shape[1] > 1) == (name == "WanPipeline")
    assert 0 <= together.min() <= together.max() <= 1
    assert np.allclose(together[1], alone[0], atol=1e-4)


def test_arguments_that_a_pipeline_does_not_take():
    pipe = make("DDIMPipeline").pipe
    with pytest.raises(ConfigError, match="takes no prompt"):
        make_samples(pipe, [0], ["a"])
    with pytest.raises(ConfigError, match="takes no guidance_scale"):
        call_arguments(pipe, make_samples(pipe, [0]), CallSettings(guidance_scale=2.0))
    with pytest.raises(ConfigError, match="needs a prompt"):
        make_samples(make("StableDiffusionPipeline").pipe, [0])
