"""The catalogue that comes with diffgraft is what the plugins say, and what is sent in is checked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from probes import ENTRY

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("registry_script", ROOT / "examples/registry.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_the_catalogue_is_what_the_plugins_say(monkeypatch):
    monkeypatch.setattr("sys.argv", ["registry.py", "--check"])
    script.main()


@pytest.fixture
def sent_in(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "COMMUNITY", tmp_path)

    def send(file, **changes):
        (tmp_path / f"{file}.json").write_text(json.dumps({**ENTRY, **changes}))

    return send


def test_a_contribution_is_one_file(sent_in):
    sent_in("good_method")
    assert [plugin.name for plugin in script.community()] == ["good_method"]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("other", {}, "the file must be good_method.json"),
        ("good_method", {"homepage": "https://github.com/diffgraft/diffgraft"}, "give your own"),
        ("good_method", {"tier": "best"}, "good_method.json: tier"),
    ],
)
def test_bad_contributions_are_refused(sent_in, name, changes, said):
    sent_in(name, **changes)
    with pytest.raises(ValueError, match=said):
        script.community()


def test_a_contribution_cannot_take_a_name_of_ours(sent_in, monkeypatch):
    sent_in("deepcache", name="deepcache")
    monkeypatch.setattr("sys.argv", ["registry.py", "--check"])
    with pytest.raises(SystemExit, match="name deepcache stands in the catalogue twice"):
        script.main()
