"""Layouts: what patterns can say, and every fault of a file named at once."""

from __future__ import annotations

import collections

import pytest
import torch
from diffgraft import ArtefactMismatch, BrokenPlugin, ConfigError
from diffgraft.methods.axes import bind, fits
from diffgraft.methods.layouts import Layout, Spec
from diffgraft.methods.published import Weights, read_weights
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts_of import ELLA, RCM, linear, specs


def faults(layout, state):
    return {group: set(keys) for group, keys in layout.compare(specs(state)).faults.items() if keys}


# the language -------------------------------------------------------------------------------------------------------------------------


def test_what_is_declared_fits_and_letters_get_their_numbers():
    comparison = ELLA.compare(specs(ELLA.synthetic()))
    assert comparison.sizes == {"d": 8, "t": 12, "n": 4, "text": 20, "i": 6}
    assert not any(comparison.faults.values())
    assert len(comparison.used) == comparison.found == 6 * 14 + 9
    published = {"d": 768, "t": 320, "n": 64, "text": 2048}
    assert specs(ELLA.synthetic(published))["connector.perceiver_blocks.5.mlp.c_fc.weight"].shape == (3072, 768)


def test_a_synthetic_file_depends_on_its_seed_alone():
    one, two, other = ELLA.synthetic(seed=1), ELLA.synthetic(seed=1), ELLA.synthetic(seed=2)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["connector.latents"], other["connector.latents"])
    with pytest.raises(ConfigError, match=r"needs a size for n, t, text$"):
        ELLA.synthetic({"d": 8})
    with pytest.raises(ConfigError, match=r"needs a size for i$"):
        RCM.synthetic({"dim": 6, "k": 5})


def test_numbers_in_keys_are_counted_behind_those_before_them():
    """Patterns are enough for OMS: the keys of a stock U-Net without its time."""
    sizes = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 2, 3), "attention_head_dim": (2, 4, 4)}
    kinds = {"down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2)}
    kinds |= {"up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=24, layers_per_block=2, **sizes, **kinds)
    state = {key: value for key, value in unet.state_dict().items() if "time_emb" not in key}

    def around(place, c, deep):
        block = f"{place}.transformer_blocks.{{{deep}}}"
        attention = {f"{block}.attn{n}.to_{x}.weight": (c, c if n == 1 or x == "q" else "text") for n in (1, 2) for x in "qkv"}
        attention |= {key: shape for n in (1, 2) for key, shape in linear(f"{block}.attn{n}.to_out.0", c, c).items()}
        norms = {f"{block}.norm{n}.{what}": (c,) for n in (1, 2, 3) for what in ("weight", "bias")}
        feed = {**linear(f"{block}.ff.net.0.proj", f"8*{c}", c), **linear(f"{block}.ff.net.2", c, f"4*{c}")}
        ends = {**linear(f"{place}.proj_in", c, f"p{c}"), **linear(f"{place}.proj_out", c, f"p{c}")}
        del ends[f"{place}.proj_in.weight"], ends[f"{place}.proj_out.weight"]
        ends |= {f"{place}.proj_{end}.weight": (c, c, 1, 1) for end in ("in", "out")}
        return attention | norms | feed | ends | {f"{place}.norm.{what}": (c,) for what in ("weight", "bias")}

    def resnet(place, c, into):
        keys = {f"{place}.norm{n}.{what}": (axis,) for n, axis in ((1, into), (2, c)) for what in ("weight", "bias")}
        keys |= {f"{place}.conv1.weight": (c, into, 3, 3), f"{place}.conv2.weight": (c, c, 3, 3)}
        keys |= {f"{place}.conv_shortcut.weight": (c, into, 1, 1), f"{place}.conv_shortcut.bias": (c,)}
        return keys | {f"{place}.conv{n}.bias": (c,) for n in (1, 2)}

    layout = Layout(
        {
            **{"conv_in.weight": ("a", "b", 3, 3), "conv_in.bias": ("a",), "conv_norm_out.weight": ("a",), "conv_norm_out.bias": ("a",)},
            **{"conv_out.weight": ("b", "a", 3, 3), "conv_out.bias": ("b",)},
            **resnet("down_blocks.{i}.resnets.{r}", "c{i}", "down{i}_{r}"),
            **around("down_blocks.{x}.attentions.{y}", "c{x}", "z"),
            **{"down_blocks.{s}.downsamplers.0.conv.weight": ("c{s}", "c{s}", 3, 3), "down_blocks.{s}.downsamplers.0.conv.bias": ("c{s}",)},
            **resnet("mid_block.resnets.{m}", "mid", "mid"),
            **around("mid_block.attentions.{n}", "mid", "w"),
            **resnet("up_blocks.{u}.resnets.{v}", "up{u}", "up{u}_{v}"),
            **around("up_blocks.{s}.attentions.{q}", "up{s}", "k"),
            **{"up_blocks.{s}.upsamplers.0.conv.weight": ("up{s}", "up{s}", 3, 3), "up_blocks.{s}.upsamplers.0.conv.bias": ("up{s}",)},
        },
        counts={"i": 3, "u": 3, "s": 2, "x": (1, 2)},
        optional=("*.conv_shortcut.*",),
    )
    comparison = layout.compare(specs(state))
    assert not any(comparison.faults.values()), comparison.faults
    assert comparison.found == len(state)
    numbers = {name: comparison.sizes[name] for name in ("a", "c0", "c1", "mid", "text")}
    assert numbers == {"a": 32, "c0": 32, "c1": 64, "mid": 64, "text": 24}
    gone = [key for key in state if key.startswith("down_blocks.2.attentions.1.transformer_blocks.1.")]
    assert faults(layout, {key: value for key, value in state.items() if key not in gone}) == {"missing": set(gone)}


def test_prefixes_renames_reshapes_and_what_is_ignored():
    state = RCM.synthetic()
    old = {f"net.{key.replace('.q.', '.to_q.')}": value for key, value in state.items() if key not in ("table", "steps")}
    old["net.patch_embedding.weight"] = old["net.patch_embedding.weight"].reshape(6, 64)
    old |= {"net.blocks.0._extra_state": torch.zeros(1), "logvar.1": torch.zeros(9)}
    weights = read_weights(RCM, Weights(old), "rcm", "weights")
    assert weights.sizes == {"dim": 6, "i": 3}
    assert set(weights.tensors) == set(state) - {"table", "steps"}
    assert all(torch.equal(value, state[key]) for key, value in weights.tensors.items())
    twice = {**state, "net.table": state["table"]}
    assert faults(RCM, twice) == {"given twice": {"net.table"}}


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ({"keys": {"a": ("d", "3*")}}, "'3[*]' is no axis"),
        ({"keys": {"a": ("d{i}",)}}, "'d{i}' is no axis"),
        ({"keys": {"a.{i}": ("i",)}}, "'i' is no axis, but numbers keys"),
        ({"keys": {"a": ("d",)}, "optional": ("b*",)}, r"'b\*' names no key"),
        ({"keys": {"a": ("d",)}, "dtypes": {"b": ()}}, "'b' names no key"),
        ({"keys": {"a": ("d",)}, "counts": {"i": 3}}, "{i} is counted, but in no key"),
        ({"keys": {"a": ("d", "e")}, "reshapes": {"a": ("d",), "b": ("d",)}}, "'b' names no key; a: not all letters"),
    ],
)
def test_a_wrong_layout_is_its_plugins_fault(declared, why):
    with pytest.raises(BrokenPlugin, match=why):
        Layout(**declared)


def test_a_letter_is_what_most_axes_say():
    assert bind([([("d", "3*d")], (4, 12)), ([("d",)], (5,)), ([("h*k", "k")], (6, 2))]) == {"d": 4, "k": 2, "h": 3}
    assert fits([("d", "n")], (4, 7), {"d": 4})
    assert not fits([("d", "n")], (4, 0), {"d": 4})


# faults -------------------------------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once():
    state = ELLA.synthetic()
    block = "connector.perceiver_blocks.2"
    state["connector.latent_queries"] = state.pop("connector.latents")
    del state[f"{block}.ln_1.linear.bias"]
    state["connector.proj_in.weight"] = state["connector.proj_in.weight"].T
    state[f"{block}.mlp.c_fc.bias"] = state[f"{block}.mlp.c_fc.bias"][:3]
    state[f"{block}.attn.in_proj_bias"] = state[f"{block}.attn.in_proj_bias"].int()
    state["\x1b[2Jextra"] = torch.zeros(2)
    state["connector.perceiver_blocks.6.attn.in_proj_bias"] = torch.zeros(24)
    with pytest.raises(ArtefactMismatch) as raised:
        ELLA.compare(specs(state)).ensure("ella", "weights = x.safetensors")
    assert str(raised.value).split("\n") == [
        "ella: weights = x.safetensors is not as ella reads it; 88 of 94 keys fit",
        "  missing (2):",
        "    connector.latents: [n, d = 8]; it looks renamed to connector.latent_queries",
        f"    {block}.ln_1.linear.bias: [2*d = 16]",
        "  unexpected (3):",
        "    connector.latent_queries: [4, 8]; it looks like connector.latents",
        r"    \x1b[2Jextra: [2]",
        "    connector.perceiver_blocks.6.attn.in_proj_bias: [24]",
        "  wrong shape (2):",
        "    connector.proj_in.weight: is [20, 8], not [d = 8, text]; it looks transposed",
        f"    {block}.mlp.c_fc.bias: is [3], not [4*d = 32]",
        "  wrong dtype (1):",
        f"    {block}.attn.in_proj_bias: is int32, not float32 or float16 or bfloat16 or float64",
    ]


def test_a_prefix_that_is_not_known_is_told():
    state = {f"model.diffusion.{key}": value for key, value in RCM.synthetic().items()}
    with pytest.raises(ArtefactMismatch, match=r"blocks.0.mod: \[1, 6, dim\]; it looks renamed to model.diffusion.blocks.0.mod"):
        RCM.compare(specs(state)).ensure("rcm", "weights = x")
    many = {f"model.{key}": value for key, value in RCM.synthetic({**RCM.small, "i": 90}).items()}
    with pytest.raises(ArtefactMismatch, match=r"^rcm: weights = x is not as rcm reads it; 0 of 184 keys fit; without 'model.' in front"):
        RCM.compare(specs(many)).ensure("rcm", "weights = x")


def test_another_methods_file_is_told_in_two_sentences():
    state = {f"encoder.layer_{i}.weight": torch.zeros(7, 3) for i in range(417)} | {
        key: value for key, value in ELLA.synthetic().items() if key.startswith("time_embedding.linear_2") or key == "connector.latents"
    }
    with pytest.raises(ArtefactMismatch) as raised:
        ELLA.compare(specs(state)).ensure("ella", "weights = x")
    assert str(raised.value) == (
        "ella: weights = x: this looks like no file of ella: 3 of 420 keys fit. It lacks time_embedding.linear_1.weight, "
        "time_embedding.linear_1.bias, connector.time_aware_linear.weight...; it has encoder.layer_0.weight, encoder.layer_1.weight, "
        "encoder.layer_2.weight..."
    )


def test_a_huge_number_in_a_key_makes_no_work():
    state = RCM.synthetic()
    more = ["blocks.999999.mod", "blocks.9.mod", f"blocks.{'9' * 5000}.mod", "blocks.01.mod", "b" * 5000]
    found = faults(RCM, {**state, **{key: torch.zeros(1, 6, 6) for key in more}})
    assert found == {"unexpected": {key[:200] for key in more}}
    wide = Layout({f"b.{{i}}.{n}": ("d",) for n in range(300)})
    comparison = wide.compare({f"b.{i}.0": Spec((2,), "float32") for i in range(1000)})
    with pytest.raises(ArtefactMismatch, match="this looks like no file of ella"):
        comparison.ensure("ella", "x")


NAMES = sorted(ELLA.synthetic())
OFTEN = [name for name in NAMES if "latents" not in name and "proj_in.weight" not in name and "linear_1.weight" not in name]
"""Those whose letters others have too, so that it is clear which shape is the right one."""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(OFTEN), unique=True, max_size=20), st.data(), st.randoms())
def test_any_damage_is_listed_completely(names, data, random):
    state = ELLA.synthetic()
    expected = collections.defaultdict(set)
    for name in names:
        value = state[name]
        match data.draw(st.sampled_from(["missing", "renamed", "turned", "cut", "integers", "twice", "none"])):
            case "missing":
                del state[name]
                expected["missing"].add(name)
            case "renamed":
                state[f"{name}_old"] = state.pop(name)
                expected["missing"].add(name)
                expected["unexpected"].add(f"{name}_old")
            case "turned" if value.ndim == 2 and value.shape[0] != value.shape[1]:
                state[name] = value.T
                expected["wrong shape"].add(name)
            case "cut":
                state[name] = value[1:]
                expected["wrong shape"].add(name)
            case "integers":
                state[name] = value.to(torch.int32)
                expected["wrong dtype"].add(name)
            case "twice":
                state[f"module.{name}"] = value
                expected["given twice"].add(name)
            case "none":
                state[name] = {"a": 1}
                expected["wrong shape"].add(name)
    shuffled = random.sample(list(state), len(state))
    found = faults(ELLA, {key: state[key] for key in shuffled})
    found["given twice"] = {name.removeprefix("module.") for name in found.get("given twice", ())}
    assert {group: keys for group, keys in found.items() if keys} == dict(expected)
