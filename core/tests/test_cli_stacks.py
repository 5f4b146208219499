"""Stack files and presets on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from diffgraft import ConfigError, PluginNotFound, Unsupported
from diffgraft.cli.values import plugin_specs, specs_for
from PIL import Image, ImageChops
from probes import tiny

SIZE = ("--height", 64, "--width", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny pipeline."""
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny("StableDiffusionPipeline")[0].save_pretrained(path)
    return path


def written(text="- {name: sparse, knobs: {every: 3}}\n- {name: idle, enabled: false}\n", family="sd"):
    Path("s.yaml").write_text(f"diffgraft_stack: 1\nfamily: {family}\nplugins:\n{text}")
    return "s.yaml"


@pytest.mark.parametrize("command", [("run", "--prompt", "a"), ("compare", "--prompt", "a")])
def test_a_wrong_knob_of_a_stack_file_names_the_file(call, folder, command):
    name, *words = command
    told = call(name, folder, *words, "--stack", written("- {name: sparse, knobs: {every: 0}}\n"), "--out", "o.png")
    assert told.exit_code == 2
    assert "ConfigError: s.yaml: plugin 'sparse': every = 0" in told.output
    told = call(name, folder, *words, "--stack", written("- {name: sparse, knobs: {evry: 2}}\n"), "--out", "o.png")
    assert "ConfigError: s.yaml: plugin 'sparse'" in told.output
    assert "did you mean 'every'" in told.output


def test_a_wrong_knob_of_the_command_names_no_file(call, folder):
    told = call("run", folder, "--prompt", "a", "--stack", written(), "-o", "sparse.every=0", "--out", "o.png")
    assert told.exit_code == 2
    assert "s.yaml" not in told.output


def test_run_takes_a_stack_file(call, folder):
    common = ["run", folder, "--prompt", "a red apple", "--steps", 6, *SIZE]
    result = call(*common, "--stack", written(), "--out", "a.png")
    assert result.exit_code == 0, result.output
    assert "skipped 4 of 6 (67%)" in result.stdout
    assert "idle" not in result.stdout
    assert call(*common, "-p", "sparse", "-o", "sparse.every=3", "--out", "b.png").exit_code == 0
    with Image.open("a.png") as one, Image.open("b.png") as two:
        assert ImageChops.difference(one, two).getbbox() is None
    assert "the same, bit for bit" in call("again", "a.png").stdout
    result = call(*common, "--stack", "s.yaml", "-o", "sparse.every=2", "--out", "c.png")
    assert "skipped 3 of 6" in result.stdout


def test_more_plugins_stand_inside_the_files(call, folder):
    assert specs_for(str(folder), ["idle"], ["sparse.every=4"], written()) == [("sparse", {"every": 4}), ("idle", {})]
    with pytest.raises(ConfigError, match=r"--plugin sparse: it is in the stack file already; -o sparse\.KNOB=VALUE"):
        specs_for(str(folder), ["sparse"], None, "s.yaml")
    with pytest.raises(Unsupported, match="made for the family 'flux'"):
        specs_for(str(folder), None, None, written(family="flux"))
    with pytest.raises(PluginNotFound, match="zz is not installed"):
        specs_for(str(folder), None, None, written("- {name: zz}\n"))


def test_a_mistake_is_one_line(call, folder):
    for command in ("run", "compare"):
        result = call(command, folder, "--stack", "none.yaml")
        assert result.exit_code == 2
        assert "ConfigError: there is no stack file none.yaml" in result.stderr
    assert "give --plugins a,b or --stack FILE" in call("compare", folder).stderr


def test_compare_takes_a_stack_file(call, folder):
    words = ["compare", folder, "--stack", written(), "--prompt", "a", "--steps", 3, "--repeats", 1, "--warmup", 0, *SIZE, "--out", "out"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    arms = [arm["arm"]["name"] for arm in json.loads(Path("out/compare.json").read_text())["arms"]]
    assert arms[:2] == ["baseline", "sparse"]


def test_presets(call, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "cli_test_plugins", raising=False)
    site = tmp_path / "site"
    (site / "cli_test_plugins").mkdir()
    (site / "cli_test_plugins.py").rename(site / "cli_test_plugins" / "__init__.py")
    (site / "cli_test_plugins" / "presets").mkdir()
    text = "diffgraft_preset: 1\nmodels: big-.*\nknobs: {every: 5}\nsource: {kind: measured, where: here, command: make it}\ntested: true\n"
    (site / "cli_test_plugins" / "presets" / "fast.yaml").write_text(text)
    shown = call("presets", "sparse").stdout
    for word in ("sparse:fast", "tested", "every=5", "models   big-.*", "measured here: here", "command  make it"):
        assert word in shown
    assert json.loads(call("presets", "sparse", "--model", "big-one", "--json").stdout)[0]["knobs"] == {"every": 5}
    assert call("presets", "sparse", "--model", "small").stdout == "no preset of sparse for small\n"
    assert plugin_specs(["sparse:fast", "idle"], ["sparse.mode=x"]) == [("sparse", {"every": 5, "mode": "x"}), ("idle", {})]
    (site / "cli_test_plugins" / "presets" / "fast.yaml").write_text("knobs: {}\n")
    result = call("presets")
    assert result.exit_code == 0
    assert "presets/fast.yaml of cli_test_plugins is no preset" in result.stderr
    assert call("presets", "sparse").exit_code == 2
