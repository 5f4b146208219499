"""Mistakes that newcomers make: each is told in one readable line that names the right thing, before anything is lost."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import load_pipeline
from diffgraft.cli import values
from diffgraft.cli.mistakes import SYNONYMS, is_ours, kept, translated
from diffgraft.installed import registry
from diffgraft.installed.errors import (
    ConfigError,
    DiffgraftError,
    ForeignError,
    OutputError,
    PipelineNotFound,
    PluginNotFound,
    choices,
    nearest,
)
from diffgraft.installed.registry import find_need
from diffgraft.kernel.loading import refuse_near_misses
from diffgraft.lab import machine
from diffgraft.methods.named import find_callable
from diffgraft.stacks.report import PluginReport
from diffgraft.testing import runs
from diffgraft.testing.setting import USUAL
from probes import generate, tiny
from test_loading import Cache, Scale


@pytest.fixture
def sd():
    return tiny("StableDiffusionPipeline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "sd"
    tiny("StableDiffusionPipeline")[0].save_pretrained(place)
    return place


# sentences


def test_nearest_ends_its_sentence():
    assert nearest("aple", ["apple"]) == "; did you mean 'apple'?"
    assert nearest("xyz", ["apple"]) == "."
    assert choices("aple", ["apple"], "Known") == "; did you mean 'apple'? Known: apple."
    assert choices("xyz", [], "Known") == ". Known: none."


@pytest.mark.parametrize("word", ["zzzzzz", "deepcach", "emoji-sdd", "trajectry"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda word: registry.find(word),
        lambda word: registry.find_bundled(word),
        lambda word: find_need(word, "x"),
        lambda word: find_callable("reward", word, "diffgraft.rewards", "reward", ("images", "prompts")),
        lambda word: Scale(**{word: 1}),
        lambda word: load_pipeline(tiny("StableDiffusionPipeline")[0], attention_backend=word),
        lambda word: load_pipeline(tiny("StableDiffusionPipeline")[0]).plugins.remove(word),
        lambda word: values.plugin_specs(["sparse"], [f"{word}.every=1"]),
        lambda word: values.make_fitness(word, None, None, None, 5, None),
        lambda word: __import__("diffgraft.community.catalogue").community.catalogue.shipped().search([word + "qq"]),
    ],
)
def test_no_sentence_runs_into_the_next(ask, word):
    with pytest.raises(DiffgraftError) as raised:
        ask(word)
    starts = "In it|Bundled|It takes|Known|Installed|Knobs|On it|A family|Otherwise|Or|There are|`diffgraft"
    joins = re.findall(rf"[\w'\")] (?:{starts})\b", str(raised.value))
    assert not joins, str(raised.value)
    assert f"pip install diffgraft-{word}" not in str(raised.value)


# keywords and forms


@pytest.mark.parametrize("word", ["plugin", "pluggins", "Plugins", "plug_ins", "attention_backends", "attn_backend", "backend"])
def test_a_misspelt_keyword_is_not_swallowed(sd, word):
    right = "plugins" if "plug" in word.lower() else "attention_backend"
    for pipeline in ("no/such", sd[0]):
        with pytest.raises(ConfigError, match=rf"{word}= .* did you mean {right}="):
            load_pipeline(pipeline, **{word: ["deepcache"]})


THEIRS = """cache_dir force_download proxies local_files_only token revision torch_dtype dtype custom_pipeline custom_revision provider
sess_options provider_options device_map max_memory offload_folder offload_state_dict low_cpu_mem_usage variant use_safetensors
use_onnx load_connected_pipeline quantization_config use_flashpack disable_mmap trust_remote_code unet vae transformer text_encoder
tokenizer scheduler safety_checker feature_extractor image_encoder controlnet requires_safety_checker"""


def test_the_keywords_of_diffusers_pass():
    refuse_near_misses(THEIRS.split())


ADDED: list[Any] = ["scale", ("scale", {"strength": 0.5}), Scale, Scale(strength=0.5), ["scale"], [("scale", {})], {"scale": None}]


@pytest.mark.parametrize("form", ADDED, ids=[str(number) for number in range(len(ADDED))])
def test_add_takes_every_form_that_load_pipeline_takes(sd, form, monkeypatch):
    monkeypatch.setattr(registry, "find", {"scale": Scale}.__getitem__)
    stack = load_pipeline(sd[0]).plugins
    stack.add(form)
    assert stack.list() == ("scale",)
    stack.clear()
    assert load_pipeline(sd[0], plugins=form).plugins.list() == ("scale",)


@pytest.mark.parametrize("form", [None, 3, [3], {"scale": 3}, {"scale": {3: 1}}, ("scale", {"strenght": 1})], ids=str)
def test_add_refuses_the_rest_in_our_words(sd, form, monkeypatch):
    monkeypatch.setattr(registry, "find", {"scale": Scale}.__getitem__)
    stack = load_pipeline(sd[0]).plugins
    with pytest.raises(ConfigError):
        stack.add(form)
    assert stack.list() == ()


def test_plugins_are_named_by_name_class_instance_or_list(sd):
    stack = load_pipeline(sd[0], plugins=[Scale, Cache]).plugins
    stack.disable([Scale])
    assert "scale (disabled)" in repr(stack)
    stack.enable(stack["scale"], "cache")
    assert "disabled" not in repr(stack)
    stack.configure(Scale, strength=0.5)
    assert (stack[Scale].config.strength, Scale in stack) == (0.5, True)
    with pytest.raises(ConfigError, match="names 2 plugins"):
        stack.configure(["scale", "cache"], strength=1)
    with pytest.raises(ConfigError, match="names no plugin"):
        stack.remove(3)
    with pytest.raises(PluginNotFound, match=r"On it: scale, cache\."):
        stack.remove("scale", "nope")
    stack.remove(["scale", Cache])
    assert stack.list() == ()


# reports


def test_the_report_says_who_did_what_and_who_did_nothing(sd):
    pipe, kwargs = sd
    stack = load_pipeline(pipe, plugins=[Scale(strength=0.5), Cache]).plugins
    assert str(stack.report()) == "no run yet"
    stack.disable("cache")
    generate(pipe, kwargs)
    text = str(stack.report())
    assert "  scale: called 4 times at denoise; scaled 4" in text
    assert text.endswith("disabled: cache")
    with stack.disabled():
        generate(pipe, kwargs)
    assert str(stack.report()).startswith("no plugin was active in the last run: all were disabled (scale, cache)")
    stack.remove("scale", "cache")
    generate(pipe, kwargs)
    assert str(stack.report()).startswith("no plugin was active in the last run: none is attached")


def test_counts_in_words():
    part = PluginReport({"block": 8, "run": 1}, {"skipped": {"cond": 3, "uncond": 1}, "computed": {"cond": 1, "uncond": 3}})
    assert str(part) == "called 8 times at block, once at run; skipped 3 of 4 (75%) in cond; skipped 1 of 4 (25%) in uncond"
    assert str(PluginReport()) == "not called in this run"


# pipelines that are not there


def test_why_a_pipeline_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(PipelineNotFound, match=r"model_index\.json"):
        load_pipeline(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PipelineNotFound, match=r"'no/such' cannot be loaded: it is not in the local cache"):
        load_pipeline("no/such", cache_dir=tmp_path)
    with pytest.raises(PipelineNotFound, match="that is no Hub id"):
        load_pipeline("no such/x y")


@pytest.mark.parametrize(
    ("name", "text"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no such repository"), ("ConnectError", "cannot be reached")],
)
def test_reasons_of_the_hub(monkeypatch, name, text):
    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise type(name, (Exception,), {})("why")
        except Exception as error:
            raise OSError("not cached") from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    with pytest.raises(PipelineNotFound, match=text):
        load_pipeline("a/b")


# the command line


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--steps", "2000"], ["--steps 2000: diffusers refused", "1000"]),
        (["--steps", "2", "-a", "guidance_rescale=x"], ["--arg guidance_rescale=x"]),
    ],
)
def test_what_diffusers_refuses_names_the_option(call, folder, words, texts):
    done = call("run", folder, "--prompt", "a", "--height", 32, "--width", 32, *words)
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1), done.output
    assert all(text in done.stderr for text in ["ForeignError", *texts])


def test_a_fault_of_ours_keeps_its_traceback(call, monkeypatch):
    def fault(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("diffgraft.cli.mistakes.is_foreign", lambda error: False)
    monkeypatch.setattr(registry, "find", fault)
    assert isinstance(call("show", "sparse").exception, KeyError)


MAKERS = (
    ("run", "owner/x", "--prompt", "a", "--out"),
    ("calibrate", "dpm_solver_v3", "--pipeline", "owner/x", "--prompt", "a", "--out"),
    ("quantise", "owner/x", "--plugin", "ptq4dm", "--bits", "w8a8", "--prompt", "a", "--out"),
    ("evolve", "autodiffusion", "--pipeline", "owner/x", "--prompt", "a", "--steps", "4", "--out"),
    ("invert", "bdia", "--pipeline", "owner/x", "--image", "a.png", "--out"),
    ("compare", "owner/x", "--plugins", "sparse", "--out"),
    ("tune", "owner/x", "--target", "psnr=30", "--trials", "1", "--out"),
    ("check", "sparse", "--badge"),
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "owner/x", "--plugin", "spars"), "no plugin 'spars' is installed; did you mean 'sparse'"),
        (("run", "emoji-sdd", "--plugin", "sparse"), "'emoji-sdd' is no bundled pipeline; did you mean 'emoji-sd'"),
        (("invert", "spars", "--pipeline", "owner/x", "--image", "a.png", "--out", "a.safetensors"), "no plugin 'spars'"),
        (("invert", "bdia", "--pipeline", "emoji-sdd", "--image", "a.png", "--out", "a.safetensors"), "'emoji-sdd' is no bundled pipeline"),
        (("compare", "owner/x", "--plugins", "spars"), "no plugin 'spars'"),
        (("tune", "owner/x", "--plugins", "spars", "--target", "psnr=30"), "no plugin 'spars'"),
    ],
)
def test_a_name_that_is_not_there_is_said_before_torch_is_loaded(call, monkeypatch, words, said):
    def load(*given: Any, **more: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(values, "load_bare", load)
    monkeypatch.setattr("importlib.metadata.EntryPoint.load", load)
    done = call(*words)
    assert (done.exit_code, said in done.stderr) == (2, True), done.output


@pytest.mark.parametrize("words", MAKERS, ids=[words[0] for words in MAKERS])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_made(call, words, monkeypatch):
    """Whatever the command makes: the way to its file is tried first."""

    def touched(*given: Any) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(values, "load_bare", touched)
    Path("taken").write_text("a file")
    suffix = {"run": ".png", "evolve": ".json", "check": ".svg"}.get(words[0], ".safetensors")
    done = call(*words, f"taken/sub/made{suffix}")
    assert (done.exit_code, f"{words[-1]}: taken is a file, not a folder" in done.stderr) == (2, True), done.output
    if words[0] not in ("compare", "tune"):
        done = call(*words, "made.xyz")
        assert (done.exit_code, f"{words[-1]} made.xyz: the name must end in" in done.stderr) == (2, True), done.output


def test_memory_tells_the_way_out():
    texts = "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"
    for error in (MemoryError(), *map(RuntimeError, texts)):
        found = translated(error, {"height": "--height 9999"})
        assert isinstance(found, ForeignError)
        assert "--height, --width" in str(found)


def test_a_picture_that_cannot_be_written_is_kept(call, folder, monkeypatch):
    real, failed = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        if not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = call("run", folder, "--prompt", "a", "--height", 32, "--width", 32, "--steps", 1, "--out", "a.png")
    assert (done.exit_code, "--out a.png: No space left on device" in done.stderr) == (2, True), done.output
    place = Path(done.stderr.strip().rpartition("kept in ")[2])
    assert (place / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="lost"):
        kept(lambda path: (_ for _ in ()).throw(OSError("full")), Path("x"))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lists_fit_and_never_cut_a_name(call, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    names = [row["name"] for row in json.loads(call("list", "--json").stdout)]
    lines = call("list").stdout.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in names)
    assert all(len(line) <= width for line in lines[: len(names) + 1])
    found = json.loads(call("search", "--json").stdout)
    text = call("search").stdout
    assert all(row["installed"] or f"pip install {row['dist']}" in text for row in found)
    assert "every" in [line.split(":")[0].split()[0] for line in call("show", "sparse").stdout.splitlines() if line.strip()]


def test_wide_shows_all(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    head = call("list", "--wide").stdout.splitlines()[0].split()
    assert head[:5] == ["name", "status", "tier", "version", "package"]


# threads


def test_runs_of_the_contract_suite_have_one_thread(monkeypatch):
    """Also those that are made while tests are collected, and compared with later ones bit for bit (Heun differed by 5e-5)."""
    family, seen = registry.families()["sd"], []
    before = torch.get_num_threads()
    pipe = runs.tiny(family, "StableDiffusionPipeline").pipe
    pipe.unet.register_forward_pre_hook(lambda *given: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        runs.call(pipe, family, "StableDiffusionPipeline", USUAL)
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_threads_are_set_and_put_back(monkeypatch):
    before = torch.get_num_threads()
    with machine.threads(3) as count:
        assert (count, torch.get_num_threads()) == (3, 3)
    assert torch.get_num_threads() == before
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)
    for load, free in ((0.2, 8), (12.0, 4), (40.0, 1)):
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, load, load))
        assert machine.free_cores() == free
        assert (machine.busy() is None) == (load < 8)


@pytest.mark.parametrize(
    ("file", "ours"),
    [
        ("diffgraft/.venv/lib/python3.11/site-packages/torch/nn/modules/conv.py", False),
        ("diffgraft/core/diffgraft/kernel/run.py", True),
        ("diffgraft/core/tests/test_foreign.py", False),
        ("env/lib/python3.11/site-packages/diffgraft_deepcache/deep/hooks.py", True),
        ("lib/python3.11/json/decoder.py", False),
    ],
)
def test_a_checkout_called_diffgraft_makes_nobodys_files_ours(file, ours, tmp_path):
    for package in ("diffgraft/core/diffgraft", "env/lib/python3.11/site-packages/diffgraft_deepcache"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    assert is_ours(str(tmp_path / file)) == ours


# the command line's own words


@pytest.mark.parametrize(("word", "meant"), [("info", "show"), ("quantize", "quantise"), ("lst", "list")])
def test_a_command_that_is_called_otherwise(call, word, meant):
    told = call(word, "x")
    assert told.exit_code == 2
    assert f"No such command '{word}'. Did you mean '{meant}'" in told.output


def test_synonyms_are_no_commands_and_mean_some():
    from diffgraft.cli import app
    from typer.main import get_command

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


@pytest.mark.parametrize("words", [("-v", "list"), ("list", "-v"), ("list", "--verbose"), ("list", "--json", "-v")])
def test_verbose_stands_before_or_after_the_command(call, words, monkeypatch):
    levels = []
    monkeypatch.setattr("diffgraft.cli.listing.offers", lambda group: levels.append(logging.getLogger("diffgraft").level) or [])
    before = logging.getLogger("diffgraft").level
    assert call(*words).exit_code == 0
    assert levels == [logging.INFO]
    assert logging.getLogger("diffgraft").level == before
