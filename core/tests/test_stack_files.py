"""Stack files: the same stack comes back bit for bit, and a file that is not right is refused before anything is touched."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_plugins import dist
from diffgraft import ArtefactMismatch, ConfigError, DiffgraftError, PluginNotFound, Unsupported, load_pipeline
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffgraft.stacks import asked, reading, references
from diffgraft.stacks.reading import read_stack
from diffgraft.stacks.schema import LARGEST
from diffgraft.stacks.writing import write_stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probes import generate, tiny, trace

SOURCE = """
from pathlib import Path
from typing import Any
from diffgraft import Effects, Need, Paper, Plugin, PluginConfig
from pydantic import Field

class Knobs(PluginConfig):
    gain: float = Field(1.0, description="g")
    times: tuple[float, ...] | None = None
    words: tuple[str, ...] = ()
    table: dict[str, Any] | None = None
    anything: Any = None
    notes: Path | None = None
    artefact: Any = None

class Holder(Plugin):
    name = "stk_holder"
    paper = Paper("A test", "0000.00001", "what a test needs")
    families = ("*",)
    Config = Knobs
    neutral = {"gain": 1.0}
    effects = Effects(edits=frozenset({"prediction"}))
    needs = (Need("artefact", "artefact"),)

    def denoise(self, call, next):
        return next(call) * self.config.gain

class Other(Holder):
    name = "stk_other"
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Two plugins in an installed package, and an empty folder to work in."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "stk_plugins.py").write_text(SOURCE)
    dist(folder, "diffgraft-stk-test", {"stk_holder": "stk_plugins:Holder", "stk_other": "stk_plugins:Other"})
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def artefact(pipe, path):
    """A real one, made for this pipeline."""
    made_for = MadeFor.describe("stk_holder", pipe, pipe.scheduler, {"unet": pipe.unet}, 4, (4, 8, 8))
    Artefact(made_for, {"w": torch.arange(3.0)}).save(path)
    return path


def test_a_stack_comes_back_bit_for_bit(sd, site):
    pipe, kwargs = sd
    knobs = {"gain": 1e-5 + 0.9, "times": (0.1, 3), "words": ("yes", "1e-05", "a: b\n"), "table": {"k": [1, None, True]}}
    load_pipeline(pipe, plugins={"stk_other": {"gain": 0.5}, "stk_holder": knobs})
    pipe.plugins.disable("stk_other")
    picture, own = generate(pipe, kwargs), pipe.plugins["stk_holder"].own_knobs
    path = pipe.plugins.save("stack.yaml", measured={"call": {"num_inference_steps": 4}, "figures": {"dB": (30.0, 29.0, 31.0)}})
    text = path.read_text()
    assert "version: '1.2'" in text
    assert "family: sd" in text
    pipe.plugins.clear()
    load_pipeline(pipe, plugins="stack.yaml")
    assert pipe.plugins["stk_holder"].own_knobs == own
    assert pipe.plugins.list() == ("stk_other", "stk_holder")
    assert "stk_other (disabled), stk_holder>" in repr(pipe.plugins)
    assert torch.equal(generate(pipe, kwargs), picture)
    assert read_stack(path).file.measured.figures == {"dB": (30.0, 29.0, 31.0)}
    again = pipe.plugins.save(Path("sub") / "again.yml")
    assert again.read_text() == text[: text.index("measured:")]


KEYS = st.text(max_size=5).filter(lambda key: not key.startswith("$"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(allow_nan=False, allow_infinity=False), st.lists(st.text(), max_size=3).map(tuple), PLAIN)
def test_whatever_knobs_hold_is_read_as_it_was(site, gain, words, anything):
    plugin = asked.build([("stk_holder", {"gain": gain, "words": words, "anything": anything})]).plugins[0]
    path = write_stack("any.yaml", [(plugin, True)], None)
    anew = asked.build(path).plugins[0]
    assert repr(anew.own_knobs) == repr(plugin.own_knobs)  # 0.0 and -0.0, 1 and True and 1.0 are told apart


def test_a_form_that_yaml_has_not_is_refused(sd, site):
    pipe = load_pipeline(sd[0], plugins={"stk_holder": {"anything": (1, 2)}})
    with pytest.raises(ConfigError, match=r"'stk_holder': knob 'anything' = \(1, 2\) would come back from a file as \[1, 2\]"):
        pipe.plugins.save("stack.yaml")
    assert not Path("stack.yaml").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (tiny, "the function tiny"),
        (torch.zeros(2), "a Tensor"),
        ({"deep": [object()]}, "a object"),
        ({"$file": "x"}, "a mapping with the key '$file'"),
    ],
)
def test_objects_cannot_be_saved(sd, site, value, told):
    pipe = load_pipeline(sd[0], plugins={"stk_holder": {"anything": value}})
    with pytest.raises(ConfigError) as error:
        pipe.plugins.save("stack.yaml")
    assert f"plugin 'stk_holder': knob 'anything' holds {told}, which no file can hold" in str(error.value)
    assert not [*Path().iterdir()]


def test_a_live_pipeline_and_a_live_artefact_cannot_be_saved(sd, site, tmp_path):
    pipe, _ = sd
    live = Artefact.load(artefact(pipe, tmp_path / "a.safetensors"), "stk_holder")
    for knobs, told in ({"anything": pipe}, f"a {type(pipe).__name__}"), ({"artefact": live}, "a Artefact"):
        load_pipeline(pipe, plugins={"stk_holder": knobs})
        with pytest.raises(ConfigError, match=told):
            pipe.plugins.save("stack.yaml")
        pipe.plugins.clear()


def test_a_class_that_is_not_installed_cannot_be_saved(sd, site):
    cls = type(asked.build("stk_holder").plugins[0])
    twin = type("Twin", (cls,), {})
    pipe = load_pipeline(sd[0], plugins=[twin])
    with pytest.raises(ConfigError, match="'stk_holder' was given as a class that no installed package offers"):
        pipe.plugins.save("stack.yaml")
    with pytest.raises(ConfigError, match=r"ends in \.yaml"):
        pipe.plugins.save("stack.json")


# files that knobs name --------------------------------------------------------------------------------------------------------------------


def saved(sd, knobs, path="home/stack.yaml", **more):
    """A stack file whose plugin has these knobs."""
    pipe = load_pipeline(sd[0], plugins={"stk_holder": knobs})
    try:
        return pipe.plugins.save(path, **more)
    finally:
        pipe.plugins.clear()


def test_a_file_is_found_where_the_stack_goes(sd, site):
    made = artefact(sd[0], Path("home/cal/a.safetensors"))
    Path("home/notes.txt").write_text("n")
    path = saved(sd, {"artefact": str(made.resolve()), "notes": Path("home/notes.txt")})
    written = yaml.safe_load(path.read_text())["plugins"][0]["knobs"]
    assert written["artefact"] == {"$file": "cal/a.safetensors", "sha256": references.digest_of(made)}
    assert written["notes"]["$file"] == "notes.txt"
    shutil.move("home", "elsewhere")
    pipe = load_pipeline(sd[0], plugins=Path("elsewhere/stack.yaml"))
    assert Path(pipe.plugins["stk_holder"].config.artefact).samefile("elsewhere/cal/a.safetensors")
    assert pipe.plugins["stk_holder"].config.notes.read_text() == "n"
    pipe.plugins.clear()


def test_files_may_go_along(sd, site):
    made = artefact(sd[0], Path("far/a.safetensors"))
    Path("far/deep").mkdir()
    Path("far/deep/a.safetensors").write_text("another of that name")
    saved(sd, {"artefact": str(made), "notes": Path("far/deep/a.safetensors")}, copy_files=True)
    shutil.rmtree("far")
    assert sorted(path.name for path in Path("home").iterdir()) == ["a-1.safetensors", "a.safetensors", "stack.yaml"]
    pipe = load_pipeline(sd[0], plugins=Path("home"))
    assert pipe.plugins["stk_holder"].config.notes.read_text() == "another of that name"
    pipe.plugins.clear()


def test_what_is_no_name_of_a_file_stays_a_text(sd, site):
    Path("notes.txt").write_text("n")
    path = saved(sd, {"anything": "notes.txt", "notes": Path("a/b/gone.txt")})
    knobs = yaml.safe_load(path.read_text())["plugins"][0]["knobs"]
    assert knobs == {"anything": "notes.txt", "notes": "a/b/gone.txt"}


def test_a_tampered_file_is_refused(sd, site):
    pipe, before = sd[0], trace(sd[0])
    made = artefact(pipe, Path("home/a.safetensors"))
    path = saved(sd, {"artefact": str(made)})
    made.write_bytes(made.read_bytes() + b"x")
    with pytest.raises(
        ArtefactMismatch, match=r"home/stack\.yaml: stk_holder\.artefact: home/a\.safetensors is not the file .* says [0-9a-f]{12}\.\.\.\)"
    ):
        load_pipeline(pipe, plugins=str(path))
    made.unlink()
    with pytest.raises(ConfigError, match=r"there is no file home/a\.safetensors"):
        load_pipeline(pipe, plugins=str(path))
    assert trace(pipe) == before


# files that are not right -----------------------------------------------------------------------------------------------------------------

HOLDER = "diffgraft_stack: 1\nplugins:\n- name: stk_holder\n  knobs: {%s}\n"
FAULTS = {
    "newer": ("diffgraft_stack: 2\nstacks: []\n", ConfigError, r"written by a newer diffgraft \(stack file, schema 2; this reads 1\)"),
    "schema": ("diffgraft_stack: one\n", ConfigError, "diffgraft_stack = 'one'"),
    "other": ("name: a conda environment\n", ConfigError, "no stack file: its first line would be `diffgraft_stack: 1`"),
    "no yaml": ("{[", ConfigError, "is no stack file: ParserError"),
    "empty": ("", ConfigError, "is no stack file"),
    "binary": (b"\xff\xfe\x00\x01", ConfigError, "is no stack file: UnicodeDecodeError"),
    "large": (b"#" * (LARGEST + 1), ConfigError, "more than 2,000,000 bytes"),
    "tag": ("diffgraft_stack: 1\nplugins: !!python/object/apply:os.getcwd []\n", ConfigError, "no stack file: ConstructorError"),
    "alias": ("diffgraft_stack: 1\nmeasured: &a {}\nplugins: [*a]\n", ConfigError, "an alias"),
    "twice": ("diffgraft_stack: 1\nfamily: sd\nfamily: flux\n", ConfigError, "the key 'family' stands twice"),
    "deep": ("diffgraft_stack: 1\nplugins: " + "[" * 5000, ConfigError, "is no stack file: "),
    "field": ("diffgraft_stack: 1\nplugin: []\n", ConfigError, "no stack file of schema 1: plugin = "),
    "member": ("diffgraft_stack: 1\nplugins: [{name: ../x}]\n", ConfigError, r"plugins\.0\.name = '\.\./x'"),
    "names": ("diffgraft_stack: 1\nplugins: [{name: a}, {name: a}]\n", ConfigError, "a stands in it twice"),
    "family": ("diffgraft_stack: 1\nfamily: flux\nplugins: [{name: stk_holder}]\n", Unsupported, "for the family 'flux', and StableDiff"),
    "knob": (HOLDER % "gian: 2", ConfigError, r"bad\.yaml: plugin 'stk_holder': unknown knob 'gian'; did you mean 'gain'"),
    "value": (HOLDER % "gain: much", ConfigError, r"bad\.yaml: plugin 'stk_holder': gain = 'much'"),
    "ours": ("diffgraft_stack: 1\nplugins: [{name: deepcachf}]\n", PluginNotFound, "deepcachf is not installed; `diffgraft search`"),
    "missing": ("diffgraft_stack: 1\nplugins: [{name: zz_a, package: evil-zz}, {name: zz_b}]\n", PluginNotFound,
                "zz_a is not installed; the file says that it is of the package 'evil-zz', which nobody here has looked at.*; zz_b"),
    "absolute": (HOLDER % "notes: {$file: /etc/passwd, sha256: x}", ConfigError, "notes: '/etc/passwd': a path in a stack file is"),
    "reference": (HOLDER % "notes: {$file: x}", ConfigError, "a reference is"),
    "strange": (HOLDER % "notes: {$exec: x}", ConfigError, "a reference is"),
    "hub": (HOLDER % "notes: {$hub: x.txt, sha256: x}", ConfigError, "no file on the Hub"),
    "folder": (HOLDER % "notes: {$folder: x}", ConfigError, "there is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_right_touches_nothing(sd, site, fault):
    text, kind, told = FAULTS[fault]
    Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    pipe, before = sd[0], trace(sd[0])
    with pytest.raises(kind, match=told):
        load_pipeline(pipe, plugins="bad.yaml")
    assert trace(pipe) == before
    assert not hasattr(pipe, "plugins")
    load_pipeline(pipe, plugins=["stk_other"])
    with pytest.raises(DiffgraftError):
        pipe.plugins.add("bad.yaml")
    assert pipe.plugins.list() == ("stk_other",)
    pipe.plugins.clear()


def test_the_pip_line_of_a_plugin_of_ours(site, monkeypatch):
    monkeypatch.setattr(reading, "own_names", lambda: {"diffgraft.plugins": {"zz_known": "diffgraft-zz-known"}})
    Path("s.yaml").write_text("diffgraft_stack: 1\nplugins: [{name: zz_known, package: something-else}]\n")
    with pytest.raises(PluginNotFound, match=r"zz_known is not installed: `pip install diffgraft-zz-known`$"):
        asked.build("s.yaml")


def test_another_family_is_refused_before_a_weight_is_read(sd, site, monkeypatch):
    sd[0].save_pretrained("model")
    Path("s.yaml").write_text("diffgraft_stack: 1\nfamily: flux\nplugins: [{name: stk_holder}]\n")
    monkeypatch.setattr("diffgraft.kernel.loading.read_pipeline", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(Unsupported, match="for the family 'flux', and StableDiffusionPipeline is of the family 'sd'"):
        load_pipeline("model", plugins="s.yaml")


def test_another_version_is_told(site, caplog):
    Path("s.yaml").write_text("diffgraft_stack: 1\nplugins: [{name: stk_holder, version: 9.9.1}]\n")
    with caplog.at_level(logging.WARNING, "diffgraft"):
        asked.build("s.yaml")
    assert "made with stk_holder 9.9.1, here is 1.2" in caplog.text


def test_what_was_measured_is_held_against_its_fields(sd, site):
    pipe = load_pipeline(sd[0], plugins="stk_holder")
    for measured in ({"speed": 2}, {"figures": {"speed": [1]}}, {"call": {"image": object()}}, {"command": "a\nb"}, 3):
        with pytest.raises(ConfigError, match=r"measured: .*; its fields: pipeline, call, figures, command"):
            pipe.plugins.save("stack.yaml", measured=measured)
    assert not Path("stack.yaml").exists()


def test_a_stack_file_stands_alone(sd, site):
    with pytest.raises(ConfigError, match=r"stack\.yaml stands in a list; a stack file stands alone"):
        load_pipeline(sd[0], plugins=["stk_holder", "stack.yaml"])
    with pytest.raises(ConfigError, match=r"stack= is no keyword of load_pipeline; did you mean plugins=\?"):
        load_pipeline("emoji-sd", stack="stack.yaml")


def test_no_such_file(site):
    Path("near.yaml").write_text("x")
    with pytest.raises(ConfigError, match=r"there is no stack file nowhere\.yaml; there is near\.yaml"):
        load_pipeline("emoji-sd", plugins="nowhere.yaml")


# with a pipeline, and from the Hub --------------------------------------------------------------------------------------------------------


def test_saved_with_the_pipeline_and_found_only_when_asked(sd, site):
    pipe, kwargs = sd
    made = artefact(pipe, Path("a.safetensors"))
    load_pipeline(pipe, plugins={"stk_holder": {"gain": 0.9, "artefact": str(made)}})
    picture = generate(pipe, kwargs)
    pipe.save_pretrained("plain")
    assert not Path("plain/stack.yaml").exists()
    pipe.save_pretrained("model", plugins=True)
    made.unlink()
    assert not hasattr(load_pipeline("model").plugins, "x")
    assert load_pipeline("model").plugins.list() == ()
    loaded = load_pipeline("model", plugins=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, kwargs), picture)
    with pytest.raises(ConfigError, match=r"no stack was saved with 'plain': there is no stack\.yaml"):
        load_pipeline("plain", plugins=True)
    with pytest.raises(ConfigError, match="a live pipeline has none"):
        load_pipeline(pipe, plugins=True)
    pipe.plugins.configure("stk_holder", anything=object())
    with pytest.raises(ConfigError, match="holds a object"):
        pipe.save_pretrained("broken", plugins=True)
    assert not Path("broken").exists()


def test_from_the_hub(sd, site, monkeypatch):
    made = artefact(sd[0], Path("repo/cal/a.safetensors"))
    saved(sd, {"artefact": str(made)}, "repo/stack.yaml")
    saved(sd, {"artefact": str(made)}, "repo/sets/fast.yaml")
    asked_for = []

    def hub_file(text):
        asked_for.append(text)
        path = Path("repo", *text.split("/")[2:])
        if not path.is_file():
            raise ConfigError(f"{text} cannot be had")
        return path

    monkeypatch.setattr(reading, "hub_file", hub_file)
    for name in ("owner/model", "owner/model/sets/fast.yaml"):
        assert Path(asked.build(name).plugins[0].config.artefact).samefile(made)
    assert asked_for[:2] == ["owner/model/stack.yaml", "owner/model/cal/a.safetensors"]
    with pytest.raises(ConfigError, match=r"owner/other/x\.yaml cannot be had"):
        asked.build("owner/other/x.yaml")
    Path("repo/stack.yaml").write_text(HOLDER % "notes: {$file: ../../secret, sha256: x}")
    with pytest.raises(ConfigError, match="leads out of the repository owner/model"):
        asked.build("owner/model")


def test_a_file_of_the_hub_keeps_its_name(sd, site, monkeypatch):
    made = artefact(sd[0], Path("cached.safetensors"))
    monkeypatch.setattr(references, "hub_file", lambda text: made)
    monkeypatch.setattr("diffgraft.methods.artefacts.find_file", lambda source, plugin, kind: made)
    path = saved(sd, {"artefact": "owner/name/a.safetensors"})
    assert yaml.safe_load(path.read_text())["plugins"][0]["knobs"]["artefact"]["$hub"] == "owner/name/a.safetensors"
    assert asked.build(path).plugins[0].config.artefact == "owner/name/a.safetensors"
    made.write_bytes(b"")
    with pytest.raises(ArtefactMismatch, match="not the file that the stack was saved with"):
        asked.build(path)


# in a notebook ----------------------------------------------------------------------------------------------------------------------------


def test_html_shows_what_is_there_and_runs_nothing(sd, site):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins={"stk_holder": {"anything": "<script>x</script>"}, "stk_other": {"gain": 0.5}})
    pipe.plugins.disable("stk_other")
    shown = pipe.plugins._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert shown.count("<tr>") == 3
    assert ("gain = 0.5" in shown, ">off<" in shown) == (True, True)
    assert "no run yet" in pipe.plugins.report()._repr_html_()
    generate(pipe, kwargs)
    told = pipe.plugins.report()._repr_html_()
    assert "called" in told
    assert "switched off" in told


# presets ----------------------------------------------------------------------------------------------------------------------------------

FAST = """diffgraft_preset: 1
models: owner/big-.*
knobs: {gain: 0.5}
call: {num_inference_steps: 4}
source: {kind: paper, where: arXiv 0000.00001 table 2}
tested: false
"""


@pytest.fixture
def preset(site, monkeypatch):
    """The same plugins as a package that ships a preset."""
    monkeypatch.delitem(sys.modules, "stk_plugins", raising=False)
    (site / "stk_plugins").mkdir()
    (site / "stk_plugins.py").rename(site / "stk_plugins" / "__init__.py")
    (site / "stk_plugins" / "presets").mkdir()
    path = site / "stk_plugins" / "presets" / "big-fast.yaml"
    path.write_text(FAST)
    return path


def test_a_preset_is_its_knobs(preset, caplog):
    [plugin] = asked.build({"stk_holder": "big-fast"}, "owner/big-one").plugins
    assert plugin.own_knobs == {"gain": 0.5}
    [told] = caplog.messages  # not that it is for others
    assert told == "stk_holder: with the preset big-fast belongs a call with {'num_inference_steps': 4}, which is yours to say"
    more = asked.build({"stk_holder": ("big-fast", {"gain": 0.7, "words": ["a"]})}).plugins[0].own_knobs
    assert more == {"gain": 0.7, "words": ("a",)}
    assert asked.build([("stk_holder", "big-fast")]).plugins[0].own_knobs == {"gain": 0.5}
    with caplog.at_level(logging.WARNING, "diffgraft"):
        asked.build({"stk_holder": "big-fast"}, "owner/small")
    assert "the preset big-fast is for models called owner/big-.*, not for small" in caplog.text
    with pytest.raises(ConfigError, match="'stk_holder' has no preset 'big-fats'; did you mean 'big-fast'"):
        asked.build({"stk_holder": "big-fats"})
    with pytest.raises(PluginNotFound):
        asked.build({"no_such": "big-fast"})


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("owner/big-.*", "'('", "models = '[(]': .*no regular expression"),
        ("where: arXiv 0000.00001 table 2", "why: x", "source.where"),
        ("kind: paper", "kind: measured", "name the command that repeats it"),
        ("tested: false", "", "tested"),
        ("diffgraft_preset: 1", "diffgraft_preset: 3", "written by a newer diffgraft"),
    ],
)
def test_a_preset_that_is_none(preset, old, new, told):
    preset.write_text(FAST.replace(old, new))
    with pytest.raises(ConfigError, match=told):
        asked.build({"stk_holder": "big-fast"})
