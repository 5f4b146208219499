"""The catalogue: what it may hold, how it is searched, and that nothing is fetched or installed by itself."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request

import pytest
from diffgraft.cli import app
from diffgraft.community import catalogue
from diffgraft.community.catalogue import Catalogue, CataloguedPlugin, dump, is_known, normal, parse, read, schema, score, shipped
from diffgraft.installed.errors import CatalogueError
from probes import ENTRY
from typer.testing import CliRunner


def plugin(**changes):
    return CataloguedPlugin(**{**ENTRY, **changes})


def written(*plugins, **more):
    return json.dumps({"plugins": [each if isinstance(each, dict) else each.model_dump(mode="json") for each in plugins], **more})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "Good-Method"}, "plugins.0.name"),
        ({"dist": "diffgraft_good"}, "plugins.0.dist"),
        ({"homepage": "http://example.org/x"}, "plugins.0.homepage"),
        ({"homepage": "javascript:alert(1)"}, "plugins.0.homepage"),
        ({"summary": "a \x1b[31m red line"}, "plugins.0.summary"),
        ({"summary": "two\nlines"}, "plugins.0.summary"),
        ({"summary": ""}, "plugins.0.summary"),
        ({"hook_points": []}, "plugins.0.hook_points"),
        ({"families": ["SD XL"]}, "plugins.0.families.0"),
        ({"tier": "platinum"}, "plugins.0.tier"),
        ({"paper": {"title": "T", "arxiv": "24.1"}}, "plugins.0.paper.arxiv"),
        ({"install": "rm"}, "plugins.0.install"),
    ],
)
def test_bad_entries_are_refused_with_the_key(change, said):
    with pytest.raises(CatalogueError, match=rf"here is no catalogue of plugins:\n  - {said}"):
        parse(written({**ENTRY, **change}), "here")


def test_a_name_or_a_package_stands_once():
    with pytest.raises(CatalogueError, match="name good_method stands in the catalogue twice"):
        parse(written(plugin(), plugin(dist="other")), "here")
    with pytest.raises(CatalogueError, match="dist diffgraft-good-method stands in the catalogue twice"):
        parse(written(plugin(), plugin(name="other")), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"plugins": 3}', '{"schema_version": 2}', "\x00"])
def test_other_files_are_no_catalogue(text):
    with pytest.raises(CatalogueError, match="here is no catalogue"):
        parse(text, "here")


@pytest.mark.parametrize(
    ("homepage", "publisher"),
    [
        ("https://github.com/Somebody/good", "github.com/somebody"),
        ("https://example.org/a/b", "example.org"),
        ("https://github.com.example.org/diffgraft/x", "github.com.example.org"),
        ("https://GitHub.com:443//Somebody/./good", "github.com/somebody"),
        ("https://github.com/diffgraft/../somebody/x", "github.com/somebody"),
        ("https://github.com/diffgraft/%2E%2e/somebody/x", "github.com/somebody"),
        ("https://github.com./diffgraft", "github.com/diffgraft"),
    ],
)
def test_the_publisher_is_read_from_the_homepage_as_it_is_followed(homepage, publisher):
    one = plugin(homepage=homepage)
    assert one.publisher == publisher
    assert not is_known(one)


@pytest.mark.parametrize(
    "homepage",
    [
        "https://github.com@example.org/diffgraft",
        "https://github.com:8443/diffgraft",
        "https://github.com\\\\@example.org/diffgraft",
        "https://g\u0456thub.com/diffgraft",
        "https:///diffgraft",
        "https://[/",
    ],
)
def test_an_address_that_programs_read_in_different_ways_is_refused(homepage):
    with pytest.raises(CatalogueError, match=r"plugins\.0\.homepage"):
        parse(written({**ENTRY, "homepage": homepage}), "here")


def test_who_is_known_says_the_list_that_came_along(tmp_path):
    ours = shipped().plugins[0]
    assert is_known(ours)
    assert normal(ours.homepage) == ours.homepage
    path = tmp_path / "plugins.json"
    path.write_text(written(plugin(homepage="https://evil.example/x"), known=["evil.example"]))
    assert not is_known(read(path).plugins[0])
    assert not is_known(plugin(homepage=ours.homepage)), "anybody may name our homepage"
    assert not is_known(ours.model_copy(update={"dist": "evil"}))
    assert not is_known(ours.model_copy(update={"name": "evil"}))


def test_large_catalogues_take_linear_time_and_have_an_end(monkeypatch):
    rows = [{**ENTRY, "name": f"p{i}", "dist": f"d{i}"} for i in range(20_000)]
    started = time.process_time()
    parse(written(*rows), "here")
    assert time.process_time() - started < 5  # quadratic, it took half a minute
    monkeypatch.setattr(catalogue, "LARGEST", 10)
    with pytest.raises(CatalogueError, match="more than 10 bytes"):
        read("/dev/zero")
    with pytest.raises(CatalogueError, match="at most"):
        parse(json.dumps({"known": ["a"] * 2000}), "here")


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), ValueError("bad"), UnicodeError("label"), OSError("gone")])
def test_whatever_the_network_does_is_one_error(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(catalogue, "urlopen", fail)
    with pytest.raises(CatalogueError, match=r"https://e\.org/x cannot be read: "):
        read("https://e.org/x")


def test_no_redirect_leaves_https():
    with pytest.raises(CatalogueError, match="https:// only"):
        catalogue.OnlyHttps().redirect_request(urllib.request.Request("https://e.org"), None, 302, "", {}, "http://e.org/\x1b[2J")


def test_every_word_must_be_found_and_names_count_most():
    cache = plugin(name="cache", dist="a", summary="x")
    about = plugin(name="other", dist="b", summary="a cache")
    both = Catalogue(plugins=(about, cache, plugin()))
    assert [each.name for each in both.search(["cache"])] == ["cache", "other"]
    assert [each.name for each in both.search(["CACHE", "a good"])] == ["cache", "other"]
    assert [each.name for each in both.search([])] == ["cache", "good_method", "other"]
    assert score(cache, ["cache", "nothing"]) == 0
    with pytest.raises(CatalogueError, match=r"has 'cach' and 'zzz'.*lists all"):
        both.search(["cach", "zzz"])
    with pytest.raises(CatalogueError, match="did you mean 'good_method'"):
        both.search(["god_method"])


def test_the_shipped_file_is_what_is_dumped_and_its_schema_is_current():
    from importlib.resources import files

    assert files("diffgraft.community").joinpath("plugins.json").read_text(encoding="utf-8") == dump(shipped())
    assert files("diffgraft.community").joinpath("plugins.schema.json").read_text(encoding="utf-8") == schema()


def test_reading(tmp_path, monkeypatch):
    path = tmp_path / "plugins.json"
    path.write_text(written(plugin()))
    assert [each.name for each in read(path).plugins] == ["good_method"]
    with pytest.raises(CatalogueError, match=r"none.json cannot be read"):
        read(tmp_path / "none.json")
    for address in ("http://example.org/x", "ftp://example.org/x", "file:///etc/passwd"):
        with pytest.raises(CatalogueError, match="https:// address"):
            read(address)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CatalogueError, match="cannot be read"):
        read(path)
    monkeypatch.setattr(catalogue, "LARGEST", 10)
    path.write_text(written(plugin()))
    with pytest.raises(CatalogueError, match="more than 10 bytes"):
        read(path)


def test_the_command(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no network unless asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(catalogue, "urlopen", refuse)
    path = tmp_path / "plugins.json"
    path.write_text(written(plugin(), plugin(name="deepcache", dist="fake-deepcache", homepage="https://github.com/diffgraft/x")))
    rows = json.loads(CliRunner().invoke(app, ["search", "--catalogue", str(path), "--json"]).output)
    assert [(row["name"], row["known_publisher"], row["installed"]) for row in rows] == [
        ("deepcache", False, False),  # another package of that name is installed, and ours is another one too
        ("good_method", False, False),
    ]
    shown = CliRunner().invoke(app, ["search", "good", "--catalogue", str(path)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "github.com/somebody (unknown)" in shown.output
    assert "read it before you install it" in shown.output
    assert CliRunner().invoke(app, ["search", "deepcache"]).exit_code == 0
    missing = CliRunner().invoke(app, ["search", "nothing_of_the_kind"])
    assert missing.exit_code == 2
    assert "CatalogueError" in missing.output
