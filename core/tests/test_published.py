"""Files with weights of others: nothing of them is run, what is damaged is told, what fits comes whole; and text encoders."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile

import pytest
import torch
from diffgraft import ArtefactMismatch, BrokenPlugin, ConfigError, Need, load_pipeline
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.methods.encoders import Encoder, follow, read_encoder
from diffgraft.methods.published import Weights, compare, read_weights
from layouts_of import ELLA, RCM
from probes import PluginConfig, Probe, tiny, trace
from pydantic import Field
from safetensors.torch import save_file
from typer.testing import CliRunner

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
        (tmp_path, "that is a folder"),
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
    other = tmp_path / "of_another_method.safetensors"
    save_file({f"router.{i}.weight": torch.zeros(7, 3) for i in range(40)}, other)
    for plugin, error in [
        (Reads(weights=Weights(damaged)), r"reads: weights = \(in memory\) is not as reads reads it(.|\n)*connector.latents"),
        (Reads(weights=other), "weights = .*of_another_method.safetensors: this looks like no file of reads: 0 of "),
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
