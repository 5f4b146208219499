"""Whole runs against a sampling loop of the test's own, and beside other plugins."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, PluginConfig, Unsupported, load_pipeline
from diffgraft_diffusers_guider import DiffusersGuider
from diffgraft_diffusers_guider.guiders import layers_of
from diffgraft_pipelines.tiny import make
from diffusers import guiders
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig, _apply_smoothed_energy_guidance_hook

PROMPTS = ["a red apple", "a blue dog on a mat"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LAYER = {"indices": [0], "fqn": "up_blocks.1.attentions.1.transformer_blocks"}
ATTENTION = {**LAYER, "skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
MOMENTUM = {"eta": 0.2, "adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 2.5}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "interval": ("ClassifierFreeGuidance", {"start": 0.2, "stop": 0.8, "guidance_rescale": 0.7}),
    "apg": ("AdaptiveProjectedGuidance", MOMENTUM),
    "apg_original": ("AdaptiveProjectedGuidance", {**MOMENTUM, "use_original_formulation": True, "guidance_rescale": 0.3}),
    "apg_axes": ("AdaptiveProjectedGuidance", {"eta": 0.2, "adaptive_projected_guidance_norm_dim": [-1, -2]}),
    "apg_mix": ("AdaptiveProjectedMixGuidance", {"adaptive_projected_guidance_start_step": 1}),
    "zero": ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2, "stop": 0.7}),
    "tcfg": ("TangentialClassifierFreeGuidance", {"start": 0.4, "use_original_formulation": True}),
    "skip": ("SkipLayerGuidance", {**ALWAYS, "skip_layer_config": LAYER}),
    "skip_alone": ("SkipLayerGuidance", {**ALWAYS, "guidance_scale": 1.0, "skip_layer_config": {**LAYER, "skip_attention": False}}),
    "pag": ("PerturbedAttentionGuidance", {"perturbed_guidance_stop": 1.0, "perturbed_guidance_config": ATTENTION}),
    "seg": ("SmoothedEnergyGuidance", {"start": 0.5, "seg_guidance_config": LAYER}),
    "seg_mean": ("SmoothedEnergyGuidance", {"seg_blur_sigma": 5.0, "seg_guidance_config": LAYER}),
    "auto": ("AutoGuidance", {"stop": 0.7, "auto_guidance_config": LAYER}),
}
SOLVERS: dict[str, Any] = {
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "euler_a": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "pndm": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
}


def pipeline(solver: str = "ddim") -> Any:
    pipe = make("StableDiffusionPipeline").pipe
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SOLVERS[solver]()
    return pipe


def sampled(pipe: Any, steps: int = 5, **more: Any) -> list[torch.Tensor]:
    """The latents after each call of the solver."""
    found: list[torch.Tensor] = []

    def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors["latents"].clone())
        return {}

    arguments = {"negative_prompt": ["blurry"] * 2, "guidance_scale": 5.0, "height": 64, "width": 64, "output_type": "latent", **more}
    pipe(PROMPTS, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), callback_on_step_end=keep, **arguments)
    return found


@contextmanager
def layers_perturbed(unet: Any, guider: Any) -> Iterator[None]:
    """diffusers' hooks on the layers of a guider, put on one by one."""
    for number, config in enumerate(layers_of(guider)):
        if isinstance(config, SmoothedEnergyGuidanceConfig):
            _apply_smoothed_energy_guidance_hook(unet, config, guider.seg_blur_sigma, name=f"by_hand_{number}")
        else:
            _apply_layer_skip_hook(unet, config, name=f"by_hand_{number}")
    yield
    for number, _ in enumerate(layers_of(guider)):
        HookRegistry.check_if_exists_or_initialize(unet).remove_hook(f"by_hand_{number}", recurse=True)


@torch.no_grad()
def by_own_loop(pipe: Any, guider: Any, steps: int = 5) -> list[torch.Tensor]:
    """The same latents: a guider of diffusers in a plain loop, one forward for each prediction that it wants.

    Both calls of a solver in one step (and PNDM's second, which repeats its first) are of one step, over which APG keeps what it summed up.
    """
    scheduler, generator = pipe.scheduler, torch.Generator().manual_seed(0)
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["blurry"] * 2)
    scheduler.set_timesteps(steps)
    x = torch.randn((2, 4, 8, 8), generator=generator) * scheduler.init_noise_sigma
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    found = []
    for i, t in enumerate(scheduler.timesteps):
        index = max(i - 1, 0) if isinstance(scheduler, diffusers.PNDMScheduler) else i // scheduler.order
        guider.set_state(step=index, num_inference_steps=steps, timestep=t)
        summed = getattr(guider, "momentum_buffer", None)
        batches = guider.prepare_inputs({})
        if i and not index and summed is not None:
            guider.momentum_buffer = summed
        z = scheduler.scale_model_input(x, t)
        for batch in batches:
            name = batch.as_dict()[guider._identifier_key]
            text = negative if name == "pred_uncond" else positive
            perturb = name in ("pred_cond_skip", "pred_cond_seg") or (name == "pred_uncond" and isinstance(guider, guiders.AutoGuidance))
            with layers_perturbed(pipe.unet, guider) if perturb else nullcontext():
                batch.noise_pred = pipe.unet(z, t, encoder_hidden_states=text, return_dict=False)[0]
        x = scheduler.step(guider(batches).pred, t, x, return_dict=False, **more)[0]
        found.append(x.clone())
    return found


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("solver", ["ddim", "pndm"])
def test_every_guider(solver, run):
    compare(solver, run)


@pytest.mark.parametrize("run", ["interval", "apg", "skip"])
@pytest.mark.parametrize("solver", ["euler_a", "heun"])
def test_more_solvers(solver, run):
    compare(solver, run)


def compare(solver: str, run: str) -> None:
    pipe, (name, options) = pipeline(solver), RUNS[run]
    options = {"guidance_scale": 5.0, **options}
    load_pipeline(pipe, {"diffusers_guider": {"guider": name, "options": options}})
    found = sampled(pipe)
    pipe.plugins.clear()
    configs = {k: SmoothedEnergyGuidanceConfig(**v) if k.startswith("seg_") else v for k, v in options.items() if k.endswith("_config")}
    expected = by_own_loop(pipe, getattr(guiders, name)(**options | configs))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["WanPipeline@2.2", "StableDiffusionXLImg2ImgPipeline"])
def test_two_denoisers_and_a_run_that_begins_in_the_middle(name):
    """The modular Wan 2.2 has a guider for each denoiser, the second of which never begins to sum up; one object for both does, as here."""
    wan, made = name.startswith("Wan"), make(name)
    options = {"guidance_scale": 4.0, **MOMENTUM}
    guider = guiders.AdaptiveProjectedGuidance(**options)
    folder, blocks = ("wan", "Wan22Blocks") if wan else ("stable_diffusion_xl", "StableDiffusionXLAutoBlocks")
    theirs = getattr(importlib.import_module(f"diffusers.modular_pipelines.{folder}"), blocks)().init_pipeline()
    theirs.update_components(**{k: v for k, v in made.pipe.components.items() if v is not None and k in theirs._component_specs})
    theirs.update_components(guider=guider, **({"guider_2": guider} if wan else {}))
    theirs.set_progress_bar_config(disable=True)
    given = {k: v for k, v in made.kwargs.items() if "scale" not in k and k not in ("output_type", "num_inference_steps")}
    arguments = {**given, "num_inference_steps": 4}
    form = "np" if wan else "latent"  # the modular Wan knows no latents
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(0), output_type=form, output="latents")
    load_pipeline(made.pipe, {"diffusers_guider": {"guider": "AdaptiveProjectedGuidance", "options": options}})
    scales = {"guidance_scale": 4.0, **({"guidance_scale_2": 4.0} if wan else {})}
    found = made.pipe(**arguments, **scales, generator=torch.Generator().manual_seed(0), output_type="latent")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


# what went wrong without a word -----------------------------------------------------------------------------------------------------------


def test_zero_init_and_rescaling_are_no_zero_by_zero():
    pipe = pipeline()
    options = {"zero_init_steps": 1, "guidance_rescale": 0.7}
    load_pipeline(pipe, {"diffusers_guider": {"guider": "ClassifierFreeZeroStarGuidance", "options": options}})
    found = sampled(pipe)
    assert all(bool(x.isfinite().all()) for x in found)
    alone = guiders.ClassifierFreeZeroStarGuidance(**options)
    alone.set_state(0, 5, None)
    assert alone.forward(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)).pred.isnan().all(), "diffusers alone"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seg_blur_threshold_inf": 5.0}, "seg_blur_threshold_inf = 5.0: diffusers 0.42.1 reads it nowhere"),
        ({"seg_blur_sigma": 0.0}, "seg_blur_sigma = 0.0: above 0"),
    ],
)
def test_blurs_that_are_none(options, says):
    with pytest.raises(ConfigError, match=says):
        DiffusersGuider(guider="SmoothedEnergyGuidance", options={"seg_guidance_config": LAYER, **options})


def test_a_sigma_that_is_not_looked_at_is_reported():
    pipe = pipeline()
    options = {"seg_guidance_config": LAYER, "seg_blur_sigma": 5.0}
    load_pipeline(pipe, {"diffusers_guider": {"guider": "SmoothedEnergyGuidance", "options": options}})
    five = sampled(pipe)
    assert "blurs by the mean of all queries" in str(pipe.plugins.report())
    pipe.plugins.configure("diffusers_guider", options={**options, "seg_blur_sigma": 500.0})
    assert all(torch.equal(a, b) for a, b in zip(five, sampled(pipe), strict=True))


@pytest.mark.parametrize(
    ("guider", "options", "says"),
    [
        ("SkipLayerGuidance", {"skip_layer_config": LAYER}, "no layer was perturbed"),
        ("ClassifierFreeGuidance", {"start": 0.9, "stop": 0.95}, "no step was guided"),
        ("AutoGuidance", {"auto_guidance_config": LAYER, "start": 0.9, "stop": 0.95}, "no layer was perturbed"),
        ("SkipLayerGuidance", {"skip_layer_config": LAYER, **ALWAYS, "guidance_scale": 1.0}, None),
    ],
)
def test_an_interval_that_holds_no_step_is_reported(guider, options, says):
    pipe = pipeline()
    load_pipeline(pipe, {"diffusers_guider": {"guider": guider, "options": options}})
    sampled(pipe)
    report = str(pipe.plugins.report())
    assert says in report if says else "widen the interval" not in report


@pytest.mark.parametrize("axes", [7, 0, -4, [], [1, -3]])
def test_axes_that_predictions_have_not(axes):
    with pytest.raises(Unsupported, match="predictions here have 4 axes"):
        load_pipeline(
            pipeline(),
            {"diffusers_guider": {"guider": "AdaptiveProjectedGuidance", "options": {"adaptive_projected_guidance_norm_dim": axes}}},
        )


# beside others ----------------------------------------------------------------------------------------------------------------------------


class OnlyCond(Plugin):
    """The conditional prediction outside of steps 1 to 3, by the plainest of means."""

    name = "only_cond"
    paper = Paper("", "", "")
    families = ("*",)
    Config = PluginConfig
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"prediction"}))

    def guide(self, call: Any, next: Any) -> Any:
        return next(call) if 1 <= call.step.index <= 3 else call.cond


@pytest.mark.parametrize("other", ["deepcache", "faster_diffusion", "nag"])
def test_an_interval_beside_what_works_inside_the_denoiser(other):
    """A cache keeps blocks' outputs for both branches, so a step without the unconditional one asks both all the same."""
    pytest.importorskip(f"diffgraft_{other}")
    pipe, knobs = pipeline(), {"guider": "ClassifierFreeGuidance", "options": {"start": 0.2, "stop": 0.8}}
    pipe = load_pipeline(pipe, [other, OnlyCond()])
    expected = sampled(pipe)
    for specs in ({"diffusers_guider": knobs, other: {}}, {other: {}, "diffusers_guider": knobs}):
        pipe.plugins.clear()
        load_pipeline(pipe, specs)
        found = sampled(pipe)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), msg=lambda m, s=specs: f"{list(s)}: {m}"
            )


def test_perturbed_layers_want_the_outer_place():
    pytest.importorskip("diffgraft_nag")
    knobs = {"guider": "SkipLayerGuidance", "options": {**ALWAYS, "skip_layer_config": {**LAYER, "dropout": 0.0}}}
    pipe = load_pipeline(pipeline(), {"nag": {}, "diffusers_guider": knobs})
    with pytest.raises(Unsupported, match="put diffusers_guider before nag"):
        sampled(pipe)
    pipe.plugins.clear()
    plain = sampled(load_pipeline(pipe, ["nag"]))
    pipe.plugins.clear()
    load_pipeline(pipe, {"diffusers_guider": knobs, "nag": {}})
    for ours, theirs in zip(sampled(pipe), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), msg="nothing dropped is nothing perturbed")
