"""Every preset that is shipped: it is one, its knobs hold, its source is named."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from diffgraft.community.check.presets import presets as rule
from diffgraft.community.check.project import open_project
from diffgraft.installed import registry
from diffgraft.stacks.presets import presets_of

SHIPPED = [(plugin, name) for plugin in sorted(registry.installed()) for name in presets_of(plugin)]


def test_some_are_shipped() -> None:
    assert len({plugin for plugin, _ in SHIPPED}) >= 15


@pytest.mark.parametrize(("plugin", "name"), SHIPPED, ids=map(":".join, SHIPPED))
def test_a_preset_holds(plugin: str, name: str) -> None:
    preset = presets_of(plugin)[name]
    made = registry.find(plugin)(**preset.knobs)
    assert made.own_knobs.keys() == preset.knobs.keys()
    neutral = type(made).neutral
    assert not neutral or any(knob not in preset.knobs or preset.knobs[knob] != value for knob, value in neutral.items())
    assert preset.tested == (preset.source.kind == "measured")
    assert set(preset.call) <= {"num_inference_steps", "guidance_scale", "height", "width"}
    assert not preset.is_for("somebody/another-model")


@pytest.mark.parametrize("plugin", sorted({plugin for plugin, _ in SHIPPED}))
def test_the_check_finds_nothing_against_them(plugin: str) -> None:
    module = importlib.import_module(registry.named(plugin).module)
    assert module.__file__ is not None
    assert not list(rule(open_project(plugin)))


def test_listing_imports_no_plugin() -> None:
    code = (
        "import sys; from diffgraft.cli import app\n"
        "try: app(['presets'])\n"
        "except SystemExit as end: assert not end.code\n"
        "wrong = sorted(name for name in sys.modules if name in ('torch', 'diffusers') or name.startswith('diffgraft_'))\n"
        "assert not wrong, wrong\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deepcache:sdxl-fast" in done.stdout
    assert "untested" in done.stdout
