"""What was checked when a plugin was put on still holds when it runs, or is checked again: weights, parts, dtypes, diffusers' caches."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import ArtefactMismatch, Conflict, Effects, Need, Unsupported, load_pipeline
from diffgraft.kernel import beside
from diffgraft.kernel.seen import Seen, SeenModel
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffusers import (
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from probes import PluginConfig, Probe, generate, tiny
from pydantic import Field
from torch import nn


class Knobs(PluginConfig):
    artefact: Any = Field(None, description="made for one model")


class Fitted(Probe):
    """Needs an artefact, and counts how often it was checked."""

    name = "fitted"
    Config = Knobs
    needs = (Need("artefact", "artefact", fits=frozenset()),)
    checked: ClassVar[int] = 0

    def check(self, target):
        type(self).checked += 1

    def denoise(self, call, next):
        return next(call)


@pytest.fixture
def fitted():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    made = MadeFor.describe("fitted", pipe, pipe.scheduler, {"unet": pipe.unet}, 1, (4, 8, 8))
    kwargs = {**kwargs, "num_inference_steps": 1, "output_type": "latent"}
    load_pipeline(pipe, plugins=[Fitted(artefact=Artefact(made, {}))])
    generate(pipe, kwargs)
    return pipe, kwargs


def fuse_lora(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    pipe.fuse_lora(components=["unet"])


def other_weights(pipe: Any) -> None:
    pipe.unet.load_state_dict({name: value + 0.1 for name, value in pipe.unet.state_dict().items()})


def other_module(pipe: Any) -> None:
    old = pipe.unet.conv_in
    pipe.unet.conv_in = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)


def other_denoiser(pipe: Any) -> None:
    pipe.unet = tiny("StableDiffusionPipeline")[0].unet.requires_grad_(False)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.3)


CHANGES = {f.__name__: f for f in (fuse_lora, other_weights, other_module, other_denoiser)}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_than_when_attached_is_refused_before_it_runs(fitted, change):
    pipe, kwargs = fitted
    CHANGES[change](pipe)
    ran = []
    pipe.unet.register_forward_pre_hook(lambda *args: ran.append(1))
    for _ in range(2):  # and again: it has not become right
        with pytest.raises(ArtefactMismatch, match="found UNet2DConditionModel with other"):
            generate(pipe, kwargs)
    assert not ran


def test_what_does_not_matter_is_followed_and_checked_once(fitted):
    pipe, kwargs = fitted
    before = Fitted.checked
    generate(pipe, kwargs)
    assert Fitted.checked == before
    for change in (
        lambda: pipe.to(torch.bfloat16),
        lambda: pipe.to(torch.float32),
        lambda: setattr(pipe, "scheduler", EulerDiscreteScheduler.from_config(pipe.scheduler.config)),
        lambda: pipe.scheduler.register_to_config(prediction_type="v_prediction"),
        lambda: setattr(pipe, "unet", tiny("StableDiffusionPipeline")[0].unet),
        lambda: pipe.unet.to(memory_format=torch.channels_last),
    ):
        change()
        generate(pipe, kwargs)
        generate(pipe, kwargs)
        before += 1
        assert Fitted.checked <= before
    assert Fitted.checked >= before - 1  # only another order of the bytes is none of anybody's business


def test_it_costs_less_than_a_millisecond():
    model = nn.Sequential(*[nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)]) for _ in range(100)])
    seen = SeenModel(model, weights=True)
    best = min(timed(seen.holds) for _ in range(20))
    assert best + min(timed(lambda: list(beside._hooks(model))) for _ in range(20)) < 1e-3 * 2  # twice: this machine is busy


def timed(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def test_it_holds_on_to_nothing():
    import gc
    import weakref

    pipe = tiny("StableDiffusionPipeline")[0]
    seen = Seen(pipe, {"unet": True})
    old = weakref.ref(pipe.unet)
    pipe.unet = None
    gc.collect()
    assert old() is None
    assert not seen.holds()


class Skipping(Probe):
    name = "skipping"
    effects = Effects(skips=frozenset({"blocks"}))

    def denoise(self, call, next):
        return next(call)


class Idle(Probe):
    name = "idle"

    def denoise(self, call, next):
        return next(call)


class Differentiating(Probe):
    name = "differentiating"
    effects = Effects(edits=frozenset({"latents"}), needs=frozenset({"plain_gradients"}))

    def denoise(self, call, next):
        return next(call)


CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.1),
    "FasterCache": FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BCHW", is_guidance_distilled=True
    ),
    "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "TaylorSeerCache": TaylorSeerCacheConfig(),
    "MagCache": MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_diffusers_is_a_part_of_the_stack(cache):
    pipe, kwargs = tiny("FluxPipeline")
    pipe.transformer.enable_cache(CACHES[cache])
    for plugin in (Skipping, Differentiating):
        with pytest.raises(Conflict, match=rf"{plugin.name}.*diffusers' {cache} \(pipe.transformer.disable_cache\(\) takes it off\)"):
            load_pipeline(pipe, plugins=[plugin])
    load_pipeline(pipe, plugins=[Idle])
    pipe.transformer.disable_cache()
    pipe.plugins.add(Skipping)
    generate(pipe, kwargs, num_inference_steps=1)
    pipe.transformer.enable_cache(CACHES[cache])  # after attaching
    assert cache in pipe.plugins.plan.conflicts[0]
    with pytest.raises(Conflict, match=cache):
        generate(pipe, kwargs, num_inference_steps=1)
    pipe.transformer.disable_cache()
    assert not pipe.plugins.plan.conflicts
    generate(pipe, kwargs, num_inference_steps=1)


def test_every_cache_that_diffusers_has_is_known():
    """A new diffusers brings a new one: say what it does."""
    import importlib
    import pkgutil

    import diffusers.hooks

    names = set()
    for module in pkgutil.iter_modules(diffusers.hooks.__path__):
        held = vars(importlib.import_module(f"diffusers.hooks.{module.name}"))
        names |= {value for key, value in held.items() if key.startswith("_") and key.endswith("HOOK") and isinstance(value, str)}
    assert names
    assert not [name for name in names if name not in beside.CACHES and not name.startswith(beside.HARMLESS)]


def test_offloading_and_layerwise_casting_are_none():
    transformer = tiny("FluxPipeline")[0].transformer
    apply_layerwise_casting(transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert beside.foreign_parts({"transformer": transformer}) == ()
    transformer = tiny("FluxPipeline")[0].transformer
    apply_group_offloading(transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert beside.foreign_parts({"transformer": transformer}) == ()


class SecondKnobs(PluginConfig):
    model: Any = Field(None, description="a second pipeline")


class Second(Probe):
    """Asks the second pipeline's denoiser instead."""

    name = "second"
    Config = SecondKnobs
    needs = (Need("pipeline", "model"),)

    def denoise(self, call, next):
        return getattr(call.given("model"), call.model_name)(**call.arguments())[0]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cast", [False, True])
def test_a_second_pipeline_follows_the_dtype_of_the_first(when, cast):
    """What the first one computes in, also where it is kept in fp8 and cast layer by layer."""
    (pipe, kwargs), (other, _) = tiny("StableDiffusionPipeline"), tiny("StableDiffusionPipeline")

    def convert():
        pipe.to(torch.bfloat16)
        if cast:
            pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    if when == "before":
        convert()
    load_pipeline(pipe, plugins=[Second(model=other)])
    if when == "after":
        convert()
    generate(pipe, kwargs, num_inference_steps=1, output_type="latent")
    assert other.unet.dtype == other.text_encoder.dtype == torch.bfloat16


def test_a_second_pipeline_that_no_longer_fits_is_refused():
    (pipe, kwargs), (other, _) = tiny("StableDiffusionPipeline"), tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Second(model=other)])
    other.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(Unsupported, match="its denoiser predicts v_prediction, this one epsilon"):
        generate(pipe, kwargs)
