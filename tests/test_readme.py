"""The README is short and true: its tables are what the plugins say, its Python runs as written, its links and commands lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from diffgraft.community.quality import toml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short():
    written = [line for line in README.splitlines() if not line.startswith("| [`")]  # a plugin's row in the generated tables is its own
    assert len(written) <= 170
    assert len("\n".join(written)) < 9_000


def test_plugin_tables_are_generated():
    done = subprocess.run([sys.executable, "examples/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "run `python examples/readme.py`" + done.stderr


def test_a_plugins_row_is_what_its_card_says():
    from diffgraft.community.quality import Card
    from diffgraft.community.tables import goal_tables
    from diffgraft.installed import registry

    plugins = [registry.find(name) for name in ("deepcache", "ertacache", "faster_diffusion")]
    table = goal_tables(plugins, lambda name: f"{name}.md", lambda name, card: card.gain_where.partition("#")[0])
    assert "| [`ertacache`](ertacache.md) | transformers | a calibration file | [2.00x" in table
    assert "| [`deepcache`](deepcache.md) | U-Nets |  | [" in table
    assert "| [`faster_diffusion`](faster_diffusion.md) | U-Nets |" in table
    assert goal_tables(plugins, lambda name: "here", lambda name, card: "here").count("](") == 3, "its own page is linked once"
    assert Card("faster").gain == ""


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


def test_the_stack_methods(monkeypatch, tmp_path):
    from diffgraft import load_pipeline

    monkeypatch.chdir(tmp_path)

    block = next(b for b in BLOCKS if "pipe.plugins.configure" in b)
    pipe = load_pipeline("emoji-sd", plugins=["deepcache", "time_shift"])
    few_steps(pipe)
    pipe.set_progress_bar_config(disable=True)
    base = type(pipe).__mro__[1]
    exec(compile(block, "README", "exec"), {"pipe": pipe})
    assert type(pipe) is base
    assert (tmp_path / "stack.yaml").is_file()


LINKS = re.findall(r"\]\(((?!http)[^)]+)\)", README)


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_links_lead_somewhere(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README))
COMMANDS = sorted(set(re.findall(r"(?:^|&& |; )diffgraft (.+)", SHELL, re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    from diffgraft.cli import app
    from typer.main import get_command

    name, *words = shlex.split(line.split(" # ")[0])
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("script", sorted(set(re.findall(r"(?:bash|python) ([\w./]+\.(?:sh|py))", SHELL))))
def test_scripts_exist(script):
    assert (ROOT / script).is_file()


def test_what_is_installed_exists():
    named = set(re.findall(r"pip install ((?:(?!#|&&).)+)", SHELL))
    ours = {toml(path.read_text(), "")["project"]["name"]: path for path in [*ROOT.glob("*/*/pyproject.toml"), ROOT / "pyproject.toml"]}
    for word in " ".join(named).replace("'", "").split():
        if word.startswith("diffgraft") and word != "diffgraft-my-method":
            dist, _, extra = word.rstrip("]").partition("[")
            assert dist in ours
            assert not extra or extra in toml(ours[dist].read_text(), "")["project"]["optional-dependencies"]
