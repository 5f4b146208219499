"""A denoiser without its LoRA, and the LoRA back as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from typing import Any

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, DiffgraftError, Need, PluginConfig, Unsupported, load_pipeline, unload
from diffgraft.methods import adapters
from diffgraft.methods.adapters import adapter_layers, beside, weighted, without_adapters
from diffgraft.testing.tiny import has_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from probes import Probe, generate, tiny, trace
from pydantic import Field
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(not has_peft(), reason="needs peft")


def with_lora(name="StableDiffusionPipeline"):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    model = getattr(pipe, "unet", None) or pipe.transformer
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    model.eval()
    return pipe, kwargs, model, plain


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_off_is_the_base_model_and_on_again_is_the_lora(name):
    pipe, kwargs, model, plain = with_lora(name)
    tuned = generate(pipe, kwargs)
    assert not torch.equal(tuned, plain)
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    grads = [p.requires_grad for p in model.parameters()]
    with without_adapters(model):
        assert torch.equal(generate(pipe, kwargs), plain)
    assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(generate(pipe, kwargs), tuned)


def test_an_exception_inside_leaves_it_on():
    pipe, kwargs, model, _ = with_lora()
    tuned = generate(pipe, kwargs)
    with pytest.raises(KeyboardInterrupt), without_adapters(model):
        raise KeyboardInterrupt
    assert torch.equal(generate(pipe, kwargs), tuned)


def test_what_the_user_switched_off_stays_off():
    pipe, kwargs, model, plain = with_lora()
    model.disable_adapters()
    with without_adapters(model), without_adapters(model):
        assert torch.equal(generate(pipe, kwargs), plain)
    assert torch.equal(generate(pipe, kwargs), plain)
    model.enable_adapters()
    assert not torch.equal(generate(pipe, kwargs), plain)


def test_no_lora_and_a_fused_one_are_refused():
    pipe, _ = tiny("StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="carries no LoRA"), without_adapters(pipe.unet):
        pass
    _, _, model, _ = with_lora()
    model.fuse_lora()
    with pytest.raises(Unsupported, match="unfuse_lora"), without_adapters(model):
        pass


# adapters that plugins bring


class BringsConfig(PluginConfig):
    lora: Any = Field(None, description="a LoRA")


class Brings(Probe):
    """Shows its LoRA in every call."""

    name = "brings"
    Config = BringsConfig
    needs = (Need("adapter", "lora"),)
    weight = 1.0

    def denoise(self, call, next):
        with weighted(call.model, {call.given("lora").name: self.weight}):
            return next(call)


class BringsToo(Brings):
    name = "brings_too"
    weight = 0.0


class Waits(Brings):
    name = "waits"

    def denoise(self, call, next):
        return next(call)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A LoRA, as `save_lora_weights` writes it."""
    pipe, _, model, _ = with_lora()
    folder = tmp_path_factory.mktemp("lora")
    type(pipe).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model))
    return folder / "pytorch_lora_weights.safetensors"


def looks(pipe, part="unet"):
    model = getattr(pipe, part)
    layers = {key: (id(each), sorted(each.__dict__), each.__dict__.get("_active_adapter")) for key, each in model.named_modules()}
    grads = {key: value.requires_grad for key, value in model.named_parameters()}
    scales = {key: dict(module.scaling) for key, module in model.named_modules() if hasattr(module, "scaling")}
    return (
        trace(pipe),
        layers,
        grads,
        scales,
        list(model.state_dict()),
        sorted(getattr(model, "peft_config", {})),
        pipe.get_active_adapters(),
    )


@pytest.mark.parametrize("own", [False, True])
def test_a_plugins_adapter_comes_and_goes_without_trace(own, file):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    if own:  # on other layers too, so that some are shared
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"]), "mine")
    plain = generate(pipe, kwargs)
    before = looks(pipe)
    load_pipeline(pipe, plugins=[Waits(lora=str(file))])
    assert torch.equal(generate(pipe, kwargs), plain)
    assert pipe.get_active_adapters() == (["mine"] if own else [])
    pipe.plugins.add(Brings(lora=str(file)), BringsToo(lora=str(file)))
    assert {"diffgraft:brings:lora", "diffgraft:brings_too:lora"} <= set(pipe.unet.peft_config)
    pipe.plugins.remove("brings_too", "waits")
    tuned = generate(pipe, kwargs)
    assert not torch.equal(tuned, plain)
    pipe.plugins.disable("brings")
    assert torch.equal(generate(pipe, kwargs), plain)
    pipe.plugins.enable("brings")
    assert torch.equal(generate(pipe, kwargs), tuned)
    lost = copy.deepcopy(pipe)
    lost.unload_lora_weights()
    with pytest.raises(ConfigError, match=r"no adapter 'diffgraft:brings:lora'.*takes those of plugins too: load the plugin again"):
        generate(lost, kwargs)
    assert torch.equal(generate(copy.deepcopy(pipe), kwargs), tuned)
    unload(pipe)
    assert looks(pipe) == before
    assert torch.equal(generate(pipe, kwargs), plain)


def test_beside_weights_that_are_cast_layer_by_layer_it_is_kept_as_it_computes(file):
    """peft gives new layers the dtype of the weights beside them, and diffusers' cast does not know the new ones: its own loader fails."""

    def cast(pipe):
        pipe.to(torch.bfloat16)
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    found = []
    for order in ("cast first", "plugin first"):
        pipe, kwargs = tiny("StableDiffusionPipeline")
        if order == "cast first":
            cast(pipe)
        load_pipeline(pipe, plugins=[Brings(lora=str(file))])
        if order == "plugin first":
            cast(pipe)
        loras = {name: value for name, value in pipe.unet.named_parameters() if "lora_" in name}
        assert {value.dtype for value in loras.values()} == {torch.bfloat16}
        found.append((generate(pipe, kwargs), loras))
    (one, its), (other, too) = found
    assert torch.equal(one, other)
    assert all(torch.equal(its[name], too[name]) for name in too)


def kohya(file, folder):
    """The same in the names of sd-scripts, with a scale of 3 / 2 beside each layer."""
    state = {}
    for key, value in load_file(file).items():
        path, _, part = key.removeprefix("unet.").rpartition(".lora_")
        layer = f"lora_unet_{path.replace('.to_out.0', '.to_out_0').replace('.', '_')}"
        state[f"{layer}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        state[f"{layer}.alpha"] = torch.tensor(3.0)
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def with_metadata(file, folder):
    """The same with a header that says its alpha."""
    config = {"r": 2, "lora_alpha": 5, "target_modules": ["to_q", "to_k", "to_v"]}
    layers = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
    cls = type(tiny("StableDiffusionPipeline")[0])
    cls.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("written", [lambda file, folder: file, kohya, with_metadata])
@pytest.mark.parametrize("in_memory", [False, True])
def test_it_is_the_lora_that_the_user_would_load(written, in_memory, file, tmp_path):
    source = written(file, tmp_path)
    given = load_file(source) if in_memory else str(source)  # tensors alone have no header
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Brings(lora=given)])
    draws = torch.get_rng_state()
    brought = generate(pipe, kwargs)
    assert torch.equal(torch.get_rng_state(), draws)
    scales = {scale for layer in adapter_layers(pipe.unet) for scale in layer.scaling.values()}
    assert scales == {1.5 if written is kohya else 2.5 if written is with_metadata and not in_memory else 1.0}
    unload(pipe)
    pipe.load_lora_weights(dict(given) if in_memory else given)
    assert torch.equal(generate(pipe, kwargs), brought)


def test_what_is_saved_and_pickled_is_plain(file, tmp_path):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Brings(lora=str(file))])
    brought = generate(pipe, kwargs)
    pipe.save_pretrained(tmp_path / "saved")
    assert not any("lora" in key or "base_layer" in key for key in load_file(next((tmp_path / "saved" / "unet").glob("*.safetensors"))))
    pickled = pickle.loads(pickle.dumps(pipe))
    assert not adapter_layers(pickled.unet)
    assert torch.equal(generate(pickled, kwargs), plain)
    assert torch.equal(generate(pipe, kwargs), brought)


def test_what_does_not_fit_is_refused_and_nothing_is_touched(file, tmp_path, monkeypatch):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe(**kwargs)
    before = looks(pipe)
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(2, 5)}, tmp_path / "shape.safetensors")
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 5)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    refused = [
        (tmp_path / "shape.safetensors", ArtefactMismatch, rf"lora = .*shape.safetensors is no LoRA of this UNet2D.*{name}"),
        (tmp_path / "other.safetensors", ArtefactMismatch, "nowhere.to_q.lora_A.weight has no layer here"),
        (tmp_path / "damaged.safetensors", DiffgraftError, "damaged.safetensors"),
        (tmp_path / "none.safetensors", DiffgraftError, "none.safetensors"),
        ({"unet_2": str(file)}, ConfigError, "no denoiser 'unet_2'"),
        (tmp_path, ConfigError, "is a folder without pytorch_lora_weights.safetensors: name the file"),
        (3, ConfigError, "lora = 3 is no LoRA: give a file"),
        ({}, ConfigError, r"lora = \{\} names no denoiser: give a file, or one for each of unet"),
    ]
    for value, error, says in refused:
        with pytest.raises(error, match=says):
            load_pipeline(pipe, plugins=[Brings(lora=value)])
        unload(pipe)
        assert looks(pipe) == before

    whole = type(pipe.unet).load_lora_adapter

    def half(*args, **kwargs):
        whole(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.unet), "load_lora_adapter", half)
        with pytest.raises(KeyboardInterrupt):
            load_pipeline(pipe, plugins=[Brings(lora=str(file))])
    unload(pipe)
    assert looks(pipe) == before
    with_lora_fused, kwargs, model, _ = with_lora()
    model.fuse_lora()
    fused, before = generate(with_lora_fused, kwargs), looks(with_lora_fused)
    with pytest.raises(Unsupported, match="unfuse_lora"):
        load_pipeline(with_lora_fused, plugins=[Brings(lora=str(file))])
    unload(with_lora_fused)
    assert looks(with_lora_fused) == before
    assert torch.equal(generate(with_lora_fused, kwargs), fused)


def test_weighted_shows_others_and_leaves_no_trace():
    pipe, kwargs, model, plain = with_lora()
    tuned = generate(pipe, kwargs)
    before = looks(pipe)
    with weighted(model, {"default": 0.0}):
        assert torch.equal(generate(pipe, kwargs), plain)
    with weighted(model, {"default": 1.0}):
        assert torch.equal(generate(pipe, kwargs), tuned)
    with weighted(model, {}):
        assert torch.equal(generate(pipe, kwargs), plain)
    with pytest.raises(ConfigError, match="no adapter 'defalt'"), weighted(model, {"defalt": 1.0}):
        pass
    assert looks(pipe) == before


def test_beside_keeps_what_the_user_has_active():
    pipe, kwargs, model, plain = with_lora()
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"]), "second")
    outputs = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.set_adapter(names)
        outputs[tuple(names)] = generate(pipe, kwargs)
    for own, shown, wanted in (
        (["default"], {"second": 1.0}, ("default", "second")),
        (["default"], {}, ("default",)),
        (["second"], {"second": 1.0}, ("second",)),
        ([], {"second": 1.0}, ("second",)),
    ):
        model.set_adapter(own)
        before = looks(pipe)
        with beside(model, shown):
            assert torch.equal(generate(pipe, kwargs), outputs[wanted])
        assert looks(pipe) == before
    model.set_adapter(["default"])
    model.disable_adapters()
    with beside(model, {"second": 1.0}):
        assert torch.equal(generate(pipe, kwargs), outputs["second",]), "what the user has switched off stays off"
    assert torch.equal(generate(pipe, kwargs), plain)


@pytest.fixture
def walks(monkeypatch):
    """How often a denoiser was searched for layers with a LoRA."""
    seen = []
    monkeypatch.setattr(adapters, "adapter_layers", lambda model: seen.append(model) or adapter_layers(model))
    return seen


def test_layers_are_looked_for_once_a_run_and_again_when_a_lora_comes_or_goes(file, walks):
    """A LoRA of the user's that a step callback loads, deletes, loads again under its old name, or unloads: as without the cache."""

    def load(pipe):
        torch.manual_seed(3)
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"]), "late")

    def again(pipe):
        pipe.delete_adapters("late")
        load(pipe)

    changes = {1: load, 2: again, 3: lambda pipe: pipe.delete_adapters("late")}

    def run():
        pipe, kwargs = tiny("StableDiffusionPipeline")
        load_pipeline(pipe, plugins=[Brings(lora=str(file))])

        def change(pipe, step, timestep, tensors):
            changes.get(step, lambda pipe: None)(pipe)
            return tensors

        plain = generate(pipe, kwargs | {"num_inference_steps": 5})
        after_plain = len(walks)
        changed = generate(pipe, kwargs | {"num_inference_steps": 5, "callback_on_step_end": change})
        return plain, changed, after_plain, len(walks) - after_plain

    walks.clear()
    plain, changed, attaching_and_one, several = run()
    assert attaching_and_one <= 4, "five steps, and as often as that while it was put on"
    assert several == 4, "at first, and after each of three changes"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapters, "known_layers", adapter_layers)
        assert all(torch.equal(a, b) for a, b in zip((plain, changed), run()[:2], strict=True))


class Several(Brings):
    """Shows the first of its LoRA, then the second, then both."""

    name = "several"

    def denoise(self, call, next):
        first, second = (adapter.name for adapter in call.given("lora"))
        with weighted(call.model, [{first: 1.0}, {second: 1.0}, {first: 0.5, second: 0.5}][min(call.step.index, 2)]):
            return next(call)


def test_a_knob_may_hold_several(file, tmp_path):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain, before = generate(pipe, kwargs), looks(pipe)
    save_file({name: -value for name, value in load_file(file).items()}, tmp_path / "other.safetensors")
    load_pipeline(pipe, plugins=[Several(lora=[str(file), str(tmp_path / "other.safetensors")])])
    assert {"diffgraft:several:lora:1", "diffgraft:several:lora:2"} == set(pipe.unet.peft_config)
    shown = generate(pipe, kwargs)
    assert not torch.equal(shown, plain)
    assert torch.equal(generate(copy.deepcopy(pipe), kwargs), shown)
    unload(pipe)
    assert looks(pipe) == before
    with pytest.raises(DiffgraftError, match=r"lora number 2 = .*none\.safetensors"):
        load_pipeline(pipe, plugins=[Several(lora=[str(file), str(tmp_path / "none.safetensors")])])
    assert looks(unload(pipe)) == before


class WhereItIs(Brings):
    """Shows its LoRA on the denoisers that have one."""

    name = "where_it_is"

    def denoise(self, call, next):
        adapter = call.given("lora")
        with weighted(call.model, {adapter.name: 1.0} if call.model_name in adapter.loras else {}):
            return next(call)


def test_each_of_two_denoisers_has_a_lora_of_its_own(tmp_path):
    """Wan 2.2: one transformer for the noisy half, one for the rest."""
    name, files = "WanPipeline@2.2", {}
    pipe, kwargs = tiny(name)
    for seed, part in enumerate(("transformer", "transformer_2")):
        model = getattr(tiny(name)[0], part)
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        files[part] = str(tmp_path / f"{part}.safetensors")
        type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model), weight_name=f"{part}.safetensors")
    plain = generate(pipe, kwargs)
    before = [looks(pipe, part) for part in files]
    outputs = {}
    for parts in (("transformer",), ("transformer_2",), ("transformer", "transformer_2")):
        load_pipeline(pipe, plugins=[WhereItIs(lora={part: files[part] for part in parts})])
        assert [part for part in files if hasattr(getattr(pipe, part), "peft_config")] == list(parts)
        outputs[parts] = generate(pipe, kwargs)
        unload(pipe)
        assert [looks(pipe, part) for part in files] == before
    assert torch.equal(generate(pipe, kwargs), plain)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations([plain, *outputs.values()], 2))
    load_pipeline(pipe, plugins=[WhereItIs(lora=files["transformer"])])
    assert torch.equal(generate(pipe, kwargs), outputs["transformer",]), "without a name it is the first one's"
    unload(pipe)
    pipe.load_lora_weights(files["transformer_2"], load_into_transformer_2=True)
    assert torch.equal(generate(pipe, kwargs), outputs["transformer_2",]), "as the user would load it"


def test_what_needs_peft_says_how_to_get_it(monkeypatch):
    pipe, _ = tiny("StableDiffusionPipeline")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Unsupported, match=r"LoRA needs peft.*pip install 'diffgraft\[lora\]'"):
        load_pipeline(pipe, plugins=[Brings(lora="a.safetensors")])
