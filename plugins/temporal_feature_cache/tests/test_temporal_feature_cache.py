"""The temporal feature cache: bit for bit, nothing stale, and exact features beside a quantiser."""

from __future__ import annotations

import copy
import importlib
from typing import Any, ClassVar

import diffgraft_temporal_feature_cache.cache as c
import numpy as np
import pytest
import torch
from diffgraft import Conflict, Effects, ModulesCall, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.layers import layers_of, put, quantised, quantised_in
from diffgraft_temporal_feature_cache.cache import CachedLinear, Kept, Store, checksums, version, versions
from diffgraft_temporal_feature_cache.method import is_temporal
from torch import nn

KEPT = ("temporal_feature_cache", {"across_runs": True})
FAMILIES = ("sd", "sdxl", "pixel", "svd", "deepfloyd_if", "latent_consistency", "dit", "pixart", "wan", "flux", "sd3")


def tiny(family="sd"):
    found = registry.families()[family]
    module, function = found.tiny.split(":")
    return getattr(importlib.import_module(module), function)(found.pipelines[0], 0)


def denoiser(made):
    return getattr(made.pipe, "unet", None) or made.pipe.transformer


def picture(made, seed=0, **kwargs):
    """The result as an array, from equal noise."""
    out = made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(seed), **kwargs})[0]
    return out.float().numpy() if isinstance(out, torch.Tensor) else np.stack([np.asarray(each) for each in out])


def part(made):
    return made.pipe.plugins.report().plugins["temporal_feature_cache"]


def total(made, name):
    return sum(part(made).counts[name].values())


def cached(made):
    return [module for module in denoiser(made).modules() if isinstance(module, CachedLinear)]


class Rounded(Plugin):
    """Rounds all weights that it finds to four bits."""

    name = "rounded"
    paper = Paper("none", "0000.00000", "rounds to the nearest")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in layers_of(call.denoisers):
            put(call.swap, layer, quantised(layer.module, UniformAffine(4, "channel")))
        next(call)


# exact, and served -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_and_without_are_equal_bit_for_bit_and_a_second_run_computes_nothing(family):
    made = tiny(family)
    plain, other = picture(made), picture(made, 1)
    calls = []
    for path, module in denoiser(made).named_modules():
        if isinstance(module, nn.Linear) and is_temporal(path):
            module.register_forward_hook(lambda *_: calls.append(1))
    picture(made)
    asked = len(calls)  # steps x layers of all blocks, for each branch that the pipeline asks by itself
    load_pipeline(made.pipe, plugins=[KEPT])
    assert np.array_equal(picture(made), plain)
    assert total(made, "served") + total(made, "computed") == asked
    assert np.array_equal(picture(made), plain)
    assert (total(made, "served"), total(made, "computed")) == (asked, 0)
    assert np.array_equal(picture(made, 1), other)  # other noise, same features
    assert total(made, "computed") == 0
    made.pipe.plugins.configure("temporal_feature_cache", megabytes=0)
    assert np.array_equal(picture(made), plain)
    assert not cached(made)
    unload(made.pipe)
    assert np.array_equal(picture(made), plain)


def test_hits_are_steps_times_blocks():
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    picture(made, num_inference_steps=5)
    picture(made, num_inference_steps=5)
    resnets = sum(type(module).__name__ == "ResnetBlock2D" for module in made.pipe.unet.modules())
    assert total(made, "served") == 5 * (resnets + 2)  # and the two layers of the time embedding


def test_branches_that_are_asked_one_after_another_share_what_does_not_depend_on_the_text():
    made = tiny("wan")
    load_pipeline(made.pipe, plugins=[KEPT])
    picture(made)
    assert total(made, "served") == total(made, "computed") > 0


@pytest.mark.parametrize("family", ["sd", "pixart", "wan", "dit", "flux", "sd3"])
def test_the_time_path_is_what_sees_neither_latents_nor_text(family):
    made, pooled = tiny(family), family in ("flux", "sd3")
    inputs: list[dict[str, Any]] = []
    for path, module in denoiser(made).named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: inputs[-1].setdefault(path, args[0].clone()))
    for seed, prompt in ((0, "a red apple"), (1, "two small dogs at the sea")):
        inputs.append({})
        picture(made, seed, **({} if pooled or "prompt" not in made.kwargs else {"prompt": prompt}))
    same = {path for path, x in inputs[0].items() if torch.equal(x, inputs[1][path])}
    chosen = {path for path in inputs[0] if is_temporal(path)}
    assert chosen
    assert chosen <= same
    if not pooled:  # else a text's own layers are equal too: of one prompt
        assert chosen == same


# beside a quantiser ------------------------------------------------------------------------------------------------------------------


def features(made, **kwargs):
    """What each layer of the time path gives, at all steps."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, path=path: found.setdefault(path, []).append(y.clone()))
        for path, module in denoiser(made).named_modules()
        if isinstance(module, nn.Linear) and is_temporal(path)
    ]
    image = picture(made, **kwargs)
    for hook in hooks:
        hook.remove()
    return image, {path: torch.stack(each) for path, each in found.items()}


@pytest.mark.parametrize("family", ["sd", "dit", "flux"])
def test_beside_four_bits_the_features_are_exact(family):
    made = tiny(family)
    plain, exact = features(made)
    load_pipeline(made.pipe, plugins=[Rounded()])
    alone, rounded = features(made)
    assert all(not torch.equal(rounded[path], exact[path]) for path in exact)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins=[KEPT, Rounded()])
    for _ in range(2):
        beside, kept = features(made)
        assert kept.keys() == exact.keys()
        assert all(torch.equal(kept[path], exact[path]) for path in exact)
        assert not np.array_equal(beside, plain)  # the rest is in four bits
        assert not np.array_equal(beside, alone)
    assert total(made, "computed") == 0


def test_a_quantiser_that_was_first_is_told_the_way_out():
    made = tiny()
    load_pipeline(made.pipe, plugins=[Rounded()])
    with pytest.raises(Conflict, match=r"time_\w+.* is quantised already; put temporal_feature_cache first"):
        made.pipe.plugins.add("temporal_feature_cache")
    assert made.pipe.plugins.list() == ("rounded",)


def test_a_quantiser_before_it_in_the_list_is_refused_and_nothing_is_left():
    made = tiny()
    plain = picture(made)
    with pytest.raises(Conflict, match=r"time_\w+.* is quantised already; put temporal_feature_cache first"):
        load_pipeline(made.pipe, plugins=[Rounded(), KEPT])
    assert not quantised_in({"unet": made.pipe.unet})
    assert np.array_equal(picture(made), plain)


def test_a_quantiser_that_came_while_it_was_off_keeps_it_off():
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    made.pipe.plugins.disable("temporal_feature_cache")
    made.pipe.plugins.add(Rounded())
    rounded = picture(made)
    with pytest.raises(Conflict, match="is quantised already"):
        made.pipe.plugins.enable("temporal_feature_cache")
    assert not cached(made)
    assert np.array_equal(picture(made), rounded)


# beside what lies on its layers ------------------------------------------------------------------------------------------------------


def on_all_layers(way, pipe):
    """What may lie on the layers before the plugin is put on."""
    layers = [module for path, module in pipe.unet.named_modules() if isinstance(module, nn.Linear) and is_temporal(path)]
    if way == "accelerate":
        pytest.importorskip("accelerate").cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    elif way == "layerwise casting":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    elif way == "group offload":
        pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    for layer in layers:
        if way == "forward hook":
            layer.register_forward_hook(lambda module, args, y: y * 1.3)
        elif way == "pre-hook":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.3,))
        elif way == "weight_norm":
            torch.nn.utils.weight_norm(layer)
            layer.weight_g.data *= 1.5


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", ["forward hook", "pre-hook", "weight_norm", "accelerate", "layerwise casting", "group offload"])
def test_what_lay_on_the_layers_before_acts_on(way):
    made, twin = tiny(), tiny()
    if way in ("forward hook", "pre-hook", "weight_norm"):
        untouched = picture(made)
    on_all_layers(way, made.pipe)
    on_all_layers(way, twin.pipe)
    plain = picture(twin)
    load_pipeline(made.pipe, plugins=[KEPT])
    for _ in range(2):
        assert np.array_equal(picture(made), plain)
    if way in ("forward hook", "pre-hook", "weight_norm"):
        assert not np.array_equal(plain, untouched)
        assert (total(made, "served") > 0, total(made, "computed")) == (True, 0)
    else:
        assert ["inactive" in note and "forwards of their own" in note for note in part(made).notes] == [True]
    unload(made.pipe)
    assert np.array_equal(picture(made), plain)


@pytest.mark.parametrize("way", ["assigned", "load_state_dict(assign=True)"])
def test_parameters_that_were_replaced_stay_when_it_is_taken_off(way):
    made, twin = tiny(), tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    for unet in (made.pipe.unet, twin.pipe.unet):
        layer = unet.time_embedding.linear_2
        new = {name: value * 1.5 for name, value in layer.state_dict().items()}
        if way == "assigned":
            layer.weight, layer.bias = (nn.Parameter(new[name], requires_grad=False) for name in ("weight", "bias"))
        else:
            layer.load_state_dict(new, assign=True)
    plain = picture(twin)
    assert not np.array_equal(plain, before)
    assert np.array_equal(picture(made), plain)
    unload(made.pipe)
    assert np.array_equal(picture(made), plain)


def test_another_denoiser_that_was_put_in_is_told():
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    made.pipe.unet = tiny().pipe.unet
    picture(made)
    assert ["the time path of unet is not exchanged: it came after" in note for note in part(made).notes] == [True]


# nothing stale -----------------------------------------------------------------------------------------------------------------------


def changed(made, way):
    """Other weights in the time path, as trainers, loaders and LoRA write them."""
    layer = next(module for path, module in denoiser(made).named_modules() if isinstance(module, nn.Linear) and is_temporal(path))
    with torch.no_grad():
        if way == "in place":
            layer.weight.mul_(1.5)
        elif way == "past the counters":
            layer.weight.data += 0.25
        elif way == "a new tensor":
            layer.weight.data = layer.weight.data * 1.5
        elif way == "a row for another":
            layer.weight.data[[0, 1]] = layer.weight.data[[1, 0]]
        else:
            layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("way", ["in place", "past the counters", "a new tensor", "a row for another", "load_state_dict"])
def test_other_weights_are_not_answered_with_old_features(way):
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    changed(made, way)
    found = picture(made)
    assert total(made, "computed") > 0
    unload(made.pipe)
    assert np.array_equal(found, picture(made))
    assert not np.array_equal(found, before)


def at_step(step, change):
    def callback(pipe, i, t, kwargs):
        if i == step:
            with torch.no_grad():
                change(pipe.unet.time_embedding.linear_2)
        return {}

    return callback


CHANGES = [
    lambda layer: layer.weight.mul_(1.5),
    lambda layer: layer.weight.data.mul_(1.5),  # past the counters, as a LoRA is fused
    lambda layer: layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()}, assign=True),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("served", [False, True])
def test_weights_that_change_in_mid_run(change, served):
    """Told where something was served before; in any case nothing of it is served later."""
    made, twin = tiny(), tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    callback = at_step(1, change)
    plain = picture(twin, callback_on_step_end=callback)
    if served:
        picture(made)
        with pytest.raises(Unsupported, match=r"the weights of the time path of unet were changed in mid-run .* take temporal_feature"):
            picture(made, callback_on_step_end=callback)
    else:
        assert np.array_equal(picture(made, callback_on_step_end=callback), plain)
    for _ in range(2):
        assert np.array_equal(picture(made), picture(twin))
    assert total(made, "computed") == 0


def test_what_an_interrupted_run_has_computed_is_forgotten():
    """The weights may have changed, and back."""
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])

    def stop(layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(made, callback_on_step_end=at_step(1, stop))
    picture(made)
    assert total(made, "served") == 0


@pytest.mark.parametrize("on_device", [False, True])
def test_a_table_of_classes_that_has_changed(on_device, monkeypatch):
    monkeypatch.setattr(c, "waits", lambda x: on_device)
    made, twin = tiny("dit"), tiny("dit")
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    for one in (made, twin):
        one.pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.data *= 1.5
    plain = picture(twin)
    assert not np.array_equal(plain, before)
    assert np.array_equal(picture(made), plain)
    assert np.array_equal(picture(made), plain)


def test_by_default_nothing_of_a_run_serves_the_next():
    made = tiny()
    plain = picture(made)
    load_pipeline(made.pipe, plugins=["temporal_feature_cache"])
    for _ in range(2):
        assert np.array_equal(picture(made), plain)
        assert (total(made, "served"), total(made, "computed") > 0) == (0, True)
    made.pipe.plugins.configure("temporal_feature_cache", across_runs=True)
    picture(made)
    assert np.array_equal(picture(made), plain)
    assert (total(made, "served") > 0, total(made, "computed")) == (True, 0)


@pytest.mark.parametrize("targets", [["time_emb_proj"], ["linear_1"], ["to_q"]])
def test_a_lora(targets):
    peft = pytest.importorskip("peft")
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    torch.manual_seed(0)
    made.pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    with_lora = picture(made)
    assert not np.array_equal(with_lora, before)
    on_path = targets != ["to_q"]
    assert any("a LoRA lies over" in note for note in part(made).notes) is on_path
    twin = tiny()
    torch.manual_seed(0)
    twin.pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    assert np.array_equal(picture(twin), with_lora)
    made.pipe.unload_lora_weights()
    assert np.array_equal(picture(made), before)
    assert total(made, "served") > 0
    assert not [note for note in part(made).notes if "inactive" in note]
    unload(made.pipe)
    assert np.array_equal(picture(made), before)


def test_a_lora_that_lies_there_already_is_refused_on_the_time_path_and_nowhere_else():
    peft = pytest.importorskip("peft")
    made = tiny()
    made.pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["time_emb_proj"]))
    with pytest.raises(Unsupported, match=r"a LoRA lies over .*time_emb_proj, .*fuse_lora"):
        load_pipeline(made.pipe, plugins=[KEPT])
    made = tiny()
    made.pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[KEPT])
    assert np.array_equal(picture(made), plain)
    assert np.array_equal(picture(made), plain)
    assert total(made, "computed") == 0


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("sd", {"num_images_per_prompt": 2}),
        ("sd", {"num_inference_steps": 3}),
        ("sd", {"guidance_scale": 1.0}),
        ("latent_consistency", {"guidance_scale": 3.0}),
        ("flux", {"guidance_scale": 2.0}),
        ("flux", {"prompt": "two small dogs at the sea"}),
        ("sdxl", {"original_size": (512, 256)}),
        ("dit", {"class_labels": [2]}),
        ("deepfloyd_if", {"prompt": "two small dogs at the sea"}),
        ("svd", {"fps": 3}),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_other_calls_have_features_of_their_own(family, kwargs, on_device, monkeypatch):
    """``on_device``: as where inputs are not compared at once, so that all rests on what they are known by."""
    monkeypatch.setattr(c, "waits", lambda x: on_device)
    made = tiny(family)
    plain, other = picture(made), picture(made, **kwargs)
    load_pipeline(made.pipe, plugins=[KEPT])
    for _ in range(2):
        assert np.array_equal(picture(made), plain)
        assert np.array_equal(picture(made, **kwargs), other)
    assert total(made, "computed") == 0


def test_other_dtypes():
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    plain = picture(made)
    twin = tiny()
    for dtype in (torch.bfloat16, torch.float32):
        made.pipe.to(dtype)
        twin.pipe.to(dtype)
        assert np.array_equal(picture(made), picture(twin))
    assert not np.array_equal(picture(made), plain)  # its weights went through bfloat16
    with torch.inference_mode():
        inferred = picture(made)
    assert np.array_equal(inferred, picture(made))


def test_a_copy_and_a_pipeline_that_shares_the_denoiser():
    made = tiny()
    plain = picture(made)
    sibling = type(made.pipe)(**made.pipe.components)
    load_pipeline(made.pipe, plugins=[KEPT])
    picture(made)
    twin = type(made)(copy.deepcopy(made.pipe), made.kwargs)
    changed(twin, "in place")
    assert np.array_equal(picture(made), plain)
    assert not np.array_equal(picture(twin), plain)
    assert np.array_equal(picture(type(made)(sibling, made.kwargs)), plain)


# what comes in is not what it seems --------------------------------------------------------------------------------------------------


def meddle(made):
    """What something inside of the denoiser may do, and no plugin tells of."""
    return made.pipe.unet.time_embedding.register_forward_pre_hook(lambda module, args: (args[0] + 0.5, *args[1:]))


def test_an_input_that_was_changed_inside_is_computed():
    made = tiny()
    hook = meddle(made)
    meddled = picture(made)
    hook.remove()
    load_pipeline(made.pipe, plugins=[KEPT])
    plain = picture(made)
    meddle(made)
    assert np.array_equal(picture(made), meddled)
    assert not np.array_equal(meddled, plain)


def test_where_comparing_would_wait_it_is_told_at_the_end_of_the_run(monkeypatch):
    monkeypatch.setattr(c, "waits", lambda x: True)
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    plain = picture(made)
    assert np.array_equal(picture(made), plain)
    assert total(made, "computed") == 0
    hook = meddle(made)
    with pytest.raises(Unsupported, match="the time path got something else than at the same timestep before"):
        picture(made)
    hook.remove()
    assert np.array_equal(picture(made), plain)


def test_beside_what_edits_timesteps_everything_is_computed():
    class Later(Plugin):
        name = "later"
        paper = Paper("none", "0000.00000", "asks at another timestep")
        families = ("*",)
        neutral: ClassVar[dict[str, Any]] = {}
        effects = Effects(edits=frozenset({"timestep"}))

        def denoise(self, call, next):
            return next(call.replace(timestep=call.timestep + 5))

    made = tiny()
    load_pipeline(made.pipe, plugins=[Later()])
    later = picture(made)
    made.pipe.plugins.add("temporal_feature_cache")
    assert np.array_equal(picture(made), later)
    assert np.array_equal(picture(made), later)
    assert part(made).notes == ["inactive: later edits the timestep"]


def layer_and_serving(limit=10**6):
    store = Store(limit)
    store.begin(())
    layer = CachedLinear(nn.Linear(4, 3), store)
    return layer, c.Serving(store, store.at("t"))


def test_gradients_and_tangents_flow(monkeypatch):
    layer, serving = layer_and_serving()
    monkeypatch.setattr(c, "current", lambda: serving)
    x = torch.ones(2, 4)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(layer(x), y)
    assert layer(x).requires_grad  # the weights'
    layer.requires_grad_(False)
    assert layer(x.clone().requires_grad_()).requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    assert serving.served == 1


def test_what_was_written_to_or_made_for_inference_is_not_served(monkeypatch):
    layer, serving = layer_and_serving()
    layer.requires_grad_(False)
    monkeypatch.setattr(c, "current", lambda: serving)
    x = torch.ones(2, 4)
    right = layer(x).clone()
    layer(x).add_(1)
    assert torch.equal(layer(x), right)
    serving.store.forget()
    serving.level.kept.clear()
    with torch.inference_mode():
        layer(x)
    assert not layer(x).is_inference()


def test_what_does_not_count_its_writes_is_served_as_copies(monkeypatch):
    layer, serving = layer_and_serving()
    monkeypatch.setattr(c, "current", lambda: serving)
    with torch.inference_mode():
        x = torch.ones(2, 4)
        right = layer(x).mul_(2) / 2
        for _ in range(2):
            y = layer(x)
            assert torch.equal(y, right)
            y.mul_(2)
    assert (serving.served, serving.computed) == (2, 1)


def test_not_a_number_is_no_difference_and_devices_are_apart():
    nan = torch.tensor([[1.0, float("nan")]])
    device = torch.zeros(3, device="meta")
    serving = c.Serving(Store(0), c.LevelOutputs(), came=[nan, torch.zeros(2), device], known=[nan.clone(), torch.zeros(2), device])
    here, there = serving.apart()
    assert not bool(here)
    assert there.device.type == "meta"
    serving.known[1] = torch.tensor([0.0, float("nan")])
    assert bool(serving.apart()[0])


def test_the_limit_holds_and_a_schedule_that_does_not_fit_is_served_in_part():
    made = tiny()
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("temporal_feature_cache", {"megabytes": 0.03, "across_runs": True})])
    for _ in range(2):
        assert np.array_equal(picture(made), plain)
        store = cached(made)[0].store
        held = sum(each.bytes for level in store.levels.values() for each in level.kept.values())
        assert store.bytes == held <= 30_000
    assert total(made, "served") > 0
    assert total(made, "computed") > 0
    picture(made, num_inference_steps=3)
    picture(made, num_inference_steps=3)  # room was made by levels that are not asked for any more
    assert total(made, "served") > 0


def test_room_is_made_by_what_no_later_run_has_used():
    def one():
        x, y = torch.zeros(1), torch.zeros(3)
        return Kept(x, y, (), version(y))

    layer = nn.Linear(1, 3)
    store = Store(2 * one().bytes)
    for run, keys in enumerate([("a", "b", "c"), ("a", "c"), ("d",)]):
        store.begin(())
        for key in keys:
            store.keep(store.at(key), layer, one())
        held = {key for key, level in store.levels.items() if level.kept}
        assert held == [{"a", "b"}, {"a", "c"}, {"c", "d"}][run]
        assert store.bytes == 2 * one().bytes


PATTERNS = (
    lambda w: w.__setitem__(0, w[0, [1, 0, 3, 2]]),  # two exchanges in a row, which leave its sums by columns as they were
    lambda w: w.view(torch.int32)[:2, :2].add_(torch.tensor([[1 << 20, -(1 << 20)], [-(1 << 20), 1 << 20]], dtype=torch.int32)),
)
"""What sums of rows and of columns do not see."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksums_are_exact(dtype, monkeypatch):
    """Against whole numbers of any size; the same in pieces, so also on other devices."""
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=dtype)
    bits = weight.view(c.INTEGERS.get(dtype.itemsize, torch.int32)).tolist()
    columns = len(bits[0])
    factors = c.odd(5 + columns, weight.device).tolist()
    exact = sum(factors[i] * bits[i][j] * factors[5 + j] for i in range(5) for j in range(columns))
    assert all(each % 2 for each in factors)
    for chunk in (1, 14, 1 << 20):
        monkeypatch.setattr(c, "CHUNK", chunk)
        assert (int(c.checksum(weight)) - exact) % 2**64 == 0


def one_ulp(w):
    w.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()])[2, 1] += 1


CHANGES = {
    "negated": lambda w: w.neg_(),
    "a row negated": lambda w: w[2].neg_(),
    "two signs": lambda w: w.__setitem__(([0, 3], [1, 2]), -w[[0, 3], [1, 2]]),
    "two values exchanged": lambda w: w.__setitem__(([0, 3], [1, 2]), w[[3, 0], [2, 1]]),
    "rows permuted": lambda w: w.copy_(w[[1, 2, 3, 0]]),
    "columns permuted": lambda w: w.copy_(w[:, [1, 0, 3, 2, 5, 4]]),
    "one ulp": one_ulp,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_checksums_see_changes_in_every_dtype(change, dtype):
    """Signs above all: of the top bit of whole 64-bit words an even number of changes cancels."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    other = weight.clone()
    CHANGES[change](other)
    assert not torch.equal(other, weight)
    assert int(c.checksum(other)) != int(c.checksum(weight))
    assert int(c.checksum(weight.clone())) == int(c.checksum(weight))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (), (1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
def test_checksums_of_any_shape(shape, dtype):
    values = torch.ones(shape).to(dtype)
    assert (int(c.checksum(values)) == 0) is (values.numel() == 0)


def test_served_are_no_stale_features_of_negated_float64_weights():
    made = tiny()
    made.pipe.to(torch.float64)
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    cached(made)[0].weight.data.neg_()
    found = picture(made)
    unload(made.pipe)
    assert np.array_equal(found, picture(made))
    assert not np.array_equal(found, before)


class Int8Tensor(torch.Tensor):
    """As a quantiser's class: its bits are not to be had."""


def quantise(layer):
    layer.weight = nn.Parameter(torch.Tensor._make_subclass(Int8Tensor, layer.weight.detach()), requires_grad=False)


def test_weights_that_another_library_keeps_are_refused_or_left():
    made = tiny()
    quantise(made.pipe.unet.time_embedding.linear_1)
    with pytest.raises(Unsupported, match=r"time_embedding\.linear_1\.weight, on the time path, is kept as Int8Tensor.*load plain weights"):
        load_pipeline(made.pipe, plugins=[KEPT])
    made = tiny()
    load_pipeline(made.pipe, plugins=[KEPT])
    before = picture(made)
    quantise(cached(made)[5])
    assert np.array_equal(picture(made), before)
    assert any("is kept as Int8Tensor" in note for note in part(made).notes)
    assert total(made, "served") == 0


def test_checksums_tell_weights_apart():
    layer = nn.Linear(4, 4)
    layer.weight.data[0] = torch.tensor([3.0, 6.0, 6.0, 3.0])
    before = checksums([layer])
    assert checksums([copy.deepcopy(layer)]) == before
    for change in (
        lambda w: w.__setitem__((2, 1), w[2, 1] * (1 + 2e-7)),
        lambda w: w.__setitem__([0, 1], w[[1, 0]]),
        lambda w: w.__setitem__((0, [0, 1]), w[0, [1, 0]]),
        lambda w: w.copy_(w.T.clone()),
        *PATTERNS,
    ):
        other = copy.deepcopy(layer)
        change(other.weight.data)
        assert checksums([other]) != before
    assert checksums([copy.deepcopy(layer).bfloat16()]) != before
    counted = versions(layer.parameters())
    layer.load_state_dict(layer.state_dict())
    assert versions(layer.parameters()) != counted


def test_a_model_without_a_known_time_path_is_refused():
    made = tiny()
    for path, module in list(made.pipe.unet.named_modules()):
        if isinstance(module, nn.Linear) and is_temporal(path):
            parent, _, name = path.rpartition(".")
            setattr(made.pipe.unet.get_submodule(parent), name, nn.Sequential(module))
    with pytest.raises(Unsupported, match="has no linear layer on a time path"):
        load_pipeline(made.pipe, plugins=[KEPT])
