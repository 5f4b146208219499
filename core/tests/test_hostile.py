"""Packages, texts and values made to harm: each is its own package's line, shown as text, told in one line; the rest goes on as before."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap

import pytest
from diffgraft import Bundled, Family
from diffgraft.cli import app
from diffgraft.installed import offers, registry
from diffgraft.installed.errors import BrokenPlugin, ConfigError, PluginNotFound, Unsupported
from diffgraft.lab import checkup, doctor
from diffgraft.methods.named import find_callable
from typer.testing import CliRunner

STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\n\u2028"
PLUGIN = """
    from diffgraft import Paper, Plugin
    class P(Plugin):
        name = "evil"; paper = Paper("t", "0", "i"); families = ("*",); neutral = {}
        def denoise(self, call, next): return next(call)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(name, entries, module, ...)`` puts a package on the path, behind all others."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    monkeypatch.setattr(checkup, "place", lambda: tmp_path / "doctor.json")
    monkeypatch.setenv("COLUMNS", "300")

    def make(name="evil-dist", entries="evil = evilmod:P", module: str | bytes = "", group=offers.PLUGINS, meta=None, more="", folder=None):
        info = site / f"{(folder or name).replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        text = meta if meta is not None else f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: s\n{more}\n"
        (info / "METADATA").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
        lines = entries if isinstance(entries, bytes) else f"[{group}]\n{entries}\n".encode()
        (info / "entry_points.txt").write_bytes(lines)
        (site / "evilmod.py").write_bytes(module if isinstance(module, bytes) else textwrap.dedent(module).encode())
        importlib.invalidate_caches()

    yield make
    sys.modules.pop("evilmod", None)


def line_of(name="evil"):
    [found] = [one for one in offers.offers(offers.PLUGINS) if one.dist == "evil-dist" and name in (one.name, None)]
    return found


def others_go_on():
    assert registry.find("time_shift").name == "time_shift"
    assert registry.find_bundled("emoji-sd").name == "emoji-sd"
    assert registry.families()["sd"].kind == "unet"
    assert registry.find_need("artefact", "x") is not None
    assert find_callable("reward", "emoji_judge", "diffgraft.rewards", "reward", ("images", "prompts"))[0] == "emoji_judge"
    assert CliRunner().invoke(app, ["list"]).exit_code == 0
    assert CliRunner().invoke(app, ["show", "time_shift"]).exit_code == 0


BAD = {
    "latin-1": {"module": b"# caf\xe9\n"},
    "nul": {"module": b"x = '\0'\n"},
    "deep": {"module": b"x=" + b"-" * 200_000 + b"1\n"},
    "recursion": {"module": b"x=" + b"+".join([b"1"] * 200_000)},
    "entry point": {"entries": "evil = a b !!"},
    "no value": {"entries": "evil"},
    "empty": {"entries": "evil ="},
    "no name": {"entries": "= evilmod:P", "name": ""},
    "long name": {"entries": "e" * 3000 + " = evilmod:P", "name": None},
    "relative": {"entries": "evil = .:P"},
    "twice": {"entries": "evil = evilmod:P\nevil = evilmod:Q", "name": None},
    "no UTF-8": {"meta": b"Metadata-Version: 2.1\nName: evil-dist\nVersion: 1\nSummary: caf\xe9\n"},
    "no metadata": {"meta": ""},
    "endless metadata": {"meta": "Name: evil-dist\n" + "X: y\n" * 300_000},
    "forged": {"meta": "Metadata-Version: 2.1\nName: diffgraft-families\nVersion: 1\n"},
    "requirement": {"more": "Requires-Dist: foo bar"},
    "marker": {"more": "Requires-Dist: torch; nonsense > '3'"},
    "spelling": {"more": "Requires-Dist: DiffGraft>=99"},
    "other version": {"more": "Requires-Dist: diffusers<0.40"},
    "missing": {"more": "Requires-Dist: no-such-package-of-anybody"},
    "python": {"more": "Requires-Python: >=9"},
    "contract": {"module": "class P:\n    name = 'evil'\n    api = 99\n"},
}


@pytest.mark.parametrize("case", BAD)
def test_what_metadata_and_source_show_is_that_packages_line(install, case):
    options = dict(BAD[case])
    name = options.pop("name", "evil")
    install(**options)
    found = [one for one in offers.offers(offers.PLUGINS) if one.dist in ("evil-dist", "diffgraft-families")]
    assert found
    assert all(one.broken for one in found), found
    if name is not None:
        with pytest.raises(BrokenPlugin, match="evil-dist"):
            registry.find(name)
    assert registry.find("time_shift").name == "time_shift"


def test_entry_points_that_are_no_text(install):
    install(entries=b"[diffgraft.plugins]\nevil = caf\xe9:P\n")
    assert "no UTF-8" in str(line_of("evil-dist").broken)
    others_go_on()


def test_a_marker_that_does_not_apply_asks_nothing(install):
    install(module=PLUGIN, more="Requires-Dist: diffgraft>=99; python_version < '3'\nRequires-Dist: nothing-here; extra == 'x'")
    assert line_of().broken is None
    assert registry.find("evil").name == "evil"


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(3)",
        "class E(BaseException): pass\nraise E('out')",
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "import diffgraft\ndiffgraft.Effects(skips={'nothing'})",
        "def f(): f()\nf()",
        "raise RuntimeError('a\\x1b[2J\\nb')",
        "P = 3",
        textwrap.dedent(PLUGIN).replace("families", "api = 'one'; families"),
    ],
)
def test_whatever_an_import_raises_is_that_packages(install, source):
    install(module=source)
    with pytest.raises(BrokenPlugin, match="'evil' of evil-dist") as raised:
        registry.find("evil")
    assert str(raised.value).isprintable()
    checks, tried = doctor.check_plugins()
    assert {check.status for check in checks if check.name == "evil"} == {"broken"}
    checkup.remember(tried)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)}
    assert rows["evil"]["status"] == "broken"
    assert (rows["time_shift"]["status"], rows["time_shift"]["tried"]) == ("ok", True)


def test_what_doctor_found_counts_for_that_very_module_only(install, tmp_path):
    install(module="raise SystemExit")
    checkup.remember(doctor.check_plugins()[1])
    assert checkup.recall([line_of()])
    (tmp_path / "site" / "evilmod.py").write_text("# mended\n")
    assert not checkup.recall([line_of()])
    for text in ("", "[]", "{" * 100_000, '{"x": 3}', json.dumps({str(line_of()): 3})):
        checkup.place().write_text(text)
        assert not checkup.recall([line_of()])
    checkup.place().unlink()
    checkup.place().mkdir()
    assert checkup.remember([])
    assert not checkup.recall([line_of()])


@pytest.mark.parametrize("source", ["raise SystemExit", "P = 3", "from diffgraft import Family\nP = Family.__new__(Family)"])
@pytest.mark.parametrize("group", [offers.FAMILIES, offers.PIPELINES, offers.NEEDS, "diffgraft.rewards"])
def test_other_groups_break_nobody_either(install, group, source):
    install(module=source, group=group)
    ask = {
        offers.FAMILIES: lambda: pytest.fail("none") if "evil" in registry.families() else registry.find_family(type("Nobody", (), {})),
        offers.PIPELINES: lambda: registry.find_bundled("evil"),
        offers.NEEDS: lambda: registry.find_need("evil", "x"),
        "diffgraft.rewards": lambda: find_callable("reward", "evil", "diffgraft.rewards", "reward", ("images", "prompts")),
    }[group]
    with pytest.raises((BrokenPlugin, Unsupported, ConfigError), match="evil"):
        ask()
    others_go_on()
    assert "emoji-sd" in registry.bundled()
    assert {"ok"} == {check.status for check in doctor.check_pipelines() if check.name != "evil"}


# names -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name", "owner"),
    [
        (offers.PLUGINS, "deepcache", "diffgraft-deepcache"),
        (offers.FAMILIES, "sd", "diffgraft-families"),
        (offers.PIPELINES, "emoji-sd", "diffgraft-checkpoints"),
        (offers.PIPELINES, "emoji-dit", "diffgraft-checkpoints-more"),
        (offers.NEEDS, "artefact", "diffgraft-core"),
        ("diffgraft.rewards", "emoji_judge", "diffgraft-checkpoints"),
    ],
)
def test_our_names_cannot_be_taken(install, monkeypatch, group, name, owner):
    own = registry.by_name(group, name)[name]
    install(entries=f"{name} = {own.value}", group=group)  # the value of ours: packages are compared, not values
    both = {one.dist: one for one in offers.offers(group, name)}
    assert both[owner].broken is None
    assert both["evil-dist"].broken == f"the name belongs to {owner}"
    assert registry.by_name(group)[name].dist == owner
    without = [(dist, fault) for dist, fault in offers.installed_dists() if offers.folder_name(dist) != owner]
    monkeypatch.setattr(offers, "installed_dists", lambda: without)
    assert registry.by_name(group)[name].broken, "nor where the package that it belongs to is not installed"


@pytest.mark.parametrize("group", [offers.PLUGINS, offers.FAMILIES, offers.PIPELINES, offers.NEEDS, "diffgraft.rewards"])
def test_two_packages_of_one_name_are_both_refused(install, group):
    install(group=group)
    install(name="other-dist", group=group)
    found = offers.offers(group, "evil")
    assert {one.broken for one in found} == {"two installed packages offer it: evil-dist and other-dist; uninstall one"}


def test_two_folders_of_one_package_are_no_package(install, tmp_path):
    install()
    (tmp_path / "site" / "evil_dist-2.0.dist-info").mkdir()
    assert "two folders of metadata" in str(line_of().broken)


FAMILY = """
    print("IMPORTED")
    import dataclasses
    from diffgraft_pipelines.families import FAMILIES
    P = dataclasses.replace(next(f for f in FAMILIES if f.name == "sd"), name="evil", kind="dit", pipelines={pipelines})
"""


def test_a_family_cannot_take_our_pipelines_and_is_not_imported_for_them(install, capsys):
    install(module=FAMILY.format(pipelines='("StableDiffusionPipeline", "NextPipeline")'), group=offers.FAMILIES)
    assert registry.find_family(type("StableDiffusionPipeline", (), {})).kind == "unet"
    assert "IMPORTED" not in capsys.readouterr().out
    with pytest.raises(Unsupported, match=r"family 'evil' of evil-dist 1\.0 describes StableDiffusionPipeline, and so does family 'sd'"):
        registry.find_family(type("NextPipeline", (), {}))


def test_a_family_of_somebody_else_is_found_where_we_know_none(install):
    install(module=FAMILY.format(pipelines='("NextPipeline",)'), group=offers.FAMILIES)
    assert registry.find_family(type("NextPipeline", (), {})).name == "evil"


@pytest.mark.parametrize("group", [offers.PLUGINS, offers.FAMILIES, offers.PIPELINES, offers.NEEDS, "diffgraft.rewards"])
def test_the_allow_list_holds_for_every_group(install, monkeypatch, group, capsys):
    install(module="print('IMPORTED')\nP = print", group=group)
    monkeypatch.setenv(registry.ALLOW, "deepcache")
    assert "evil" not in registry.bundled_names() + list(registry.families())
    with pytest.raises(PluginNotFound, match="does not allow it; add evil there"):
        registry.by_name(group)["evil"].load()
    assert "IMPORTED" not in capsys.readouterr().out
    assert registry.find("deepcache")
    assert registry.find_bundled("emoji-sd")
    assert registry.families()["sd"]
    monkeypatch.setenv(registry.ALLOW, "evil")
    assert registry.by_name(group)["evil"].load() is print


def test_the_list_of_our_names_is_what_the_packages_say():
    for group, names in offers.own_names().items():
        for name, dist in names.items():
            assert [one.dist for one in offers.offers(group, name)] in ([dist], []), name


# what a family needs ---------------------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_dies_without_a_package_is_refused_with_the_pip_line(monkeypatch):
    from diffusers import WanImageToVideoPipeline, WanPipeline

    assert registry.find_family(WanImageToVideoPipeline).name == "wan"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert registry.find_family(WanPipeline).name == "wan", "text to video does without"
    with pytest.raises(Unsupported, match=r"WanImageToVideoPipeline cannot make a picture without ftfy.*`pip install ftfy`"):
        registry.find_family(WanImageToVideoPipeline)
    wan = next(check for check in doctor.check_families() if check.name == "wan")
    assert (wan.status, "`pip install ftfy`" in wan.detail, "WanImageToVideoPipeline" in wan.detail) == ("incomplete", True, True)


def test_bundled_and_family_are_what_their_classes_say():
    offer = offers.Offer(offers.PIPELINES, "x", "m:x", "d")
    assert registry.checked(offer, Bundled("x", "p"), Bundled).name == "x"
    with pytest.raises(BrokenPlugin, match="calls itself 'y'"):
        registry.checked(offer, Bundled("y", "p"), Bundled)
    with pytest.raises(BrokenPlugin, match="not a complete Bundled"):
        registry.checked(offer, Bundled("x", 3), Bundled)
    with pytest.raises(BrokenPlugin, match=r"not a diffgraft\.Family"):
        registry.checked(offer, Bundled("x", "p"), Family)


@pytest.mark.parametrize("command", ["list", "list --wide", "list --json", "show evil", "doctor", "list --markdown"])
def test_metadata_reaches_the_terminal_as_text(install, monkeypatch, command):
    monkeypatch.setattr("diffgraft.lab.doctor.check_pipelines", list)
    install(entries=f"evil = evilmod:P\n{STEERING[:4]}x = evilmod:P", module=PLUGIN.replace('"t"', repr("<img src=x>\x1b[2J[/nope]")),
            meta=f"Metadata-Version: 2.1\nName: evil-dist\nVersion: 1.0[/nope]\x1b[2J\nSummary: {STEERING[:-2]}[/nope]\n")  # fmt: skip
    shown = CliRunner().invoke(app, command.split())
    assert not isinstance(shown.exception, Exception) or isinstance(shown.exception, SystemExit), shown.exception
    assert "evil" in shown.output
    assert not re.search(r"\x1b\]0|\x1b\[2J|\x07|\u202e", shown.output)
