"""Finding plugins: nothing is imported to list them, a broken one breaks nobody, the allow-list narrows, errors show the way out."""

from __future__ import annotations

import importlib
import importlib.util
import py_compile
import sys
import textwrap

import pytest
from diffgraft.installed import offers, registry
from diffgraft.installed.errors import BrokenPlugin, PipelineNotFound, PluginNotFound, Unsupported
from diffgraft.methods.extras import imported

GOOD = """
    from diffgraft import Paper, Plugin
    class Good(Plugin):
        name = "good"; paper = Paper("t", "0", "i"); families = ("*",); neutral = {}
        def denoise(self, call, next): return next(call)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a fake dist with one plugin: ``install(name, source, requires=..., value=...)``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, source, requires="diffgraft>=0.1,<0.2", value=None, more=""):
        module = f"fake_{name}"
        if source is not None:
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"diffgraft_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: diffgraft-{name}\nVersion: 1.0\nSummary: A {name} plugin\nRequires-Dist: {requires}\n{more}\n"
        )
        (info / "entry_points.txt").write_text(f"[diffgraft.plugins]\n{name} = {value or module + ':Good'}\n")
        importlib.invalidate_caches()
        return module

    yield make
    for name in [m for m in sys.modules if m.startswith("fake_")]:
        del sys.modules[name]


def test_listing_imports_nothing_and_finding_does(install):
    module = install("good", GOOD)
    info = registry.installed()["good"]
    assert (info.dist, info.version, info.summary, info.broken) == ("diffgraft-good", "1.0", "A good plugin", None)
    assert module not in sys.modules
    assert registry.find("good").name == "good"
    assert module in sys.modules


@pytest.mark.parametrize(
    ("source", "options", "listed", "text"),
    [
        ("raise RuntimeError('no CUDA kernel')", {}, False, "no CUDA kernel"),
        ("def broken(:", {}, True, "SyntaxError"),
        (None, {}, True, "not installed"),
        (GOOD, {"requires": "diffgraft>=99"}, True, "needs diffgraft >=99"),
        (GOOD, {"value": "fake_bad"}, True, "names a module"),
        ("Good = 3", {}, False, "not a subclass"),
        (GOOD.replace('name = "good"', 'name = "other"'), {}, False, "calls itself 'other'"),
        (GOOD.replace("families", "api = 99; families"), {}, False, "contract 99"),
        (GOOD.replace("neutral = {}", "pass"), {}, False, "does not declare neutral"),
        (GOOD.replace("def denoise", "def denoize"), {}, False, "no hook point"),
        (GOOD.replace("neutral", "effects = Effects(skips={'all'}); neutral"), {}, False, "NameError"),
    ],
)
def test_a_broken_plugin_says_why_and_breaks_no_other(install, source, options, listed, text):
    install("good", GOOD)
    install("bad", source, **options)
    found = registry.installed()
    assert (found["bad"].broken is not None) == listed
    if listed:
        assert text in found["bad"].broken
    with pytest.raises(BrokenPlugin, match="bad") as error:
        registry.find("bad")
    assert text in str(error.value)
    assert registry.find("good").name == "good"


def test_unknown_plugin_names_the_nearest_and_makes_up_no_package(install):
    install("good", GOOD)
    with pytest.raises(PluginNotFound) as error:
        registry.find("goood")
    assert "did you mean 'good'" in str(error.value)
    assert "pip" not in str(error.value)
    assert "goood" not in str(error.value).replace("no plugin 'goood'", "")


def test_the_allow_list_narrows(install, monkeypatch):
    install("good", GOOD)
    monkeypatch.setenv(registry.ALLOW, "other, another")
    assert not registry.installed()["good"].allowed
    with pytest.raises(PluginNotFound, match="does not allow"):
        registry.find("good")
    monkeypatch.setenv(registry.ALLOW, "good")
    assert registry.find("good").name == "good"


def test_two_packages_with_one_name_are_refused(install, tmp_path):
    install("good", GOOD)
    second = tmp_path / "elsewhere-2.0.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 2.0\n")
    (second / "entry_points.txt").write_text("[diffgraft.plugins]\ngood = fake_elsewhere:Good\n")
    importlib.invalidate_caches()
    with pytest.raises(BrokenPlugin, match="two installed packages"):
        registry.find("good")


def test_an_unknown_pipeline_is_refused_with_what_a_family_must_say():
    class KandinskyNextPipeline:
        pass

    with pytest.raises(Unsupported) as error:
        registry.find_family(KandinskyNextPipeline)
    for fact in ("denoisers", "blocks", "guidance", "diffgraft.families"):
        assert fact in str(error.value)


def test_a_users_subclass_belongs_to_the_family_of_its_base():
    from diffusers import StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):
        pass

    assert registry.find_family(Mine).name == "sd"


def test_without_any_family_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(registry, "load_families", lambda **_: ({}, {}))
    with pytest.raises(Unsupported, match=r"StableDiffusionPipeline: no pipeline family is installed.*`pip install diffgraft-families`"):
        registry.find_family(type("StableDiffusionPipeline", (), {}))


def test_without_the_checkpoints_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(registry, "offers", lambda group, name=None: [])
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("diffgraft_checkpoints") else there(name))
    with pytest.raises(PipelineNotFound, match=r"'emoji-sd' is no bundled pipeline\. Bundled: none\. `pip install diffgraft-checkpoints`"):
        registry.find_bundled("emoji-sd")
    with pytest.raises(PipelineNotFound, match=r"`pip install diffgraft-checkpoints-more` brings small ones"):
        registry.find_bundled("emoji-dit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there("json") if name == "diffgraft_checkpoints" else there(name))
    with pytest.raises(PipelineNotFound) as error:
        registry.find_bundled("emoji-sd")
    assert "pip install" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "url"),
    [
        ("", ""),
        ("Home-page: https://old.example", "https://old.example"),
        ("Project-URL: Source, https://b.example\nProject-URL: Homepage, https://a.example", "https://a.example"),
        ("\nProject-URL: Homepage, https://in-the-description.example", ""),
    ],
)
def test_the_homepage_is_what_the_metadata_names(install, more, url):
    install("good", GOOD, more=more)
    assert registry.installed()["good"].homepage == url


def test_what_was_compiled_as_it_is_needs_no_look(tmp_path):
    source = tmp_path / "some.py"
    source.write_text("x = 1\n")
    assert not offers.is_compiled(str(source))
    py_compile.compile(str(source))
    assert offers.is_compiled(str(source))
    source.write_text("def broken(:\n")
    assert not offers.is_compiled(str(source))
    assert not offers.is_compiled(str(tmp_path / "gone.py"))


def test_what_an_extra_brings_is_said_by_one_helper(monkeypatch):
    assert imported("json", "nothing").dumps(1) == "1"
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Unsupported, match=r"`diffgraft tune` needs optuna.*pip install 'diffgraft\[lab\]'"):
        imported("optuna", "`diffgraft tune`")
