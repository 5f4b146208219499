"""The README is true: its plugin table is what the plugins say, its Python runs as written, its figures are in a compare run's table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_plugin_table_is_generated():
    done = subprocess.run([sys.executable, "examples/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "run `python examples/readme.py`" + done.stderr


def few_steps(pipe):
    """Make a documented call quick: four steps unless it says otherwise."""
    call = type(pipe).__call__

    def quick(self, *args, **kwargs):
        return call(self, *args, **{"num_inference_steps": 4, **kwargs})

    type(pipe).__call__ = quick


def test_the_five_lines():
    from diffgraft.kernel.stack import stack_of

    scope: dict = {}
    lines = BLOCKS[0]
    exec(compile(lines.split("image =")[0], "README", "exec"), scope)
    few_steps(scope["pipe"])  # the class belongs to this one object
    scope["pipe"].set_progress_bar_config(disable=True)
    exec(compile("image =" + lines.split("image =")[1], "README", "exec"), scope)
    assert scope["image"].size == (64, 64)
    assert scope["pipe"].plugins.report().plugins["deepcache"].total("skipped") > 0
    assert stack_of(scope["pipe"]) is scope["pipe"].plugins


def test_the_stack_methods(monkeypatch):
    from diffgraft import load_pipeline

    block = next(b for b in BLOCKS if "pipe.plugins.configure" in b)
    pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
    few_steps(pipe)
    pipe.set_progress_bar_config(disable=True)
    base = type(pipe).__mro__[1]
    exec(compile(block, "README", "exec"), {"pipe": pipe})
    assert type(pipe) is base


def test_write_a_plugin():
    scope: dict = {}
    block = next(b for b in BLOCKS if "class GuidanceInterval" in b)
    exec(compile(block, "README", "exec"), scope)
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    pipe("pizza, green background", num_inference_steps=4)
    assert pipe.plugins.report().plugins["guidance_interval"].fired == {"guide": 4}


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
