"""Published weights: every fault of a file is named at once, nothing of it is run, and what fits comes whole."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import sys
import zipfile

import pytest
import torch
from diffgraft import ArtefactMismatch, BrokenPlugin, ConfigError, Need, load_pipeline
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.methods.axes import bind, fits
from diffgraft.methods.encoders import Encoder, follow, read_encoder
from diffgraft.methods.layouts import Layout, Spec
from diffgraft.methods.published import Weights, compare, read_weights, spec_of
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import PluginConfig, Probe, tiny, trace
from pydantic import Field
from safetensors.torch import save_file
from typer.testing import CliRunner


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


BLOCK = "connector.perceiver_blocks.{i}"
ELLA = Layout(
    {
        **linear("time_embedding.linear_1", "d", "t"),
        **linear("time_embedding.linear_2", "d", "d"),
        "connector.latents": ("n", "d"),
        **linear("connector.time_aware_linear", "d", "d"),
        **linear("connector.proj_in", "d", "text"),
        f"{BLOCK}.attn.in_proj_weight": ("3*d", "d"),
        f"{BLOCK}.attn.in_proj_bias": ("3*d",),
        **linear(f"{BLOCK}.attn.out_proj", "d", "d"),
        **linear(f"{BLOCK}.mlp.c_fc", "4*d", "d"),
        **linear(f"{BLOCK}.mlp.c_proj", "d", "4*d"),
        **linear(f"{BLOCK}.ln_1.linear", "2*d", "d"),
        **linear(f"{BLOCK}.ln_2.linear", "2*d", "d"),
        **linear(f"{BLOCK}.ln_ff.linear", "2*d", "d"),
    },
    counts={"i": 6},
    prefixes=("module.",),
    small={"d": 8, "t": 12, "n": 4, "text": 20},
)
RCM = Layout(
    {
        "patch_embedding.weight": ("dim", 16, 1, 2, 2),
        "patch_embedding.bias": ("dim",),
        "blocks.{i}.q.weight": ("dim", "dim"),
        "blocks.{i}.mod": (1, 6, "dim"),
        "steps": (),
        "table": ("k",),
    },
    prefixes=("net.",),
    renames={".to_q.": ".q."},
    reshapes={"patch_embedding.weight": ("dim", 64)},
    optional=("table", "steps"),
    ignored=("*._extra_state", "logvar.*"),
    dtypes={"table": (torch.int64,)},
    inside=("state_dict",),
    small={"dim": 6, "i": 3, "k": 5},
)


def specs(state):
    return {key: spec_of(value) for key, value in state.items()}


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


# files --------------------------------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this runs something when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".PTH", ".bin", ".ckpt", "legacy"])
def test_a_synthetic_file_comes_back(suffix, tmp_path):
    path = tmp_path / f"x{suffix if suffix != 'legacy' else '.pt'}"
    state = RCM.synthetic(seed=3, path=path)
    if suffix == "legacy":
        torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    weights = read_weights(RCM, path, "rcm", "weights")
    assert all(torch.equal(weights.tensors[key], value) for key, value in state.items())
    assert weights.sizes == RCM.small
    assert weights.source == str(path)


def test_letters_are_the_same_in_all_shards(tmp_path):
    state = ELLA.synthetic()
    places = {key: f"model-{1 + key.startswith('connector')}.safetensors" for key in state}
    for shard in set(places.values()):
        save_file({key: value for key, value in state.items() if places[key] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    weights = read_weights(ELLA, index, "ella", "weights")
    assert all(torch.equal(weights.tensors[key], value) for key, value in state.items())
    both = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    assert read_weights(ELLA, both, "ella", "weights").sizes == weights.sizes

    wrong = {key: value for key, value in ELLA.synthetic({**ELLA.small, "d": 16}).items() if places[key] == both[0].name}
    save_file(wrong, both[0])
    with pytest.raises(ArtefactMismatch, match=r"linear_1.bias: is \[16\], not \[d = 8\]"):
        read_weights(ELLA, both, "ella", "weights")
    with pytest.raises(ArtefactMismatch, match=r"two files have connector\.latents"):
        read_weights(ELLA, [both[1], both[1]], "ella", "weights")
    for shards, error in [("../x.safetensors", "is no file beside it"), ("y.safetensors", "no such file"), (3, "is no file")]:
        index.write_text(json.dumps({"weight_map": {"a": shards}}))
        with pytest.raises((ArtefactMismatch, ConfigError), match=error):
            read_weights(ELLA, index, "ella", "weights")


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_nothing_of_a_pickle_is_run(how, tmp_path):
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    state = {**RCM.synthetic(), "more": Runs(ran)}
    if how == "plain":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ArtefactMismatch, match=r"names (posix\.mkdir|nt\.mkdir|torch\.storage\._load_from_bytes), so") as raised:
        compare(RCM, path, "rcm", "weights")
    assert not ran.exists()
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_told(suffix, tmp_path):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"x{suffix}"
    RCM.synthetic(path=whole)
    content = whole.read_bytes()
    for cut in (b"", content[:5], content[: len(content) // 2], content[:-9], b"x" * 100, b"\xff" * 8 + content):
        path.write_bytes(cut)
        with pytest.raises(ArtefactMismatch, match=f"x{suffix} cannot be read: it is damaged, cut off, or not what its name says"):
            compare(RCM, path, "rcm", "weights")


def test_a_header_without_end_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((20 * 2**20).to_bytes(8, "little") + b"{")
        file.truncate(2**30)
    with pytest.raises(ArtefactMismatch, match=r"a header of 20,971,520 bytes"):
        compare(RCM, path, "rcm", "weights")


def test_a_pickle_that_is_larger_than_its_file_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"table": torch.zeros(1, dtype=torch.int64).expand(10**12)}, path)
    with pytest.raises(ArtefactMismatch, match=r"table is larger than the whole file"):
        compare(RCM, path, "rcm", "weights")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ArtefactMismatch, match=r"packed as nobody packs weights"):
        compare(RCM, packed, "rcm", "weights")


def test_what_is_no_state_dict_no_file_or_not_finite(tmp_path):
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "x.txt").write_text("x")
    state = RCM.synthetic()
    state["blocks.1.mod"][0, 0, 0] = torch.inf
    for source, error in [
        (tmp_path / "list.pt", "holds a list, no state dict"),
        (tmp_path / "x.txt", "none of .safetensors"),
        (tmp_path / "no.pt", "there is no such file; give the published file"),
        (tmp_path, "there is no such file"),
        (3, "weights = int: give a file"),
        (Weights({1: torch.zeros(1)}), "weights: 1 is no name of a tensor"),
        (Weights(state), r"not finite: blocks.1.mod$"),
        (Weights({**RCM.synthetic(), "table": torch.zeros(5).to_sparse()}), "is no tensor .a sparse_coo tensor"),
    ]:
        with pytest.raises((ArtefactMismatch, ConfigError), match=error):
            read_weights(RCM, source, "rcm", "weights")


@pytest.mark.parametrize("source", ["owner/name/file.pt", "owner/name/sub/file.safetensors", "owner/na me/file.pt"])
def test_the_hub_is_told_of(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"here or on the Hub: (it is not in the local cache, and|that is no Hub id)") as raised:
        read_weights(RCM, source, "rcm", "weights")
    assert "\n" not in str(raised.value)


# plugins ------------------------------------------------------------------------------------------------------------------------------


class Knobs(PluginConfig):
    weights: object = Field(None, description="published weights")
    encoder: object = Field(None, description="a text encoder")


class Reads(Probe):
    name = "reads"
    Config = Knobs
    needs = (Need("weights", "weights", holds=ELLA), Need("encoder", "encoder"))

    def check(self, target):
        self.__class__.seen = target.given

    def denoise(self, call, next):
        return next(call)


class Undeclared(Reads):
    name = "undeclared"
    needs = (Need("weights", "weights"),)


def test_a_plugin_gets_tensors_and_numbers_or_nothing_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipe = tiny("StableDiffusionPipeline")[0]
    before = trace(pipe)
    path = tmp_path / "ella.safetensors"
    state = ELLA.synthetic(path=path)
    damaged = {key: value for key, value in state.items() if "latents" not in key}
    for plugin, error in [
        (Reads(weights=Weights(damaged)), r"reads: weights = \(in memory\) is not as reads reads it(.|\n)*connector.latents"),
        (Reads(weights=tmp_path / "no.safetensors"), "no weights"),
        (Undeclared(weights=path), "says no holds=Layout"),
        (Reads(encoder=3), "encoder = int: give a folder"),
        (Reads(encoder="nobody/nothing/text_encoder"), "no text encoder"),
    ]:
        with pytest.raises((ArtefactMismatch, ConfigError, BrokenPlugin), match=error):
            load_pipeline(pipe, plugins=[plugin])
        assert trace(pipe) == before
    load_pipeline(pipe, plugins=[Reads(weights=path)])
    weights = Reads.seen["weights"]
    assert weights.sizes["n"] == 4
    assert torch.equal(weights.tensors["connector.latents"], state["connector.latents"])
    pipe.plugins.configure("reads", weights=path)
    assert Reads.seen["weights"] is weights
    pipe.plugins.configure("reads", weights=Weights(state))
    assert Reads.seen["weights"].source == "(in memory)"


@pytest.fixture(scope="module")
def flux():
    return registry.find_bundled("emoji-flux").path


def test_an_encoder_comes_with_its_tokenizer(flux):
    pipe = tiny("StableDiffusionPipeline")[0].to(torch.float64)
    load_pipeline(pipe, plugins=[Reads(encoder=os.path.join(flux, "text_encoder_2"))])
    encoder = Reads.seen["encoder"]
    assert type(encoder.model).__name__ == "T5EncoderModel"
    assert encoder.model.dtype == torch.float64
    assert not encoder.model.training
    assert not any(one.requires_grad for one in encoder.model.parameters())
    follow(encoder, torch.device("cpu"), torch.float16)
    dtypes = {name: value.dtype for name, value in encoder.model.named_parameters()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32
    assert dtypes["encoder.block.0.layer.0.SelfAttention.q.weight"] == torch.float16
    follow(encoder, torch.device("cpu"), torch.float32)
    assert encoder.model(**encoder.tokenizer(["a red apple"], return_tensors="pt")).last_hidden_state.isfinite().all()
    pipe.plugins.configure("reads", encoder=(encoder.tokenizer, encoder.model))
    assert Reads.seen["encoder"].model is encoder.model


def test_an_encoder_of_the_pipelines_first_kind(flux):
    encoder = read_encoder(os.path.join(flux, "text_encoder"), "x", "encoder")
    assert isinstance(encoder, Encoder)
    assert type(encoder.model).__name__ == "CLIPTextModel"
    assert "Tokenizer" in type(encoder.tokenizer).__name__


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("nobody/nothing", "not in the local cache"),
        ("nobody/nothing/text_encoder", "not in the local cache"),
        ("no folder/at all", "that is no Hub id|not in the local cache|Repo id"),
        (".", "config.json"),
    ],
)
def test_an_encoder_that_cannot_be_read_is_told_as_pipelines_are(source, why, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=why) as raised:
        read_encoder(source, "ella", "encoder")
    assert re.match(rf"plugin 'ella': encoder = '{re.escape(source)}': no text encoder", str(raised.value))


def test_no_code_of_a_repository_is_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}))
    with pytest.raises(ConfigError, match="no text encoder"):
        read_encoder(tmp_path, "x", "encoder")
    assert not ran.exists()


# the command --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch):
    monkeypatch.setattr(registry, "find", lambda name: {"reads": Reads, "probe": Probe}[name])
    monkeypatch.setenv("COLUMNS", "140")
    return lambda *words: CliRunner().invoke(app, ["weights", "check", *map(str, words)])


def test_the_command_says_what_a_file_is(say, tmp_path, monkeypatch):
    path = tmp_path / "ella.safetensors"
    state = ELLA.synthetic(path=path)
    monkeypatch.setattr("safetensors.safe_open.get_tensor", None, raising=False)
    result = say("reads", path)
    assert result.exit_code == 0, result.output
    assert "93 of 93 keys fit reads; n = 4, d = 8" in result.output
    assert re.search(r"connector\.perceiver_blocks\.\*\.attn\.in_proj_weight +\[24, 8\] +float32 +6", result.output)
    del state["connector.latents"]
    save_file(state, path)
    result = say("reads", path)
    assert result.exit_code == 2
    assert "missing (1):\n    connector.latents: [n, d = 8]" in result.stderr
    assert say("reads", tmp_path / "no.pt").exit_code == 2
    for words, error in [(["probe", path], "reads no published weights"), (["reads", path, "--knob", "x"], "reads weights")]:
        result = say(*words)
        assert result.exit_code == 2
        assert error in result.stderr


def test_the_group_has_help():
    result = CliRunner().invoke(app, ["weights", "--help"])
    assert "check" in result.output
    assert "torch" in sys.modules
