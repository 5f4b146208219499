"""diffusers' caches by this plugin: equal to `enable_cache` where that works, and right where it is wrong.

E1 to E17 are the numbers of its defects, which were reproduced before this plugin was written.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, Paper, Plugin, PluginConfig, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.testing.ranks import answered
from diffgraft_diffusers_cache import DiffusersCache
from diffgraft_diffusers_cache.cache import Cache, config_for, made
from diffgraft_diffusers_cache.knobs import CONFIGS, RANGES, SKIPS, TOLD, DiffusersCacheConfig, knobs_of
from diffgraft_diffusers_cache.shadow import APPLY, hooks_for, shadow_of
from diffgraft_pipelines.tiny import make
from diffusers import FluxImg2ImgPipeline, FluxTransformer2DModel, MagCacheConfig
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

ALWAYS = (-1, 1001)
ATTENTION = (".*attn[12]?",)
KNOBS = {
    "first_block": {"method": "first_block", "threshold": 0.3},
    "first_block, all": {"method": "first_block", "threshold": 10.0},
    "mag": {"method": "mag", "threshold": 0.2, "mag_ratios": (1.0, 0.9, 0.97)},
    "taylorseer": {"method": "taylorseer", "cache_identifiers": ATTENTION},
    "taylorseer, lite": {"method": "taylorseer", "use_lite_mode": True},
    "taylorseer, order 2": {"method": "taylorseer", "cache_identifiers": ATTENTION, "max_order": 2, "taylor_factors_dtype": "float32"},
    "sea": {"method": "sea", "threshold": 3.0},
    "pab": {
        "method": "pab",
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": ALWAYS,
        "cross_attention_block_skip_range": 3,
        "cross_attention_timestep_skip_range": ALWAYS,
    },
    "faster": {"method": "faster", "spatial_attention_timestep_skip_range": ALWAYS, "unconditional_batch_timestep_skip_range": ALWAYS},
}
STEPS = 8


def tiny(name="FluxPipeline", **knobs):
    """A tiny pipeline; with the plugin where knobs are given."""
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    if knobs:
        made.pipe = load_pipeline(made.pipe, {"diffusers_cache": knobs})
    return made


def run(made, seed=0, **kwargs):
    given = {**made.kwargs, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed), **kwargs}
    given["output_type"] = "np" if "DiT" in type(made.pipe).__name__ else "latent"
    return np.asarray(made.pipe(**given)[0])


def told(made):
    return made.pipe.plugins.report().plugins["diffusers_cache"]


def skipped(made):
    return told(made).total("steps skipped")


def their_config(made, knobs, steps=STEPS, guided=True, time=None):
    """What a user of diffusers would write."""
    pipe, options = made.pipe, dict(knobs)
    method = options.pop("method")
    options = {name: list(value) if "identifiers" in name else value for name, value in options.items()}
    if "taylor_factors_dtype" in options:
        options["taylor_factors_dtype"] = getattr(torch, options["taylor_factors_dtype"])
    if method in ("pab", "faster"):
        options["current_timestep_callback"] = time or (lambda: pipe.current_timestep)
    if method == "faster":
        layout = "BFCHW" if "CogVideo" in type(pipe).__name__ else "BCHW"
        options |= {"is_guidance_distilled": not guided, "tensor_format": layout}
    if method == "mag":
        options |= {"num_inference_steps": steps, "mag_ratios": list(options["mag_ratios"])}
    if method == "sea" and "raw_vision_callback" not in options and "3" in type(pipe).__name__:
        options["raw_vision_callback"] = lambda model, args, kwargs: list(kwargs["hidden_states"].unsqueeze(2).unbind(0))
    if method == "faster" and "3" in type(pipe).__name__:  # else the text's pooled half stays
        names = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"]
        options["_unconditional_conditional_input_kwargs_identifiers"] = names
    return CONFIGS[method](**options)


def theirs(name, knobs, **how):
    made = tiny(name)
    made.pipe.transformer.enable_cache(their_config(made, knobs, **how))
    return made


def by_hand(name, knobs, branches=("both",), **how):
    """diffusers' hooks put on by hand, with the context that these pipelines do not set: one more of ``branches`` at each call."""
    made = tiny(name)
    model, seen = made.pipe.transformer, {"calls": 0, "time": None}
    APPLY[knobs["method"]](model, their_config(made, knobs, time=lambda: seen["time"], **how))
    managers = {id(v): v for m in model.modules() for h in getattr(m, "_diffusers_hook", FAKE).hooks.values() for v in vars(h).values()}
    managers = [v for v in managers.values() if isinstance(v, StateManager)]
    inner = model.forward
    signature = inspect.signature(type(model).forward)

    def telling(*args, **kwargs):
        branch, step = branches[seen["calls"] % len(branches)], seen["calls"] // len(branches)
        seen["calls"] += 1
        bound = signature.bind(model, *args, **kwargs).arguments
        seen["time"] = bound["timestep"].flatten()[0].item()
        sigma = made.pipe.scheduler.sigmas[step].item() if hasattr(made.pipe.scheduler, "sigmas") else None
        for manager in managers:
            manager.set_context(CacheContext(branch, step_index=step, num_inference_steps=STEPS, sigma=sigma))
        return inner(*args, **kwargs)

    model.forward = telling
    return made


class FAKE:
    hooks: dict = {}  # noqa: RUF012


# equal to enable_cache --------------------------------------------------------------------------------------------------------------------

WORKING = [
    *(
        (name, method)
        for name in ("FluxPipeline", "QwenImagePipeline")
        for method in ("first_block, all", "mag", "taylorseer", "taylorseer, lite")
    ),
    *(("WanPipeline", method) for method in ("first_block, all", "mag", "taylorseer", "taylorseer, lite", "sea")),
    *(("CogVideoXPipeline", method) for method in KNOBS if method != "sea"),
    *(("LTXPipeline", method) for method in KNOBS if method not in ("sea", "faster")),
    ("FluxPipeline", "first_block"),
    ("FluxPipeline", "taylorseer, order 2"),
]


@pytest.mark.parametrize(("name", "method"), WORKING)
def test_equal_to_enable_cache(name, method):
    plain, ours = run(tiny(name)), tiny(name, **KNOBS[method])
    picture = run(ours)
    assert (picture == run(theirs(name, KNOBS[method]))).all()
    assert (picture != plain).any()
    assert skipped(ours) > 0
    assert (run(ours) == picture).all()  # and again


@pytest.mark.parametrize("method", ["pab", "faster"])
def test_equal_where_no_guidance_can_be_mixed_up(method):
    knobs = KNOBS[method] | ({"spatial_attention_timestep_skip_range": (-1, 900)} if method == "faster" else {})
    unguided = {"true_cfg_scale": 1.0}
    ours = tiny(**knobs)
    picture = run(ours, **unguided)
    assert (picture == run(theirs("FluxPipeline", knobs, guided=False), **unguided)).all()
    assert skipped(ours) > 0
    assert "uncond skipped" not in told(ours).counts


BATCHED = [("StableDiffusion3Pipeline", method) for method in ("mag", "taylorseer", "pab", "faster")]
BATCHED += [("PixArtAlphaPipeline", method) for method in ("first_block", "taylorseer", "pab", "faster")]
BATCHED += [("DiTPipeline", "first_block"), ("DiTPipeline", "pab")]


@pytest.mark.parametrize(("name", "method"), BATCHED)
def test_models_without_enable_cache_have_it_too(name, method):
    """Equal to diffusers' hooks put on by hand, with the contexts that the pipeline does not set."""
    assert not issubclass(type(tiny(name).pipe.transformer), CacheMixin) or "3" in name
    ours = tiny(name, **KNOBS[method])
    assert (run(ours) == run(by_hand(name, KNOBS[method]))).all()
    assert skipped(ours) > 0


@pytest.mark.parametrize(("method", "error"), [("first_block", TypeError), ("taylorseer, lite", AttributeError), ("sea", None)])
def test_on_sd3_whose_last_block_gives_no_text(method, error, caplog):
    """diffusers would take it from a tensor, ask its dtype, or never cache."""
    with pytest.raises(error, match="None") if error else contextlib.nullcontext():
        run(by_hand("StableDiffusion3Pipeline", KNOBS[method]))
    ours = tiny("StableDiffusion3Pipeline", **KNOBS[method])
    caplog.clear()
    run(ours)
    assert skipped(ours) > 0
    assert not caplog.records


# defects of diffusers' own, cured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxKontextPipeline"])
@pytest.mark.parametrize("method", ["first_block", "taylorseer", "taylorseer, lite"])
def test_image_to_image(name, method):  # E1
    with pytest.raises(ValueError, match="No cache context is set"):
        run(theirs(name, KNOBS[method]))
    ours = tiny(name, **KNOBS[method])
    picture = run(ours)
    assert skipped(ours) > 0
    assert (picture == run(by_hand(name, KNOBS[method], ("cond", "uncond")))).all()


def test_a_state_for_each_branch(monkeypatch):  # E12
    begun = 6  # of 8, at the tiny pipeline's strength of 0.8
    knobs = KNOBS["mag"] | {"mag_ratios": (1.0, 0.9, 0.97, 0.95, 0.9, 1.1, 0.95, 0.92)}
    ours = tiny("FluxImg2ImgPipeline", **knobs)
    picture = run(ours)
    calls = told(ours).counts["steps computed"]["cond"] + told(ours).counts["steps skipped"]["cond"]
    assert calls >= begun
    tail = knobs | {"mag_ratios": knobs["mag_ratios"][STEPS - calls :]}
    separate = run(by_hand("FluxImg2ImgPipeline", tail, ("cond", "uncond"), steps=calls))
    mixed = run(theirs("FluxImg2ImgPipeline", tail, steps=calls))
    assert (picture == separate).all()
    assert (picture != mixed).any()
    assert told(ours).counts["steps skipped"]["cond"] == told(ours).counts["steps skipped"]["uncond"]


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline", "QwenImagePipeline"])
def test_attention_is_not_lent_from_branch_to_branch(name):
    """diffusers counts calls: with guidance in calls of its own, a layer answers for the prompt with what it gave for the negative one."""
    plain, ours = run(tiny(name)), tiny(name, **KNOBS["pab"])
    near = np.abs(run(ours) - plain).max()
    assert skipped(ours) > 0
    if name == "QwenImagePipeline":  # texts of two lengths
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(theirs(name, KNOBS["pab"]))
    else:
        assert np.abs(run(theirs(name, KNOBS["pab"])) - plain).max() > 5 * near


@pytest.mark.parametrize("other", [{}, {"height": 32, "width": 48}])
@pytest.mark.parametrize("method", ["first_block, all", "mag", "taylorseer", "pab"])
def test_after_an_interrupted_run(method, other):  # E2, E2b
    clean = run(tiny(**KNOBS[method]), **other)

    def broken(pipe, i, t, kwargs):
        if i == 5:
            raise KeyboardInterrupt
        return kwargs

    ours = tiny(**KNOBS[method])
    with pytest.raises(KeyboardInterrupt):
        run(ours, seed=1, callback_on_step_end=broken)
    assert (run(ours, **other) == clean).all()


def test_their_state_survives_an_interrupt():
    """What the test above would find in diffusers."""

    def broken(pipe, i, t, kwargs):
        if i == 5:
            raise KeyboardInterrupt
        return kwargs

    made, clean = theirs("FluxPipeline", KNOBS["first_block, all"]), run(theirs("FluxPipeline", KNOBS["first_block, all"]))
    with pytest.raises(KeyboardInterrupt):
        run(made, seed=1, callback_on_step_end=broken)
    assert (run(made) != clean).any()


def test_the_number_of_steps_is_the_runs(recwarn):  # E17
    ours = tiny(**KNOBS["mag"])
    for steps in (5, 12, 5):
        assert (
            run(ours, num_inference_steps=steps) == run(theirs("FluxPipeline", KNOBS["mag"], steps=steps), num_inference_steps=steps)
        ).all()


def test_ratios_belong_to_the_schedule():
    """A run that begins in the middle goes by the ratios of its part."""
    ours = tiny("FluxImg2ImgPipeline", method="mag", threshold=0.5, mag_ratios="flux")
    run(ours, num_inference_steps=10, strength=0.6, true_cfg_scale=1.0)
    calls = sum(told(ours).total(key) for key in ("steps computed", "steps skipped"))
    tail = nearest_interp(FLUX_MAG_RATIOS, 10)[10 - calls :].tolist()
    knobs = {"method": "mag", "threshold": 0.5, "mag_ratios": tail}
    how = {"num_inference_steps": 10, "strength": 0.6, "true_cfg_scale": 1.0}
    again = tiny("FluxImg2ImgPipeline", method="mag", threshold=0.5, mag_ratios="flux")
    assert (run(again, **how) == run(by_hand("FluxImg2ImgPipeline", knobs, ("cond",), steps=calls), **how)).all()
    assert 0 < skipped(ours) < calls < 10


def test_another_pipeline_of_the_same_denoiser_has_no_cache():  # E9
    ours = tiny(**KNOBS["first_block, all"])
    other = make("FluxImg2ImgPipeline")
    plain = run(other)
    other.pipe = FluxImg2ImgPipeline.from_pipe(ours.pipe)
    other.pipe.set_progress_bar_config(disable=True)
    run(ours)
    assert other.pipe.transformer is ours.pipe.transformer
    assert (run(other) == plain).all()


@pytest.mark.parametrize("method", ["first_block, all", "taylorseer", "pab", "sea", "faster"])
@pytest.mark.parametrize("first", ["offload", "cache"])
def test_offload_in_either_order(method, first):  # E14, E14b, E14d, E14e
    name = "WanPipeline" if method == "sea" else "CogVideoXPipeline" if method == "faster" else "FluxPipeline"
    made = tiny(name)
    if first == "offload":
        made.pipe.enable_model_cpu_offload(device="cpu")
    made.pipe = load_pipeline(made.pipe, {"diffusers_cache": KNOBS[method]})
    if first == "cache":
        made.pipe.enable_model_cpu_offload(device="cpu")
    pictures, skips = [], []
    for _ in range(3):
        pictures.append(run(made))
        skips.append(skipped(made))
    assert skips[0] > 0
    assert len(set(skips)) == 1
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == run(tiny(name, **KNOBS[method]))).all()


def test_attention_that_was_never_computed_is_not_reused():
    """FasterCache would answer a run's first call from nothing, where it begins inside the range of timesteps (image to image)."""
    unguided = {"true_cfg_scale": 1.0}
    with pytest.raises(TypeError):
        run(by_hand("FluxImg2ImgPipeline", KNOBS["faster"], ("cond",), guided=False), **unguided)
    ours = tiny("FluxImg2ImgPipeline", **KNOBS["faster"])
    run(ours, **unguided)
    assert skipped(ours) > 0


@pytest.mark.parametrize("method", ["first_block, all", "mag", "taylorseer"])
def test_runs_of_every_kind_in_a_row(method):
    """Other lengths, batches, guidance and sizes, with an interrupted run behind each."""
    runs = [
        {},
        {"num_inference_steps": 5},
        {"num_images_per_prompt": 2},
        {"true_cfg_scale": 1.0},
        {"height": 32, "width": 48},
        {"prompt": ["a", "b c"], "negative_prompt": ["x", "y"]},
        {},
    ]

    def broken(pipe, i, t, kwargs):
        if i == 2:
            raise KeyboardInterrupt
        return kwargs

    ours = tiny(**KNOBS[method])
    for kwargs in runs:
        fresh = theirs("FluxPipeline", KNOBS[method], steps=kwargs.get("num_inference_steps", STEPS))
        assert (run(ours, **kwargs) == run(fresh, **kwargs)).all()
        with pytest.raises(KeyboardInterrupt):
            run(ours, **kwargs, callback_on_step_end=broken)


@pytest.mark.parametrize("method", ["first_block, all", "mag", "pab"])
def test_two_pipelines_on_one_denoiser_at_once(method):
    """The second one runs in a callback of the first one's run."""
    a, b = tiny(**KNOBS[method]), make("FluxImg2ImgPipeline")
    b.pipe = FluxImg2ImgPipeline.from_pipe(a.pipe)
    b.pipe.scheduler = type(a.pipe.scheduler).from_config(a.pipe.scheduler.config)
    b.pipe.set_progress_bar_config(disable=True)
    b.pipe = load_pipeline(b.pipe, {"diffusers_cache": KNOBS["taylorseer"]})
    alone, inside = (run(a), run(b)), []

    def within(pipe, i, t, kwargs):
        if i == 4:
            inside.append(run(b))
        return kwargs

    assert (run(a, callback_on_step_end=within) == alone[0]).all()
    assert (inside[0] == alone[1]).all()


def test_branches_share_their_hooks(monkeypatch):
    """They take a millisecond to be made; where diffusers keeps no state for each branch, each has hooks of its own."""
    made_for = []
    monkeypatch.setattr("diffgraft_diffusers_cache.made", lambda *a: (made_for.append(1), made(*a))[1])
    for method, times in (("first_block, all", 1), ("taylorseer", 1), ("pab", 2)):
        made_for.clear()
        run(tiny(**KNOBS[method]))
        assert len(made_for) == times


def test_what_branches_share_is_counted_once():
    """First Block Cache holds the same for each of two branches, so guidance doubles it."""
    ours, sizes = tiny(**KNOBS["first_block, all"]), []
    for scale in (1.0, 3.0):
        run(ours, true_cfg_scale=scale, negative_prompt="a red apple on the left")
        sizes.append(told(ours).state_bytes)
    assert sizes[0] > 0
    assert sizes[1] - sizes[0] < 1.1 * sizes[0]


def test_in_one_whole_graph_it_is_refused():
    """diffusers' hooks end in an error of dynamo's there."""
    ours = tiny(**KNOBS["first_block"])
    ours.pipe.transformer.compile(fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="fullgraph"):
        run(ours)


# no trace ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["first_block, all", "mag", "taylorseer", "taylorseer, lite", "pab"])
def test_nothing_is_written_to_the_model(method):
    made = tiny()
    plain = run(made)  # the pipeline itself leaves a registry on the denoiser
    before = {path: dict(vars(module)) for path, module in made.pipe.transformer.named_modules()}
    load_pipeline(made.pipe, {"diffusers_cache": KNOBS[method]})
    run(made)
    seen = {path: dict(vars(module)) for path, module in made.pipe.transformer.named_modules()}
    assert {path: list(names) for path, names in seen.items()} == {path: list(names) for path, names in before.items()}
    assert not made.pipe.transformer._diffusers_hook.hooks
    assert not made.pipe.transformer.is_cache_enabled
    made.pipe.plugins.clear()
    assert (run(made) == plain).all()


def test_a_shadow_has_no_weights_and_touches_nothing():
    model = tiny().pipe.transformer
    twin = shadow_of(model)
    assert [path for path, _ in twin.named_modules()] == [path for path, _ in model.named_modules()]
    assert all(type(a) is type(b) and a is not b for a, b in zip(twin.modules(), model.modules(), strict=True))
    assert not list(twin.parameters())
    assert list(model.parameters())
    hooks = hooks_for("taylorseer", model, config_for(DiffusersCacheConfig(method="taylorseer"), Cache(), None))
    assert all(isinstance(hook, ModelHook) for group in hooks.values() for hook in group)
    assert not any(hasattr(module, "_diffusers_hook") or "forward" in vars(module) for module in model.modules())


# beside others ----------------------------------------------------------------------------------------------------------------------------


def test_one_cache_at_a_time():
    made = tiny()
    made.pipe.transformer.enable_cache(their_config(made, KNOBS["first_block"]))
    with pytest.raises(Conflict, match="FirstBlockCache"):
        load_pipeline(made.pipe, {"diffusers_cache": KNOBS["first_block"]})
    with pytest.raises(Conflict, match="both skip blocks"):
        load_pipeline(tiny().pipe, [Skips(), ("diffusers_cache", KNOBS["mag"])])
    load_pipeline(tiny().pipe, [Skips(), ("diffusers_cache", {"method": "off"})])


class Skips(Plugin):
    """Says that it skips blocks."""

    name = "skips"
    paper = Paper("none", "0000.00000", "says so")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects(skips=frozenset({"blocks"}))

    def denoise(self, call, next):
        return next(call)


class Asks(Plugin):
    """Asks the denoiser twice in every call, and throws away the first answer."""

    name = "asks"
    paper = Paper("none", "0000.00000", "asks twice")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    Config = PluginConfig

    def denoise(self, call, next):
        next(call)
        return next(call)


@pytest.mark.parametrize("method", ["mag", "taylorseer", "pab", "first_block"])
def test_a_call_that_is_asked_twice_is_one_step(method):
    """Whether the other plugin stands outside or inside: what is asked again is computed, and counts as no step."""
    alone = tiny(**KNOBS[method])
    run(alone)
    for order in ([Asks(), ("diffusers_cache", KNOBS[method])], [("diffusers_cache", KNOBS[method]), Asks()]):
        made = tiny()
        load_pipeline(made.pipe, order)
        run(made)
        counts, expected = told(made).counts, told(alone).counts
        assert sum(counts["steps computed"].values()) + skipped(made) == 2 * STEPS
        if method != "first_block":  # that one decides by values
            assert counts["steps skipped"] == expected["steps skipped"]


def test_other_calls_of_a_step_are_none_of_it():
    """SD3's skip-layer guidance asks once more, with other layers left out."""
    extra = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for method in ("mag", "pab"):
        plain, with_extra = tiny("StableDiffusion3Pipeline", **KNOBS[method]), tiny("StableDiffusion3Pipeline", **KNOBS[method])
        run(plain)
        run(with_extra, **extra)
        assert told(with_extra).counts["steps skipped"] == told(plain).counts["steps skipped"]


def test_two_denoisers_have_a_cache_each():
    ours = tiny("WanPipeline@2.2", **KNOBS["first_block, all"])
    run(ours)
    assert told(ours).counts["steps computed"] == {"cond": 2, "uncond": 2}  # the first call of each


def test_a_denoiser_that_begins_in_mid_run_goes_by_the_runs_ratios():
    """Wan 2.2's second one is where the schedule is; ratios of 1 before, and such as never skip from there on."""
    ratios = (1.0,) * 2 + (3.0,) * (STEPS - 2)
    ours = tiny("WanPipeline@2.2", method="mag", threshold=0.5, retention_ratio=0.0, mag_ratios=ratios)
    run(ours)
    second = {"steps skipped": 1, "steps computed": STEPS - 1}  # only the first denoiser's second call
    assert {key: told(ours).counts[key]["cond"] for key in second} == second


# report -----------------------------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_skipped():
    ours = tiny(**KNOBS["first_block, all"])
    run(ours)
    counts = told(ours).counts
    assert counts["steps skipped"] == {"cond": STEPS - 1, "uncond": STEPS - 1}
    assert counts["blocks skipped"]["cond"] == 3 * (STEPS - 1)  # all but the first of four
    assert "steps skipped 7 of 8 (88%) in cond" in str(told(ours))
    assert ours.pipe.plugins.report().forwards == {"cond": STEPS, "uncond": STEPS}


def test_lite_mode_does_not_run_the_denoiser():
    ours = tiny(**KNOBS["taylorseer, lite"])
    run(ours)
    assert ours.pipe.plugins.report().forwards == {"cond": 4, "uncond": 4}  # 0, 1, 2 and 4: forwards that were really run


def test_half_a_batch_where_the_other_half_is_not_needed():
    ours = tiny("CogVideoXPipeline", **KNOBS["faster"])
    run(ours)
    assert told(ours).counts["uncond skipped"] == {"both": 6}  # all but the first and the sixth


def test_ratios_are_measured():
    ours = tiny(method="mag", mag_ratios="measure")
    assert (run(ours) == run(tiny())).all()
    records = told(ours).records
    made = tiny()
    made.pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS + 1))
    state = {}

    def look(pipe, i, t, kwargs):
        manager = pipe.transformer.transformer_blocks[0]._diffusers_hook.hooks["mag_cache_leader_block_hook"].state_manager
        state.update({name: list(each.calibration_ratios) for name, each in manager._state_cache.items()})
        return kwargs

    run(made, callback_on_step_end=look)
    for branch in ("cond", "uncond"):
        assert records[f"mag_ratios.{branch}"].tolist() == pytest.approx(state[branch], rel=1e-6)
    ratios = {branch: tuple(records[f"mag_ratios.{branch}"].tolist()) for branch in ("cond", "uncond")}
    again = tiny(method="mag", threshold=10.0, max_skip_steps=3, mag_ratios=ratios)
    run(again)
    assert skipped(again) > 0
    with pytest.raises(ConfigError, match="'uncond' too"):
        run(tiny(method="mag", mag_ratios={"cond": (1.0,)}))


# refused ----------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_runs(made):
    """The denoiser is not asked."""
    calls = []
    handle = made.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    yield
    handle.remove()
    assert not calls or made.pipe.plugins.report().forwards == {}


@pytest.mark.parametrize(
    ("name", "knobs", "error", "words"),
    [
        ("WanPipeline", {"method": "taylorseer"}, ConfigError, r"cache_identifiers = None.*blocks\.\*\.attn1"),
        ("FluxPipeline", {"method": "taylorseer", "cache_identifiers": ("nothing",)}, ConfigError, "matches no layer"),
        ("FluxPipeline", {"method": "taylorseer", "cache_identifiers": (".*ff",)}, Unsupported, "no hook reaches it"),
        ("DiTPipeline", {"method": "taylorseer", "use_lite_mode": True}, Unsupported, "use_lite_mode = True"),
        ("FluxPipeline", {"method": "sea"}, Unsupported, "raw_vision_callback = None"),
        ("CogVideoXPipeline", {"method": "sea"}, Unsupported, "is no flow"),
        ("StableDiffusionPipeline", {}, Unsupported, "sd"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(name, knobs, error, words):
    with pytest.raises(error, match=words):
        tiny(name, method=knobs.pop("method", "first_block"), **knobs)


@pytest.mark.parametrize(
    ("name", "knobs", "kwargs", "error", "words"),
    [
        ("FluxPipeline", {"method": "taylorseer"}, {"num_inference_steps": 3}, ConfigError, "disable_cache_before_step = 3.*3 times"),
        ("FluxPipeline", KNOBS["mag"] | {"retention_ratio": 1.0}, {}, ConfigError, r"retention_ratio = 1.0.*first 8"),
        ("WanPipeline", {"method": "sea"}, {"num_inference_steps": 2}, ConfigError, "retention_steps = 1.*all 2 calls"),
        ("FluxPipeline", {"method": "pab", "spatial_attention_timestep_skip_range": (2, 3)}, {}, ConfigError, r"\(2.0, 3.0\)"),
        ("FluxPipeline", KNOBS["faster"], {}, Unsupported, "in another way.*pab"),
        ("DiTPipeline", KNOBS["faster"], {}, Unsupported, "cond, uncond"),
        ("LTXPipeline", KNOBS["faster"], {}, Unsupported, "packed into tokens"),
        ("FluxImg2ImgPipeline", {"method": "mag", "mag_ratios": "measure"}, {}, Unsupported, "begins in the middle"),
    ],
)
def test_a_run_that_cannot_be_served_is_refused_before_it_computes(name, knobs, kwargs, error, words):
    made = tiny(name, **knobs)
    with pytest.raises(error, match=words):
        run(made, **kwargs)
    assert made.pipe.plugins.report().forwards == {}


def test_a_block_that_diffusers_does_not_know():
    class Other(FluxTransformerBlock):
        pass

    made = tiny()
    made.pipe.transformer.transformer_blocks[0].__class__ = Other
    with pytest.raises(Unsupported, match=r"first_block.*FluxPipeline.*not registered.*pab"):
        load_pipeline(made.pipe, {"diffusers_cache": {}})


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"method": "pab", "threshold": 0.1}, "threshold = 0.1 is a knob of method 'first_block' or 'mag' or 'sea'.*'pab' has none"),
        ({"method": "mag"}, "mag_ratios = None.*measure"),
        ({"method": "mag", "mag_ratios": (1.0, 0.0)}, "above 0"),
        ({"method": "teacache"}, "method"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": "0.1"}, "is no number"),
        ({"method": "taylorseer", "disable_cache_before_step": 0}, "disable_cache_before_step"),
        ({"method": "taylorseer", "cache_identifiers": ("(",)}, "no regular expression"),
        ({"method": "pab", "spatial_attention_timestep_skip_range": (800, 100)}, "lower"),
        ({"method": "faster", "attention_weight_callback": 0.3}, "give a function"),
        ({"method": "faster", "attention_weight_callback": lambda: 0.3}, "cannot be"),
        ({"num_inference_steps": 28}, "unknown knob"),
    ],
)
def test_bad_knobs(knobs, words):
    with pytest.raises(ConfigError, match=words):
        DiffusersCache(**knobs)


# what diffusers has -----------------------------------------------------------------------------------------------------------------------


def test_every_cache_of_diffusers_is_a_method():
    """A new one in diffusers shows here."""
    known = {config.__name__ for config in CONFIGS.values()} | {"TextKVCacheConfig"}
    source = inspect.getsource(CacheMixin.enable_cache)
    assert {word for word in source.replace("(", " ").replace(")", " ").replace(",", " ").split() if word.endswith("CacheConfig")} <= known
    assert "PyramidAttentionBroadcastConfig" in source


@pytest.mark.parametrize("method", CONFIGS)
def test_every_option_is_a_knob(method):
    names = {field.name for field in fields(CONFIGS[method]) if not field.name.startswith("_")}
    assert names - TOLD == knobs_of(method) <= set(DiffusersCacheConfig.model_fields)
    assert {name for name in names if name.endswith("timestep_skip_range")} <= set(SKIPS)
    assert {name for name in names if name.endswith("_range") and "timestep" in name} <= set(RANGES)


def test_options_reach_the_config():
    knobs = DiffusersCacheConfig(method="faster", alpha_low_frequency=1.3, attention_weight_callback=lambda module: 0.2)
    family = type("F", (), {"latents": "bfchw"})
    config = config_for(knobs, Cache(), family, branches=2)
    assert config.alpha_low_frequency == 1.3
    assert config.attention_weight_callback(None) == 0.2
    assert config.tensor_format == "BFCHW"
    assert not config.is_guidance_distilled
    assert config_for(DiffusersCacheConfig(method="pab"), Cache(), family).spatial_attention_block_skip_range == 2
    assert issubclass(FluxTransformer2DModel, CacheMixin)


def test_packed_latents_by_a_function_of_the_users():
    def unpacked(model, args, kwargs):
        return [x.t()[:, None, :, None] for x in kwargs["hidden_states"]]

    ours = tiny(method="sea", threshold=3.0, raw_vision_callback=unpacked)
    run(ours)
    assert skipped(ours) > 0


def test_layers_compare_numbers():
    """The timestep that PAB asks for in every layer is a number by then, read once a run: a tensor would wait for the device each time."""
    times = []
    ours = tiny(**KNOBS["pab"])
    cache = Cache()
    callback = config_for(ours.pipe.plugins["diffusers_cache"].config, cache, None).current_timestep_callback
    for time in (999.0, 998.0):
        cache.begin(time)
        times.append(callback())
    assert times == [float("inf"), 998.0]  # nothing is there to be reused in the first call
    reads = []
    inner = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(1), inner(self))[1])
        run(ours)
    assert len(reads) <= 3


@pytest.mark.parametrize("name", ["ChromaPipeline", "Flux2KleinPipeline"])
@pytest.mark.parametrize("method", ["first_block", "pab"])
def test_a_seam_in_the_stream_is_refused(name, method):
    with pytest.raises(Unsupported, match=rf"{name} puts the text into the stream before single_transformer_blocks\.0"):
        load_pipeline(make(name).pipe, plugins={"diffusers_cache": {"method": method}})


@pytest.mark.parametrize(("name", "method"), [("FluxPipeline", "first_block, all"), ("WanPipeline", "sea")])
def test_ranks_decide_together(name, method):
    """Whatever this rank sees, what was agreed on is done: here that every step is computed."""
    ours = tiny(name, **KNOBS[method])
    run(ours)
    assert skipped(ours) > 0
    asked = []
    with answered(lambda value: (asked.append(value), True)[1]):
        run(ours)
    assert skipped(ours) == 0
    assert asked


JOINED_NOWHERE = [
    family
    for family in registry.families().values()
    if family.tiny and family.is_among(("dits",)) and all(group.joined == "none" for group in family.blocks)
]


@pytest.mark.parametrize("family", JOINED_NOWHERE, ids=lambda family: family.name)
def test_the_unknown_families_are_those_that_diffusers_does_not_know(family):
    """It names them, because a claim is made of a family without a model; here a model of each is asked."""
    made = make(family.pipelines[0])
    known = contextlib.nullcontext() if DiffusersCache.claims(family) else pytest.raises(Unsupported, match="diffusers cannot put it on")
    with known:
        load_pipeline(made.pipe, plugins={"diffusers_cache": KNOBS["first_block, all"]})
