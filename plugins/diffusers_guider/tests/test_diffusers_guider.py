"""The guiders of diffusers in standard pipelines: against diffusers' modular pipelines, against the guider by hand, and without trace."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffgraft import ConfigError, Effects, Paper, Plugin, PluginConfig, Unsupported, load_pipeline
from diffgraft_diffusers_guider import DiffusersGuider
from diffgraft_diffusers_guider.guiders import NAMES, NOT_HERE, build
from diffgraft_pipelines.tiny import make
from diffusers import guiders
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip

MODULAR = {
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXLAutoBlocks"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3AutoBlocks"),
    "WanPipeline": ("wan", "WanBlocks"),
    "QwenImagePipeline": ("qwenimage", "QwenImageAutoBlocks"),
    "LTXPipeline": ("ltx", "LTXAutoBlocks"),
}
PATHS = {"StableDiffusionPipeline": "down_blocks.0.attentions.0.transformer_blocks", "WanPipeline": "blocks"}
PATHS |= {"StableDiffusionXLPipeline": "down_blocks.1.attentions.0.transformer_blocks"}
PLAIN: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 1},
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 0},
    "TangentialClassifierFreeGuidance": {"guidance_rescale": 0.5},
}
WORKS = {  # what diffusers 0.42.1 can perturb in which family
    "StableDiffusionPipeline": "skip attention pag seg auto dropout",
    "StableDiffusionXLPipeline": "skip attention pag seg auto dropout",
    "PixArtSigmaPipeline": "skip attention pag seg auto dropout",
    "DiTPipeline": "skip attention pag seg auto dropout",
    "StableDiffusion3Pipeline": "feed seg",
    "FluxPipeline": "feed",
    "ChromaPipeline": "feed",
    "QwenImagePipeline": "feed pag seg",
    "WanPipeline": "skip feed seg auto dropout",
    "LTXPipeline": "skip feed auto dropout",
    "CogVideoXPipeline": "skip feed seg auto",
}


def layers(kind: str, name: str) -> dict[str, Any]:
    """The knobs of one guider that perturbs layer 0."""
    one = {"indices": [0], "fqn": PATHS.get(name, "transformer_blocks")}
    guider, options = {
        "skip": ("SkipLayerGuidance", {"skip_layer_config": one, "skip_layer_guidance_stop": 1.0}),
        "attention": ("SkipLayerGuidance", {"skip_layer_config": {**one, "skip_ff": False}, "skip_layer_guidance_stop": 1.0}),
        "feed": ("SkipLayerGuidance", {"skip_layer_config": {**one, "skip_attention": False}, "skip_layer_guidance_stop": 1.0}),
        "pag": ("PerturbedAttentionGuidance", {"perturbed_guidance_config": one, "perturbed_guidance_stop": 1.0}),
        "seg": ("SmoothedEnergyGuidance", {"seg_guidance_config": one}),
        "auto": ("AutoGuidance", {"auto_guidance_config": one}),
        "dropout": ("AutoGuidance", {"auto_guidance_config": {**one, "dropout": 0.2}}),
    }[kind]
    return {"guider": guider, "options": options}


class Tiny:
    """A tiny pipeline that is called alike again and again."""

    def __init__(self, name: str) -> None:
        made = make(name)
        self.name, self.pipe = name, made.pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {k: v for k, v in made.kwargs.items() if k not in ("num_inference_steps", "output_type", "generator")}
        self.denoiser = getattr(self.pipe, "unet", None) or self.pipe.transformer

    def __call__(self, steps: int = 4, **more: Any) -> torch.Tensor:
        form = "np" if self.name == "DiTPipeline" else "latent"
        arguments = {"output_type": form, "generator": torch.Generator().manual_seed(0), **self.call, **more}
        return torch.as_tensor(self.pipe(num_inference_steps=steps, **arguments)[0])

    def graft(self, guider: Any, options: dict[str, Any] | None = None, **knobs: Any) -> None:
        if "plugins" in vars(self.pipe) or hasattr(self.pipe, "plugins"):
            self.pipe.plugins.clear()
        load_pipeline(self.pipe, plugins={"diffusers_guider": {"guider": guider, **({"options": options} if options else {}), **knobs}})

    @property
    def report(self) -> Any:
        return self.pipe.plugins.report()

    def trace(self) -> list[Any]:
        """Where diffusers' hooks have left something."""
        return [
            (name, key, len(module.__dict__[key].hooks) if key == "_diffusers_hook" else 0)
            for name, module in self.denoiser.named_modules()
            for key in ("_diffusers_hook", "forward")
            if key in module.__dict__
        ]


class Watch(Plugin):
    """Keeps the branches and what the plugin outside it makes of them."""

    name = "watch"
    paper = Paper("", "", "")
    families = ("*",)
    Config = PluginConfig
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects()

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[Any] = []
        self.used: list[torch.Tensor] = []

    def guide(self, call: Any, next: Any) -> Any:
        self.branches.append((call.cond.clone(), call.uncond.clone(), call.step.index, call.step.total))
        return next(call)

    def step(self, call: Any, next: Any) -> Any:
        self.used.append(call.model_output.clone())
        return next(call)


# against diffusers ------------------------------------------------------------------------------------------------------------------------


def modular(tiny: Tiny) -> Any:
    """diffusers' modular pipeline of the same parts."""
    folder, name = MODULAR[tiny.name]
    pipe = getattr(importlib.import_module(f"diffusers.modular_pipelines.{folder}"), name)().init_pipeline()
    pipe.update_components(**{k: v for k, v in tiny.pipe.components.items() if v is not None and k in pipe._component_specs})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_modular(tiny: Tiny, pipe: Any, guider: Any) -> torch.Tensor:
    """Its result, and the denoiser as it was before: diffusers leaves registries behind."""
    pipe.update_components(guider=guider)
    arguments = {k: v for k, v in tiny.call.items() if "scale" not in k}
    own = tiny.name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
    form, output = ("latent" if own else "np"), ("videos" if tiny.name in ("WanPipeline", "LTXPipeline") else "images")
    arguments |= {"output_type": form, "generator": torch.Generator().manual_seed(0), "num_inference_steps": 4}
    if tiny.name == "WanPipeline":  # the modular one takes the VAE's scale to be another
        arguments |= {k: arguments[k] * pipe.vae_scale_factor_spatial // tiny.pipe.vae_scale_factor_spatial for k in ("height", "width")}
    try:
        return torch.as_tensor(pipe(**arguments, output="latents" if own else output))
    finally:
        for module in tiny.denoiser.modules():
            module.__dict__.pop("_diffusers_hook", None)
            module.__dict__.pop("forward", None)


@pytest.mark.parametrize("name", sorted(MODULAR))
def test_a_standard_pipeline_gives_what_the_modular_one_gives(name):
    tiny = Tiny(name)
    theirs, scale = modular(tiny), tiny.call.get("true_cfg_scale", tiny.call.get("guidance_scale"))
    wanted = {g: (g, {**options, "guidance_scale": scale}) for g, options in PLAIN.items() if g != "AdaptiveProjectedMixGuidance"}
    wanted["interval"] = ("ClassifierFreeGuidance", {"guidance_scale": scale, "start": 0.25, "stop": 0.75})
    for kind in {"skip", "auto", "pag"} & set(WORKS[name].split()):
        knobs = layers(kind, name)
        wanted[kind] = (knobs["guider"], {**knobs["options"], "guidance_scale": scale})
    if name == "QwenImagePipeline":
        del wanted["ClassifierFreeZeroStarGuidance"]  # slower pipelines: fewer
    for what, (guider, options) in wanted.items():
        expected = of_modular(tiny, theirs, getattr(guiders, guider)(**options))
        tiny.graft(guider, options)
        own = name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
        found = tiny(output_type="latent" if own else "np").reshape(expected.shape)
        torch.testing.assert_close(
            found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()) + 5e-6, msg=lambda m, w=what: f"{w}: {m}"
        )


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "DiTPipeline"])
@pytest.mark.parametrize("guider", [*PLAIN, "MagnitudeAwareGuidance"])
def test_each_step_is_the_guider_called_by_hand(name, guider):
    tiny, watch, options = Tiny(name), Watch(), {**PLAIN.get(guider, {}), "guidance_scale": 3.0}
    load_pipeline(tiny.pipe, plugins=[watch, DiffusersGuider(guider=guider, options=options)])
    tiny(steps=5)
    by_hand = getattr(guiders, guider)(**options)
    assert len(watch.branches) == 5
    for (cond, uncond, index, total), used in zip(watch.branches, watch.used, strict=True):
        by_hand.set_state(step=index, num_inference_steps=total, timestep=None)
        batches = by_hand.prepare_inputs({})
        flat = guider == "MagnitudeAwareGuidance"  # torch.norm has no three axes, which is why this guider fails on latents by itself
        for batch, prediction in zip(batches, (cond, uncond), strict=True):
            batch.noise_pred = prediction.flatten(1) if flat else prediction
        expected = by_hand(batches).pred.view_as(cond)
        assert torch.equal(used[: len(expected)], expected)


@pytest.mark.parametrize("name", [*WORKS, "StableDiffusionImg2ImgPipeline", "FluxKontextPipeline"])
def test_plain_guidance_is_the_pipelines_own_bit_for_bit(name):
    tiny = Tiny(name)
    plain = tiny()
    tiny.graft("ClassifierFreeGuidance")
    assert torch.equal(tiny(), plain)
    tiny.pipe.plugins.clear()
    assert torch.equal(tiny(), plain)


def test_mambo_against_its_equation():
    """w' = 1 + (w - 1) exp(-alpha |c - u| / |u|), whole samples; and on pictures the class alone fails in torch."""
    tiny, watch = Tiny("StableDiffusionPipeline"), Watch()
    load_pipeline(
        tiny.pipe, plugins=[watch, DiffusersGuider(guider="MagnitudeAwareGuidance", options={"guidance_scale": 4.0, "alpha": 2.0})]
    )
    tiny()
    for (c, u, _, _), used in zip(watch.branches, watch.used, strict=True):
        ratio = (c - u).double().square().sum().sqrt() / u.double().square().sum().sqrt()
        torch.testing.assert_close(used.double(), u + (1 + 3 * torch.exp(-2 * ratio)) * (c - u).double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="dim must be a 2-tuple"):
        guiders.MagnitudeAwareGuidance().forward(torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8) * 2)


# layers -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_layers_are_perturbed_or_refused(name):
    tiny = Tiny(name)
    plain, before = tiny(), tiny.trace()
    works = WORKS[name].split()
    for kind in ("skip", "attention", "feed", "pag", "seg", "auto", "dropout"):
        if kind == "feed" and "skip" in works:
            continue
        if kind not in works:
            with pytest.raises(Unsupported, match="diffusers_guider: "):
                tiny.graft(**layers(kind, name))
            assert tiny.trace() == before
            continue
        tiny.graft(**layers(kind, name))
        first = tiny()
        assert not torch.equal(first, plain), kind
        assert torch.equal(tiny(), first), f"{kind}: two runs in a row"
        assert tiny.trace() == before
        asked = tiny.report.forwards
        if kind in ("auto", "dropout"):
            assert asked == {"cond": 4, "uncond": 4}
        else:  # not in the first step, in diffusers: start < step
            assert sum(asked.values()) == sum(tiny_calls(tiny, 4)) + 3, "one forward more in each step but the first"
        tiny.pipe.plugins.clear()
        assert torch.equal(tiny(), plain), f"{kind}: after removal"


def tiny_calls(tiny: Tiny, steps: int) -> list[int]:
    return [steps] if tiny.pipe.plugins.report().forwards.get("both") else [steps, steps]


def test_an_exception_under_perturbed_layers_leaves_nothing():
    tiny = Tiny("StableDiffusionPipeline")
    plain, before = tiny(), tiny.trace()
    tiny.graft(**layers("skip", tiny.name))
    whole, block, calls = tiny(), tiny.denoiser.mid_block, []

    def fail(module: Any, arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # step 0 once, step 1 twice: under the hooks
            assert tiny.trace() != before
            raise KeyboardInterrupt

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    handle.remove()
    assert [entry for entry in tiny.trace() if entry[1] == "_diffusers_hook"] == []
    assert tiny.trace() == before
    assert torch.equal(tiny(), whole)
    tiny.pipe.plugins.clear()
    assert torch.equal(tiny(), plain)


def test_a_registry_of_somebody_else_stays():
    tiny = Tiny("StableDiffusionPipeline")
    block = tiny.denoiser.get_submodule(PATHS[tiny.name])[0]
    HookRegistry.check_if_exists_or_initialize(block)
    before, registry = tiny.trace(), block._diffusers_hook
    tiny.graft(**layers("skip", tiny.name))
    tiny()
    assert tiny.trace() == before
    assert block._diffusers_hook is registry


def test_what_diffusers_would_mix_up():
    """Why whole blocks that return a pair are refused: diffusers gives the pair back in the order of its arguments."""
    block = Tiny("FluxPipeline").denoiser.transformer_blocks
    apply_layer_skip(torch.nn.ModuleDict({"transformer_blocks": block}), LayerSkipConfig([0], "transformer_blocks"))
    picture, text = torch.zeros(1, 16, 8), torch.ones(1, 5, 8)
    first, second = block[0](hidden_states=picture, encoder_hidden_states=text)
    assert (first is picture, second is text) == (True, True), "the model takes the first for the text"


def test_seg_does_what_it_says_though_its_class_does_not_count():
    """SmoothedEnergyGuidance of diffusers 0.42.1 never puts its hooks on: in its modular pipelines it is plain guidance."""
    tiny = Tiny("StableDiffusionXLPipeline")
    knobs = layers("seg", tiny.name)
    options = {**knobs["options"], "guidance_scale": 5.0}
    theirs = of_modular(tiny, modular(tiny), guiders.SmoothedEnergyGuidance(**options | {"seg_guidance_config": seg_config(options)}))
    plain = tiny()
    torch.testing.assert_close(theirs, plain, rtol=0, atol=1e-4)
    tiny.graft(knobs["guider"], options)
    assert (tiny() - plain).abs().max() > 1e-3


def seg_config(options: dict[str, Any]) -> Any:
    from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig

    return SmoothedEnergyGuidanceConfig(**options["seg_guidance_config"])


def test_layers_alone_without_the_unconditional_half():
    """guidance_scale 1 of the guider: pred = skipped + s (cond - skipped), one forward of the condition and one perturbed."""
    tiny = Tiny("WanPipeline")
    knobs = layers("skip", tiny.name)
    tiny.graft(knobs["guider"], {**knobs["options"], "guidance_scale": 1.0})
    tiny()
    assert tiny.report.forwards == {"cond": 7}
    assert tiny.report.plugins["diffusers_guider"].counts["skipped"]


def test_layers_as_numbers():
    """diffusers' own `layers=[0]` fails in diffusers, since its configs hold a number where it looks for a list; here it works."""
    made = build("SkipLayerGuidance", {"skip_layer_guidance_layers": [0, 1]})
    assert [config.indices for config in made.skip_layer_config] == [[0], [1]]
    tiny, alone = Tiny("WanPipeline"), guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    alone._count_prepared = 2
    with pytest.raises(TypeError):
        alone.prepare_models(tiny.denoiser)
    tiny = Tiny("WanPipeline")
    tiny.graft("SkipLayerGuidance", {"skip_layer_guidance_layers": [0], "skip_layer_guidance_stop": 1.0})
    assert tiny().isfinite().all()


def test_a_dropout_draws_aside():
    tiny = Tiny("StableDiffusionPipeline")
    tiny.graft(**layers("dropout", tiny.name))
    plugin = tiny.pipe.plugins.list()[0] if callable(getattr(tiny.pipe.plugins, "list", None)) else None
    assert plugin is not None
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(tiny(), first)
    assert DiffusersGuider(**layers("dropout", tiny.name)).effects.stochastic
    assert not DiffusersGuider(**layers("auto", tiny.name)).effects.stochastic


# a run ------------------------------------------------------------------------------------------------------------------------------------


def test_outside_its_interval_the_unconditional_half_is_not_asked():
    for name, whole in (("StableDiffusionPipeline", "both"), ("FluxPipeline", "uncond")):
        tiny = Tiny(name)
        tiny.graft("ClassifierFreeGuidance", {"start": 0.25, "stop": 0.75})
        tiny(steps=8)
        asked = tiny.report.forwards
        assert asked[whole] == 4, "steps 2 to 5 of 8"
        assert asked["cond"] == (4 if whole == "both" else 8)


def test_momentum_is_fresh_in_every_run():
    tiny = Tiny("StableDiffusionPipeline")
    tiny.graft("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_momentum": 0.7})
    first = tiny()
    tiny(steps=7)
    assert torch.equal(tiny(), first)


def test_guidance_off_and_cut():
    tiny = Tiny("StableDiffusionPipeline")
    plain = tiny(guidance_scale=1.0)
    tiny.graft("TangentialClassifierFreeGuidance")
    assert torch.equal(tiny(guidance_scale=1.0), plain)
    assert "guidance was off" in str(tiny.report)

    def cut(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    tiny(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert tiny.report.forwards == {"both": 2, "cond": 2}


def test_whose_scale():
    tiny = Tiny("StableDiffusionPipeline")
    five = tiny(guidance_scale=5.0)
    tiny.graft("ClassifierFreeGuidance")
    assert torch.equal(tiny(guidance_scale=5.0), five), "without one of its own the call's holds"
    tiny.graft("ClassifierFreeGuidance", {"guidance_scale": 5.0})
    assert torch.equal(tiny(guidance_scale=2.0), five)
    assert "only switches guidance on and off" in str(tiny.report)
    tiny.graft(guiders.ClassifierFreeGuidance(guidance_scale=5.0))
    assert torch.equal(tiny(guidance_scale=2.0), five), "an object is taken as it is"


def test_a_live_guider_is_copied():
    own = guiders.AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=0.5)
    before = dict(vars(own))
    tiny = Tiny("FluxPipeline")
    tiny.graft(own)
    first = tiny()
    assert vars(own) == before
    own.guidance_scale = 9.0
    assert torch.equal(tiny(), first)


def test_a_solver_with_two_calls_a_step_counts_steps():
    tiny, watch = Tiny("StableDiffusionPipeline"), Watch()
    tiny.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    load_pipeline(tiny.pipe, plugins=[watch, DiffusersGuider(guider="ClassifierFreeZeroStarGuidance", options={"zero_init_steps": 1})])
    tiny()
    assert [bool(used.any()) for used in watch.used] == [False, False, *[True] * 5], "both calls of the first step"


def test_more_samples_and_lists_of_prompts():
    tiny = Tiny("StableDiffusionPipeline")
    tiny.graft(**layers("skip", tiny.name))
    alone = tiny()
    both = tiny(prompt=[tiny.call["prompt"], "a blue car"], negative_prompt=["blurry", "dark"], generator=generators(2))
    last_bits = 1e-5 * float(alone.abs().max())  # a batch of four is another matrix product than one of two, on every CPU another
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=last_bits)
    two = tiny(num_images_per_prompt=2, generator=generators(2))
    torch.testing.assert_close(two[:1], alone, rtol=0, atol=last_bits)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_half_precision():
    for name in ("StableDiffusionPipeline", "FluxPipeline"):
        tiny = Tiny(name)
        tiny.pipe.to(torch.bfloat16)
        for guider in ("AdaptiveProjectedGuidance", "TangentialClassifierFreeGuidance"):
            tiny.graft(guider)
            out = tiny()
            assert out.dtype == torch.bfloat16
            assert out.isfinite().all()


# bad input --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"guider": "AdaptiveProjectedGuidence"}, "did you mean 'AdaptiveProjectedGuidance'"),
        ({"guider": "LTX2Guidance"}, "LTX-2"),
        ({"guider": "ClassifierFreeGuidance", "options": {"guidance_scal": 3.0}}, "did you mean 'guidance_scale'"),
        ({"guider": "ClassifierFreeGuidance", "options": {"guidance_scale": "3"}}, "guidance_scale = '3'"),
        ({"guider": "ClassifierFreeGuidance", "options": {"guidance_scale": True}}, "guidance_scale = True"),
        ({"guider": "ClassifierFreeGuidance", "options": {"guidance_scale": float("nan")}}, "not finite"),
        ({"guider": "ClassifierFreeGuidance", "options": {"start": 1.5}}, "start"),
        ({"guider": "SkipLayerGuidance"}, "must be provided"),
        ({"guider": "SkipLayerGuidance", "options": {"skip_layer_config": {"indices": [0], "wrong": 1}}}, "wrong"),
        ({"guider": guiders.ClassifierFreeGuidance(), "options": {"start": 0.1}}, "by name"),
        ({"options": {"start": 0.1}}, "by name"),
        ({"guider": guiders.LTX2Guidance()}, "pred_cond_modality"),
        ({"guider": 3}, "guider"),
    ],
)
def test_bad_knobs(knobs, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        DiffusersGuider(**knobs)


class Own(guiders.ClassifierFreeGuidance):
    """Somebody's own formula."""

    def forward(self, pred_cond: Any, pred_uncond: Any = None) -> Any:
        return (pred_cond * 2 - pred_uncond,)


class Changing(guiders.ClassifierFreeGuidance):
    """One that changes the denoiser in a way of its own."""

    def prepare_models(self, denoiser: Any) -> None:
        raise AssertionError


def test_a_guider_of_ones_own():
    tiny = Tiny("StableDiffusionPipeline")
    two = tiny(guidance_scale=2.0)
    tiny.graft(Own())
    torch.testing.assert_close(tiny(), two, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="prepare_models"):
        DiffusersGuider(guider=Changing())


def test_all_of_diffusers_guiders_are_known():
    assert len(NAMES) == 12
    assert set(NOT_HERE) == {"LTX2Guidance"}


def test_refused_before_anything_runs():
    tiny = Tiny("StableDiffusionPipeline")
    plain = tiny()
    for config, says in (
        ({"indices": [0]}, "give a config with fqn: down_blocks"),
        ({"indices": [0], "fqn": "nowhere"}, "no list of blocks"),
        ({"indices": [3], "fqn": PATHS[tiny.name]}, "layer 3 is not in"),
    ):
        with pytest.raises(Unsupported, match=says):
            tiny.graft("SkipLayerGuidance", {"skip_layer_config": config})
    flux = Tiny("FluxPipeline")
    with pytest.raises(Unsupported, match="by chance"):
        flux.graft("SkipLayerGuidance", {"skip_layer_guidance_layers": [0]})
    tiny.graft("ClassifierFreeGuidance")
    with pytest.raises(Unsupported, match="guidance_rescale"):
        tiny(guidance_rescale=0.7)
    sd3 = Tiny("StableDiffusion3Pipeline")
    sd3.graft("ClassifierFreeGuidance")
    with pytest.raises(Unsupported, match="skip"):
        sd3(skip_guidance_layers=[0])
    tiny.pipe.plugins.clear()
    assert torch.equal(tiny(), plain)


def test_compiled_layers_are_refused():
    tiny = Tiny("StableDiffusionPipeline")
    tiny.graft(**layers("skip", tiny.name))
    tiny.pipe.unet = torch.compile(tiny.pipe.unet, backend="eager")
    with pytest.raises(Unsupported, match="compiled"):
        tiny()


def test_frequencies_without_kornia(monkeypatch):
    monkeypatch.setattr("diffusers.guiders.frequency_decoupled_guidance._CAN_USE_KORNIA", False)
    with pytest.raises(ConfigError, match="pip install kornia"):
        DiffusersGuider(guider="FrequencyDecoupledGuidance")


def test_frequencies():
    """Two equal scales are plain guidance; on packed latents it is refused."""
    tiny = Tiny("StableDiffusionPipeline")
    plain = tiny(guidance_scale=5.0)
    tiny.graft("FrequencyDecoupledGuidance", {"guidance_scales": [5.0, 5.0]})
    torch.testing.assert_close(tiny(), plain, rtol=0, atol=1e-4)
    tiny.graft("FrequencyDecoupledGuidance", {"guidance_scales": [8.0, 3.0]})
    assert (tiny() - plain).abs().max() > 1e-2
    with pytest.raises(Unsupported, match="pyramid"):
        Tiny("FluxPipeline").graft("FrequencyDecoupledGuidance")
