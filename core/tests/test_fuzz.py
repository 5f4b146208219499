"""Ten thousand bad inputs: metadata, knobs, artefacts, findings, catalogues, command lines. Each is refused in our own words, or accepted;
never a traceback, never half a file."""

from __future__ import annotations

import json
import os
import string

import pytest
from diffgraft.cli import app
from diffgraft.community.catalogue import CataloguedPlugin, dump, parse, shipped
from diffgraft.installed import offers, registry
from diffgraft.installed.config import build_config
from diffgraft.installed.errors import DiffgraftError
from diffgraft.methods.artefacts import FORMAT, Artefact, Fingerprint, MadeFor, checksum
from diffgraft.methods.findings import Finding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import ones
from typer.testing import CliRunner

pytestmark = pytest.mark.slow


def cases(number):
    """So many cases, the same ones every time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


texts = st.text(max_size=20) | st.sampled_from(["", "auto", "none", "full", "0"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
words = st.text(max_size=20) | st.sampled_from(["deepcache", "interval", "sd", "made_for", "facts", "denoisers", "format"])


def refused_or_fine(function):
    """Run it; whatever is raised must be ours."""
    try:
        return function()
    except DiffgraftError:
        return None


# files -------------------------------------------------------------------------------------------------------------------------------

MADE_FOR = {
    "plugin": "p", "pipeline": "P", "scheduler": "S", "scheduler_config": {"a": 1}, "steps": 4, "shape": [4, 8, 8],
    "denoisers": {"unet": {"kind": "U", "layout": "0", "weights": [0.5, 1.0]}},
}  # fmt: skip


def header(changes, path=()):
    """A valid header with some values exchanged, and a checksum that agrees."""
    made = json.loads(json.dumps({"format": FORMAT, "made_for": MADE_FOR, "facts": {"genome": 1, "guidance_scale": 2.0}}))
    for keys, value in changes:
        place = made
        for key in keys[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            if value is Ellipsis:
                place.pop(keys[-1], None)
            else:
                place[keys[-1]] = value
    return made


PLACES = [
    *[(key,) for key in ("format", "made_for", "facts", "checksum")],
    *[("made_for", key) for key in MADE_FOR],
    ("made_for", "denoisers", "unet"), ("made_for", "denoisers", "unet", "weights"), ("made_for", "denoisers", "unet", "kind"),
    ("made_for", "more"), ("facts", "genome"),
]  # fmt: skip
json_values = values.filter(lambda v: v == v and "nan" not in repr(v).lower() and "inf" not in repr(v).lower())
changes = st.lists(st.tuples(st.sampled_from(PLACES), json_values | st.just(...)), min_size=1, max_size=3)


def signed(made):
    if isinstance(made, dict) and "checksum" not in made:
        made["checksum"] = checksum({k: v for k, v in made.items()}, {})
    return made


@cases(500)
@given(changes)
def test_headers_of_artefacts(tmp_path, change):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"none": ones(1)}, metadata={"diffgraft": json.dumps(signed(header(change)))}))
    refused_or_fine(lambda: Artefact.load(path, "p"))
    path.write_text(json.dumps(signed(header(change))))
    refused_or_fine(lambda: Finding.load(path, "p"))


@cases(500)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode), st.sampled_from(["a.safetensors", "a.json", "a.bin", "a"]))
def test_files_that_are_something_else(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    for load in (Artefact.load, Finding.load):
        assert refused_or_fine(lambda load=load: load(path, "p")) is None


@cases(1000)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=6))
def test_damaged_artefacts(tmp_path, place, junk):
    path = tmp_path / "a.safetensors"
    made_for = MadeFor("p", "P", {"unet": Fingerprint("U", "0", (0.5,))}, "S", {}, 4, (4, 8, 8))
    Artefact(made_for, {"x": ones(3)}, {"a": 1}).save(path)
    content = path.read_bytes()
    place %= len(content)
    path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    again = refused_or_fine(lambda: Artefact.load(path, "p"))
    if again is not None:  # the bytes happened to be the same, or were not part of anything
        assert (again.made_for, again.tensors["x"].tolist()) == (made_for, [1.0, 1.0, 1.0])


@cases(500)
@given(values, st.sampled_from([*CataloguedPlugin.model_fields, "more"]))
def test_catalogues(value, key):
    refused_or_fine(lambda: parse(json.dumps(value), "here"))
    entry = json.loads(dump(shipped()))["plugins"][0]
    refused_or_fine(lambda: parse(json.dumps({"plugins": [{**entry, key: value}]}), "here"))


# knobs -------------------------------------------------------------------------------------------------------------------------------

PLUGINS = [registry.find(name) for name, info in registry.installed().items() if info.allowed and not info.broken]


@cases(2500)
@given(st.data())
def test_knobs(data):
    cls = data.draw(st.sampled_from(PLUGINS))
    known = st.sampled_from(list(cls.Config.model_fields))
    knobs = data.draw(st.dictionaries(known | words, values, min_size=1, max_size=3))
    made = refused_or_fine(lambda: build_config(cls.name, cls.Config, knobs))
    assert made is None or set(knobs) <= set(cls.Config.model_fields)


# metadata ----------------------------------------------------------------------------------------------------------------------------


class Dist:
    """Any package's metadata."""

    def __init__(self, entry, name, version, requires, metadata):
        text = {"Name": name, "Version": version, **metadata}
        lines = [f"{key}: {value}" for key, value in text.items()] + [f"Requires-Dist: {one}" for one in requires]
        self.files = {"METADATA": "\n".join(lines), "entry_points.txt": f"[{offers.PLUGINS}]\n{entry}\n"}

    def read_text(self, filename):
        return self.files.get(filename)


targets = st.text(string.ascii_letters + ".:_ -", max_size=20) | st.sampled_from(["json:loads", "os", "diffgraft:Plugin", "no.such:X"])
demands = st.sampled_from(["diffgraft>=0.1,<0.2", "diffgraft>9", "diffgraft ; extra == 'x'", "torch"])
requirements = st.lists(st.text(max_size=15) | demands, max_size=2)


@cases(500)
@given(st.lists(st.tuples(words, targets, words, words, requirements, st.dictionaries(words, words, max_size=2)), max_size=3))
def test_metadata_of_packages(monkeypatch, entries):
    made = [Dist(f"{name} = {value}", *more) for name, value, *more in entries]
    monkeypatch.setattr(offers, "distributions", lambda: made)
    listed = registry.installed()
    for name in listed:
        assert refused_or_fine(lambda name=name: registry.find(name)) is None


# command lines -----------------------------------------------------------------------------------------------------------------------

COMMANDS = [
    *("list", "show", "run", "compare", "tune", "calibrate", "quantise"),
    *("evolve", "invert", "search", "doctor", "--version", "nonsense"),
]
OPTIONS = [
    "--plugin", "-p", "-o", "--option", "--steps", "--seed", "--out", "--prompt", "--prompts", "--device", "--dtype", "--arg", "-a",
    "--json", "--target", "--budget", "--seeds", "--height", "--guidance-scale", "--pipeline", "--image", "--fitness", "--set", "--beside",
]  # fmt: skip
arguments = st.lists(
    st.sampled_from(OPTIONS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["deepcache", "deepcache.interval=2", "a=1", "=", "-1", "nowhere", "./none.png", "psnr=30", "10m", "../x"]),
    max_size=6,
)


@cases(500)
@given(st.sampled_from(COMMANDS), arguments)
def test_command_lines(tmp_path, monkeypatch, command, rest):
    if command == "doctor" and not rest:
        return  # a right use, and a slow one
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [command, *rest])
    assert done.exception is None or isinstance(done.exception, SystemExit), (command, rest, done.exception)
    assert done.exit_code in (0, 1, 2), (command, rest)
    assert "Traceback" not in done.output
    assert not os.listdir(tmp_path), (command, rest)
