"""The command line: what it prints, what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from cli_plugins import install
from diffgraft import Bundled
from diffgraft.cli.measuring import choose_samples
from diffgraft.cli.values import parse_assignments, parse_seeds, parse_value, plugin_specs
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.lab.recipes import read_record
from diffgraft_pipelines.tiny import make
from diffusers import DiTPipeline
from PIL import Image

SIZE = ["--height", "64", "--width", "64"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines saved as plain diffusers folders."""
    home = tmp_path_factory.mktemp("pipelines")
    names = {"sd": "StableDiffusionPipeline", "dit": "DiTPipeline", "pixel": "DDIMPipeline", "wan": "WanPipeline"}
    for short, name in names.items():
        make(name).pipe.save_pretrained(home / short)
    named_dit().save_pretrained(home / "named")
    return home


def named_dit():
    """A tiny DiT whose classes have names, also after saving."""
    names = {3: "cat", 207: "hound, dog"}
    pipe = DiTPipeline(**make("DiTPipeline").pipe.components, id2label=names)
    pipe.register_to_config(id2label=names)
    return pipe


# list, show, doctor


def test_list(call, monkeypatch):
    rows = {row["name"]: row for row in json.loads(call("list", "--json").stdout)}
    assert rows["sparse"] == {
        "name": "sparse", "summary": "Made for a test", "version": "1.2", "dist": "diffgraft-cli-test", "tier": None,
        "allowed": True, "status": "ok", "reason": None, "tried": False,
    }  # fmt: skip
    assert rows["nowhere"]["status"] == "broken"
    assert "cli_nowhere" in rows["nowhere"]["reason"]
    text = call("list").stdout
    assert "sparse" in text
    assert "Made for a test" in text
    monkeypatch.setenv(registry.ALLOW, "idle")
    rows = {row["name"]: row for row in json.loads(call("list", "--json").stdout)}
    assert (rows["sparse"]["allowed"], rows["sparse"]["status"]) == (False, "not allowed")
    assert rows["idle"]["status"] == "ok"


def test_markdown_table(call):
    result = call("list", "--markdown")
    row = next(line for line in result.stdout.splitlines() if line.startswith("| `sparse`"))
    assert "[A test](https://arxiv.org/abs/0000.00001)" in row
    assert "all families" in row
    assert "skips denoiser" in row
    assert "`every` (2)" in row
    assert "its own fault" in result.stderr
    assert "`broken`" not in result.stdout


def test_show(call):
    text = call("show", "sparse").stdout
    for word in ("A test", "0000.00001", "what a test needs", "denoise", "skips denoiser", "every", ">= 1", "run the denoiser", "every=1"):
        assert word in text
    facts = json.loads(call("show", "sparse", "--json").stdout)
    assert facts["knobs"][0] == {
        "name": "every", "allowed": "integer, >= 1", "default": 2, "description": "run the denoiser every N-th call"
    }  # fmt: skip
    assert facts["hook_points"] == ["denoise"]
    assert facts["neutral"] == {"every": 1}
    assert facts["dist"] == "diffgraft-cli-test"
    assert "StableDiffusionPipeline" in facts["pipelines"]


def test_doctor_tells_what_is_broken(call, monkeypatch):
    result = call("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["ok"] is False
    checks = {check["name"]: check for check in found["plugins"]}
    assert checks["sparse"]["status"] == "ok"
    assert "RuntimeError: its own fault" in checks["broken"]["detail"]
    assert "contract 99" in checks["old_contract"]["detail"]
    assert found["versions"]["torch"]
    assert "native" in found["backends"]
    assert {check["status"] for check in found["families"]} == {"ok"}
    monkeypatch.setenv(registry.ALLOW, "idle,sparse")
    found = json.loads(call("doctor", "--json").stdout)
    checks = {check["name"]: check["status"] for check in found["plugins"]}
    assert (checks["idle"], checks["broken"]) == ("ok", "not allowed")
    assert found["allowed"] == ["idle", "sparse"]
    text = call("doctor").stdout
    assert "only idle, sparse" in text
    assert "StableDiffusionPipeline" in text


def test_doctor_without_a_family_does_not_say_that_all_is_well(call, monkeypatch):
    monkeypatch.setattr(registry, "load_families", lambda **_: ({}, {}))
    monkeypatch.setattr("diffgraft.lab.doctor.offers", lambda group: [])
    result = call("doctor")
    assert result.exit_code == 1
    assert "`pip install diffgraft-families`" in result.stderr
    assert "all is well" not in result.output
    assert "`pip install diffgraft-deepcache` brings one" in result.stdout
    found = json.loads(call("doctor", "--json").stdout)
    assert (found["ok"], len(found["missing"])) == (False, 1)


PROBE = """
import sys
from diffgraft.cli import app
sys.argv = ["diffgraft", *{words!r}]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
slow = {{"torch", "diffusers", "transformers", "numpy", "scipy", "PIL", "safetensors", "huggingface_hub", "matplotlib"}}
heavy = sorted(set(sys.modules) & (slow | {{"cli_test_plugins", "cli_broken", "diffgraft_deepcache"}}))
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["list"], ["list", "--json"]], ids=" ".join)
def test_list_imports_no_torch_and_no_plugin(tmp_path, words):
    install(tmp_path)
    path = [str(tmp_path), *[p for p in sys.path if p]]
    code = f"import sys; sys.path[:0] = {path!r}\n" + PROBE.format(words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sparse" in done.stdout


def test_version(call):
    from diffgraft import __version__

    assert call("--version").stdout.strip() == f"diffgraft {__version__}"


# run


def test_run_with_a_plugin(call, folders):
    result = call(
        "run", folders / "sd", "--prompt", "a red apple", "-p", "sparse", "-o", "sparse.every=3", "--steps", 6, *SIZE, "--out", "deep/a.png"
    )
    assert result.exit_code == 0, result.output
    assert "6 steps" in result.stdout
    assert "skipped 4 of 6 (67%)" in result.stdout
    assert "wrote deep/a.png" in result.stdout
    with Image.open("deep/a.png") as image:
        assert image.size == (64, 64)


def test_run_is_the_users_own_call(call, folders):
    """Without plugins and with a neutral one, picture i of several is that of seed + i."""
    common = ["--prompt", "a red apple", "--negative-prompt", "blurry", "--steps", 2, "--guidance-scale", 3, *SIZE]
    assert call("run", folders / "sd", *common, "--seed", 4, "--num-images", 2, "--out", "a.png").exit_code == 0
    assert call("run", folders / "sd", *common, "--seed", 5, "-p", "idle", "-o", "idle.off=true", "--out", "b.png").exit_code == 0
    with Image.open("a-1.png") as one, Image.open("b.png") as two:
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_run_without_a_prompt(call, folders):
    assert call("run", folders / "dit", "--class-label", 7, "--steps", 2, "--out", "a.png").exit_code == 0
    assert call("run", folders / "pixel", "--steps", 2, "--plugin", "idle", "--out", "b.jpg").exit_code == 0
    with Image.open("b.jpg") as image:
        assert image.format == "JPEG"


def test_a_class_is_named_or_numbered(call, folders):
    for label, name in (("dog", "a.png"), ("207", "b.png"), ("cat", "c.png")):
        result = call("run", folders / "named", "--class-label", label, "--steps", 2, "--out", name)
        assert result.exit_code == 0, result.output
    with Image.open("a.png") as named, Image.open("b.png") as numbered, Image.open("c.png") as other:
        assert named.tobytes() == numbered.tobytes() != other.tobytes()
    assert read_record(Path("a.png")).recipe.class_label == [207], "in the file by number, for whom has other names"
    assert call("again", "a.png").exit_code == 0
    result = call("run", folders / "named", "--class-label", "catt", "--out", "d.png")
    assert result.exit_code == 2
    assert "class label = 'catt': DiTPipeline knows none of that name; did you mean 'cat'?" in result.stderr
    result = call("run", folders / "dit", "--class-label", "cat", "--out", "d.png")
    assert "its classes have no names; give a number" in result.stderr
    assert "StableDiffusionPipeline takes no class label" in call("run", folders / "sd", "--prompt", "a", "--class-label", 1).stderr


def test_run_writes_videos(call, folders):
    common = [folders / "wan", "--prompt", "a cat", "--steps", 2, *SIZE, "-a", "num_frames=5", "-a", "max_sequence_length=16"]
    for name in ("a.gif", "a.png"):
        result = call("run", *common, "--out", name)
        assert result.exit_code == 0, result.output
    with Image.open("a.gif") as video, Image.open("a.png") as sheet:
        assert video.n_frames == 5
        assert sheet.size == (3 * 64, 2 * 64)


# bad input

RUN = ["run", "{sd}", "--prompt", "a", "--out", "x/a.png"]
BAD = {
    "unknown plugin": ([*RUN, "-p", "sparze"], ["PluginNotFound", "sparze", "did you mean 'sparse'", "diffgraft search"]),
    "unknown knob": ([*RUN, "-p", "sparse", "-o", "sparse.evry=2"], ["ConfigError", "'evry'", "did you mean 'every'"]),
    "value out of range": ([*RUN, "-p", "sparse", "-o", "sparse.every=0"], ["ConfigError", "every = 0", "greater than or equal to 1"]),
    "value of another type": ([*RUN, "-p", "sparse", "-o", "sparse.every=often"], ["ConfigError", "every = 'often'"]),
    "wrong family": ([*RUN, "-p", "only_transformers"], ["Unsupported", "StableDiffusionPipeline", "dit"]),
    "clash": ([*RUN, "-p", "sparse,rival"], ["Conflict", "sparse and rival both skip denoiser", "remove one"]),
    "twice": ([*RUN, "-p", "sparse", "-p", "sparse"], ["Conflict", "sparse is in the list 2 times"]),
    "broken plugin": ([*RUN, "-p", "broken"], ["BrokenPlugin", "its own fault"]),
    "plugin without a module": ([*RUN, "-p", "nowhere"], ["BrokenPlugin", "cli_nowhere"]),
    "other contract": ([*RUN, "-p", "old_contract"], ["BrokenPlugin", "contract 99"]),
    "no such pipeline": (["run", "emoji-sdd", "--prompt", "a", "--out", "x/a.png"], ["PipelineNotFound", "did you mean 'emoji-sd'"]),
    "empty folder": (["run", "{empty}", "--prompt", "a", "--out", "x/a.png"], ["PipelineNotFound", "model_index.json"]),
    "config for another plugin": (
        [*RUN, "-p", "sparse", "-o", "idle.off=true"],
        ["ConfigError", "'idle' is not in the list", "In it: sparse"],
    ),
    "option without a value": ([*RUN, "-p", "sparse", "-o", "sparse.every"], ["ConfigError", "name=value"]),
    "option without a plugin": ([*RUN, "-p", "sparse", "-o", "every=2"], ["ConfigError", "plugin.knob=value"]),
    "no prompt": (["run", "{sd}", "--out", "x/a.png"], ["ConfigError", "needs a prompt"]),
    "bad suffix": ([*RUN[:-1], "x/a.bmpx"], ["ConfigError", ".png"]),
    "no such device": ([*RUN, "--device", "cuda:77"], ["ConfigError", "cuda:77"]),
    "nonsense device": ([*RUN, "--device", "toaster"], ["ConfigError", "toaster"]),
    "nonsense dtype": ([*RUN, "--dtype", "int4"], ["ConfigError", "int4", "bfloat16"]),
    "nonsense backend": ([*RUN, "--backend", "nativ"], ["Unsupported", "nativ", "native"]),
    "odd height": ([*RUN, "--height", "63", "--width", "64"], ["ConfigError", "refused the call", "divisible by 8"]),
    "height alone": ([*RUN, "--height", "64"], ["ConfigError", "--height and --width go together"]),
    "argument it does not take": ([*RUN, "-a", "num_frames=4"], ["ConfigError", "takes no num_frames"]),
    "no such image": ([*RUN, "--image", "no.png"], ["ConfigError", "no.png"]),
    "prompt for pixels": (["run", "{pixel}", "--prompt", "a", "--out", "x/a.png"], ["ConfigError", "takes no prompt"]),
    "compare nothing": (["compare", "{sd}", "--prompt", "a", "--out", "x"], ["ConfigError", "--plugins"]),
    "compare a clash": (
        ["compare", "{sd}", "--plugins", "sparse,rival", "--prompt", "a", "--out", "x"],
        ["Conflict", "both skip denoiser"],
    ),
    "compare without prompts": (["compare", "{sd}", "--plugins", "sparse", "--out", "x"], ["ConfigError", "needs a prompt"]),
    "compare, bad seeds": (["compare", "{sd}", "--plugins", "sparse", "--seeds", "a", "--out", "x"], ["ConfigError", "--seeds"]),
    "compare, no prompt file": (["compare", "{sd}", "--plugins", "sparse", "--prompts", "no.txt", "--out", "x"], ["ConfigError", "no.txt"]),
    "invert what cannot": (["invert", "sparse", "--pipeline", "{sd}", "--image", "x.png"], ["Unsupported", "cannot invert", "bdia"]),
    "calibrate what cannot": (["calibrate", "sparse", "--pipeline", "{sd}", "--prompt", "x"], ["Unsupported", "be calibrated; installed"]),
    "calibrate on nothing": (["calibrate", "dpm_solver_v3", "--pipeline", "{sd}"], ["ConfigError", "--class-label CLASS", "--samples N"]),
    "quantise what cannot": (
        ["quantise", "{sd}", "-p", "sparse", "--bits", "w8a8", "--prompt", "x"],
        ["Unsupported", "sparse quantises nothing after a calibration; installed plugins that do"],
    ),
    "evolve what cannot": (["evolve", "sparse", "--pipeline", "{sd}", "--prompt", "x", "--steps", "2"], ["Unsupported", "be searched"]),
    "show unknown": (["show", "sparze"], ["PluginNotFound", "did you mean 'sparse'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(call, folders, tmp_path, case):
    words, expected = BAD[case]
    (tmp_path / "empty").mkdir()
    places = {"sd": folders / "sd", "pixel": folders / "pixel", "empty": tmp_path / "empty"}
    result = call(*[word.format(**places) for word in words])
    assert result.exit_code == 2, result.output
    for text in expected:
        assert text in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == (2 if "Conflict" in expected else 1)
    assert result.stdout == ""
    assert not list((tmp_path / "work").iterdir())


def test_a_plugin_that_is_not_allowed(call, folders, monkeypatch):
    monkeypatch.setenv(registry.ALLOW, "idle")
    result = call("run", folders / "sd", "--prompt", "a", "-p", "sparse")
    assert result.exit_code == 2
    assert "does not allow it" in result.stderr


def test_a_file_in_the_way(call, folders, tmp_path):
    (tmp_path / "work" / "x").write_text("mine")
    result = call("run", folders / "sd", "--prompt", "a", "--out", "x/a.png")
    assert result.exit_code == 2
    assert "is a file, not a folder" in result.stderr
    assert (tmp_path / "work" / "x").read_text() == "mine"


# compare


def test_compare_writes_and_tells(call, folders, tmp_path):
    (tmp_path / "work" / "prompts.txt").write_text("a red apple\n\na green pear\n")
    words = ["compare", folders / "sd", "--plugins", "sparse,idle", "-o", "sparse.every=3", "--prompts", "prompts.txt", "--out", "out/deep"]
    result = call(*words, "--steps", 6, "--repeats", 1, "--warmup", 0, *SIZE)
    assert result.exit_code == 0, result.output
    for text in (
        "sparse + idle",
        "speed-up",
        "GMAC",
        "PSNR",
        "SSIM",
        "4 of 6 calls",
        "idle changed nothing",
        "steps at equal time",
        "compare.png",
    ):
        assert text in result.stdout
    raw = json.loads((tmp_path / "work/out/deep/compare.json").read_text())
    arms = {arm["arm"]["name"]: arm for arm in raw["arms"]}
    assert list(arms)[:4] == ["baseline", "sparse", "idle", "sparse + idle"]
    assert arms["sparse"]["macs"]["limit"] == 3
    assert arms["baseline"]["macs"]["per_run"] == 3 * arms["sparse"]["macs"]["per_run"]
    assert [s["prompt"] for s in raw["settings"]["samples"]] == ["a red apple", "a green pear"]
    assert [s["seed"] for s in raw["settings"]["samples"]] == [0, 1]
    with Image.open(tmp_path / "work/out/deep/compare.png") as grid:
        assert grid.width > 3 * 192
        assert grid.height > 5 * 64
    assert sorted(p.name for p in (tmp_path / "work/out/deep").iterdir()) == ["compare.json", "compare.png"]


class YesJudge:
    def score(self, images, prompts):
        return {"object": [True] * len(images)}


def test_compare_a_bundled_pipeline(call, folders, tmp_path, monkeypatch):
    """Its prompts, steps, guidance scale and judge are used without being named."""
    bundled = Bundled("tiny-sd", str(folders / "sd"), ("a red apple", "a green pear"), f"{__name__}:YesJudge", steps=3, guidance_scale=4.0)
    monkeypatch.setattr(registry, "bundled_names", lambda: ["tiny-sd"])
    monkeypatch.setattr(registry, "find_bundled", {"tiny-sd": bundled}.__getitem__)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.SimpleNamespace(YesJudge=YesJudge))
    result = call("compare", "tiny-sd", "--plugins", "sparse", "--num-prompts", 3, "--repeats", 1, "--warmup", 0, "--out", "out", *SIZE)
    assert result.exit_code == 0, result.output
    assert "3/3 (44-100 %)" in result.stdout
    raw = json.loads((tmp_path / "work/out/compare.json").read_text())
    assert [arm["arm"]["kind"] for arm in raw["arms"]] == ["baseline", "plugin", "fewer_steps"]  # one plugin is the stack
    assert (raw["settings"]["steps"], raw["settings"]["call"]["guidance_scale"], raw["settings"]["batch"]) == (3, None, 8)
    assert raw["environment"]["call_defaults"] == {"num_inference_steps": 3, "guidance_scale": 4.0}
    assert [s["prompt"] for s in raw["settings"]["samples"]] == ["a red apple", "a green pear", "a red apple"]


def test_an_interrupted_compare_keeps_what_it_has(call, folders, tmp_path, monkeypatch):
    from diffgraft.lab.compare import Bench

    def interrupted(self, arms):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "make_all", interrupted)
    (tmp_path / "work/out").mkdir()
    (tmp_path / "work/out/compare.png").write_bytes(b"of an earlier one")
    given = ["--plugins", "sparse", "--prompt", "a", "--repeats", 1, "--warmup", 0, "--steps", 2, "--out", "out", *SIZE]
    result = call("compare", folders / "sd", *given)
    assert result.exit_code != 0
    assert "unfinished: KeyboardInterrupt" in result.output
    assert "1 of 1 rounds are whole" in result.output
    raw = json.loads((tmp_path / "work/out/compare.json").read_text())
    assert raw["unfinished"]["error"] == "KeyboardInterrupt"
    assert [arm["arm"]["name"] for arm in raw["arms"]][:2] == ["baseline", "sparse"]
    assert raw["arms"][1]["latency"]["seconds"]["p50"] > 0
    assert not (tmp_path / "work/out/compare.png").exists()


class NameJudge:
    def score(self, images, prompts):
        return {"object": [prompt == "dog" for prompt in prompts]}


@pytest.mark.parametrize("words", [["--class-label", "hound", "--class-label", "3", "--class-label", "7"], ["--class-label", "dog"]])
def test_a_judge_reads_the_name_of_a_class(call, folders, tmp_path, monkeypatch, words):
    bundled = Bundled("tiny-dit", str(folders / "named"), judge=f"{__name__}:NameJudge", steps=2)
    monkeypatch.setattr(registry, "bundled_names", lambda: ["tiny-dit"])
    monkeypatch.setattr(registry, "find_bundled", {"tiny-dit": bundled}.__getitem__)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.SimpleNamespace(NameJudge=NameJudge))
    result = call("compare", "tiny-dit", "--plugins", "sparse", *words, "--repeats", 1, "--warmup", 0, "--out", "out")
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "work/out/compare.json").read_text())
    several = len(words) > 2
    assert [(s["class_label"], s["class_name"]) for s in raw["settings"]["samples"]] == (
        [(207, "dog"), (3, "cat"), (7, None)] if several else [(207, "dog")]
    )
    assert (raw["arms"][0]["verdicts"] is None) == several, "of a class without a name nobody can say whether it is right"
    if not several:
        assert raw["arms"][0]["verdicts"]["raw"] == {"object": [True]}


def test_choice_of_samples():
    choose = choose_samples
    assert choose(["a", "b"], True, None, None, False) == [("a", 0), ("b", 1)]
    assert choose(["a", "b"], True, None, 3, False) == [("a", 0), ("b", 1), ("a", 2)]
    assert choose(["a", "b"], True, [5, 6], None, False) == [("a", 5), ("b", 5), ("a", 6), ("b", 6)]
    assert len(choose(["a", "b"], False, None, None, True)) == 24
    assert choose([], False, None, 2, False) == [(None, 0), (None, 1)]


# values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.3", 0.3),
        ("true", True),
        ("null", None),
        ("often", "often"),
        ("[1, 2]", [1, 2]),
        ("(1, 2)", [1, 2]),
        ("(500,)", [500]),
        ("()", []),
        ('("ff", "attn")', ["ff", "attn"]),
        ("(a cat, a dog)", "(a cat, a dog)"),
        ("(5)", "(5)"),
        ('"5"', "5"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value


def test_options():
    specs = plugin_specs(["a,b", "c"], ["a.x=1", "c.y=z=2", "a.x=2"])
    assert specs == [("a", {"x": 2}), ("b", {}), ("c", {"y": "z=2"})]
    with pytest.raises(ConfigError, match="not in the list"):
        plugin_specs(["a"], ["b.x=1"])
    assert parse_assignments(None, "-a") == {}
    assert parse_seeds("1, 2,3") == [1, 2, 3]
