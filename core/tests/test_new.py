"""``diffgraft new``: for every hook point a plugin that installs, is clean under ``check`` and keeps the contract; all or nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffgraft import cli
from diffgraft.community.check import check, open_project
from diffgraft.community.new import HOOKS, Answers, check_answers, render, write_plugin
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError
from diffgraft.testing import contract_cases
from typer.testing import CliRunner

FAMILY = "pixart"
"""The one on which the tests run: its tiny pipeline is the fastest with guidance."""
SLOW = ("compiled", "memory", "scheduler_", "repeated_timesteps", "batch_change", "steps_change", "another_size", "offload")
"""Checks that are left to the plugin's own tests, to keep these short: nothing in them depends on the hook alone."""
QUOTES = 'Noise "as" is: a \\ and """three""" quotes'


def name_of(hook: str) -> str:
    return f"baked_{hook}"


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """A plugin for every hook, written and installed through pip, editable, into a folder that is put on ``sys.path``."""
    pytest.importorskip("pip")
    pytest.importorskip("flit_core")
    home = tmp_path_factory.mktemp("baked")
    folders = [write_plugin(Answers(name_of(hook), hook, "2401.00000", QUOTES), home / name_of(hook)) for hook in HOOKS]
    site = home / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *(f"--editable={folder}" for folder in folders)], check=True, timeout=300)
    path = [str(site), *(str(folder) for folder in folders)]  # what site would read from the .pth files
    sys.path[:0] = path
    importlib.invalidate_caches()
    yield home
    for entry in path:
        sys.path.remove(entry)
    for module in [module for module in sys.modules if module.startswith("diffgraft_baked_")]:
        del sys.modules[module]


@pytest.mark.parametrize("hook", HOOKS)
def test_it_is_installed_clean_and_keeps_the_contract(baked, hook):
    name = name_of(hook)
    info = registry.installed()[name]
    assert (info.broken, info.dist) == (None, f"diffgraft-baked-{hook}")
    cls = registry.find(name)
    assert cls.paper.title == QUOTES
    assert (cls.scheduler is not None) if hook == "scheduler" else (hook in cls.points())
    family = FAMILY if FAMILY in cls.families else cls.families[0]
    verdict = check(open_project(name), contract=False, families=[family])
    assert verdict.ok, str(verdict)
    assert verdict.tier is None
    assert {finding.rule for finding in verdict.open} == {"readme_written"}
    where = registry.families()[family].pipelines
    if hook == "control":
        where = ("StableDiffusionControlNetPipeline", where[0])
    cases = [case for case in contract_cases(cls, [family]) if case.class_name in where and not case.check.name.startswith(SLOW)]
    assert {"neutral", "fires", "no_trace"} <= {case.check.name for case in cases}
    for case in cases:
        case.run()
    [fires] = [case for case in cases if case.check.name == "fires" and case.class_name == where[0]]
    assert fires.run() == [], "the placeholder shows, nothing is 'inactive'"


def test_its_own_tests_pass(baked):
    """As its author runs them, in a process of its own."""
    folder = baked / name_of("step")
    options = ["-q", "-p", "no:cacheprovider", "-k", "placeholder or declared"]
    code = f"import sys; sys.path[:0] = {sys.path!r}; import pytest; sys.exit(pytest.main({options!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_written_is_python_and_lint_clean(tmp_path, hook):
    folder = write_plugin(Answers("a_method", hook, "", "A title"), tmp_path / "p")
    lint = [sys.executable, "-m", "ruff", "check", "--line-length=140", "--isolated", "--select=E,F,I,B", str(folder)]
    done = subprocess.run(lint, capture_output=True, text=True)
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout
    assert "arxiv.org" not in (folder / "README.md").read_text()


BAD = {
    "snake_case": ({"name": "MyMethod"}, "snake_case"),
    "a dash": ({"name": "my-method"}, "snake_case"),
    "a digit first": ({"name": "2fast"}, "snake_case"),
    "keyword": ({"name": "lambda"}, "keyword"),
    "soft keyword": ({"name": "match"}, "keyword"),
    "prefix": ({"name": "diffgraft_x"}, "prefix"),
    "installed": ({"name": "deepcache"}, "diffgraft-deepcache is installed"),
    "hook": ({"hook": "blok"}, "did you mean 'block'"),
    "number": ({"arxiv": "2401.00000v2"}, "arXiv number"),
    "title": ({"title": "two\nlines"}, "one line"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_answers_are_refused_with_the_reason(case, tmp_path):
    changes, text = BAD[case]
    answers = Answers(**{"name": "my_method", "hook": "denoise", "arxiv": "", "title": "A title", **changes})
    with pytest.raises(ConfigError, match=text):
        check_answers(answers)
    with pytest.raises(ConfigError, match=text):
        write_plugin(answers, tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    answers = Answers("my_method", "denoise", "", "A title")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_plugin(answers, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert set(render(answers)) == {
        path.relative_to(tmp_path / "empty").as_posix() for path in write_plugin(answers, tmp_path / "empty").rglob("*") if path.is_file()
    }


def test_all_or_nothing(tmp_path, monkeypatch):
    written = []

    def full_disk(self, text, encoding=None):
        written.append(self)
        if len(written) == 3:
            raise OSError("no space left")
        return len(text)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_plugin(Answers("my_method", "denoise", "", "A title"), tmp_path / "p")
    assert not list(tmp_path.iterdir())


# the command


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words, **options: CliRunner().invoke(cli.app, [str(word) for word in words], **options)


def test_the_command(call, tmp_path):
    result = call("new", "my_method", "--hook", "guide", "--arxiv", "2401.00000", "--title", "A title")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "diffgraft-my-method" / "diffgraft_my_method" / "quality.toml").is_file()
    assert "pip install -e" in result.stdout


def test_without_a_terminal_it_says_what_is_missing(call, tmp_path):
    result = call("new", "my_method")
    assert result.exit_code == 2
    for word in ("ConfigError", "--hook", "--arxiv", "denoise"):
        assert word in result.output
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_it_asks(call, tmp_path, monkeypatch):
    from diffgraft.cli import community as cli_community

    monkeypatch.setattr(cli_community, "is_terminal", lambda: True)
    result = call("new", "--out", "here", input="my_method\nblock\n2401.00000\nThe title\n")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "here" / "diffgraft_my_method" / "__init__.py").read_text()
    assert "def block" in text
    assert 'title="The title"' in text


def test_check_command_on_what_it_wrote(call, tmp_path):
    assert call("new", "cmd_method", "--hook", "step", "--arxiv", "none", "--out", "p").exit_code == 0
    result = call("check", "p", "--json", "--no-contract", "--no-behaviour", "--badge", "tier.svg")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["ok"], found["tier"], found["problems"]) == (True, None, [])
    assert found["written"] == ["wrote tier.svg"]
    assert "no tier yet" in (tmp_path / "tier.svg").read_text()
