"""The code blocks of a documentation page, and running them: `python docs/blocks.py docs/hooks/guide.md`.

A block with a caption is a file and is written under that name, whatever its language. Any other Python or shell block is run, in page
order, in one namespace and one empty folder a page. A `text` block right behind it is the output that it must have (`...` stands for
anything, times in seconds are not compared). A comment line right above a block changes that:

    % raises                            it ends in the error that the `text` block quotes
    % compile only: needs two GPUs      its syntax is checked, with the reason
    % shown only: a user's own model    neither, with the reason
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgraft.cli import app
from typer.testing import CliRunner

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
OFFLINE = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HF_HUB_OFFLINE": "1"}
"""What a page installs is built with what is here: pip reads NO_BUILD_ISOLATION=0 as "no isolation"."""
SMALL = {"OMP_NUM_THREADS": "1"}
"""Tiny tensors do not profit from more threads."""
MARKS = ("raises", "compile only", "shown only")
LANGUAGES = ("python", "bash", "toml", "markdown", "text")


@dataclass
class Block:
    """One block: ``line`` is that of its first line of code in ``page``; ``output`` what it must print, or None."""

    page: Path
    line: int
    language: str
    code: str
    file: str | None = None
    mark: str | None = None
    reason: str = ""
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: a block without a known language, an unknown mark, or an exception without a reason.
    """
    text = page.read_text()
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        info, code = match["info"].strip(), match["body"]
        line = text.count("\n", 0, match.start("body")) + 1
        between, end = text[end : match.start()], match.end()
        directive = re.fullmatch(r"\{code-block\} (\w+)", info)
        if info.startswith("{") and not directive:
            continue  # a figure, a note, a table of contents
        file = None
        if directive:
            info = directive[1]
            while option := re.match(r":(\w+): (.*)\n", code):
                file = option[2].strip('"`') if option[1] == "caption" else file
                code, line = code[option.end() :], line + 1
            code, line = code.lstrip("\n"), line + len(code) - len(code.lstrip("\n"))
        if info not in LANGUAGES:
            raise ValueError(f"{page}:{line}: a block needs one of the languages {', '.join(LANGUAGES)}, not {info!r}")
        if info == "text" and file is None:
            if found and not between.strip():
                found[-1].output = code
            continue
        block = Block(page, line, info, code, file)
        above = between.rstrip("\n").rsplit("\n", 1)[-1]
        if above.startswith("% "):
            block.mark, _, block.reason = (part.strip() for part in above[2:].partition(":"))
            if block.mark not in MARKS or (block.mark != "raises" and not block.reason):
                raise ValueError(f"{page}:{line}: {above!r} is none of: {', '.join(MARKS)} (the last two with a reason)")
        found.append(block)
    return found


def run_page(page: Path, folder: Path) -> int:
    """Run the blocks of a page in ``folder``, which is empty; returns how many there were.

    Raises:
        AssertionError: a block's output is another one, a command failed, or a promised error did not come.
    """
    scope: dict[str, Any] = {"__name__": "docs_page"}
    found = blocks_of(page)
    with tempfile.TemporaryDirectory() as own, inside(folder):
        commands = Path(sys.executable).parent
        if any(block.language == "bash" and "pip install" in block.code and block.mark is None for block in found):
            commands = environment_over_this_one(Path(own))
        for block in found:
            run(block, folder, scope, commands)
    return len(found)


def environment_over_this_one(folder: Path) -> Path:
    """A virtual environment that sees all that is installed here, and into which a page may install; returns its folder of commands."""
    venv.create(folder, symlinks=True)
    commands = folder / "bin"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in sys.path if "site-packages" in path))
    script = (
        "#!{}\nimport sys\nfrom importlib.metadata import entry_points\n"
        "[found] = {{*entry_points(group='console_scripts', name={!r})}}\nsys.exit(found.load()())\n"
    )
    for name in ("pip", "pytest", "diffgraft"):
        (commands / name).write_text(script.format(commands / "python", name))
        (commands / name).chmod(0o755)
    return commands


def run(block: Block, folder: Path, scope: dict[str, Any], commands: Path) -> None:
    """Write, check or run one block."""
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
    elif block.mark == "shown only" or block.language in ("toml", "markdown"):
        return
    elif block.language == "python":
        run_python(block, scope)
    else:
        run_shell(block, folder, commands)


def run_python(block: Block, scope: dict[str, Any]) -> None:
    """Python: in this process, so that torch is imported once."""
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)  # not the annotations of this file
    if block.mark == "compile only":
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if block.mark == "raises":
            try:
                exec(code, scope)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
            else:
                raise AssertionError(f"{block}: it should have raised")
        else:
            exec(code, scope)
    expect(block, said.getvalue())


def run_shell(block: Block, folder: Path, commands: Path) -> None:
    """Shell: with the environment's ``commands`` first, and stopped at the first failure. Where a block is nothing but `diffgraft` lines,
    they are given to the command line in this process, so that torch is imported once."""
    env = {"COLUMNS": "140", "NO_COLOR": "1", **OFFLINE, **SMALL}
    if block.mark is None and commands == Path(sys.executable).parent and (lines := commands_in(block.code)):
        said = ""
        for words in lines:
            result = CliRunner().invoke(app, words, env=env, catch_exceptions=False)
            assert result.exit_code == 0, f"{block}: {shlex.join(words)}: exit code {result.exit_code}\n{result.output[-3000:]}"
            said += result.stdout
        return expect(block, said)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    syntax = ["-n"] if block.mark == "compile only" else []
    shell = ["bash", *syntax, "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(shell, cwd=folder, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, check=False)
    if block.mark == "raises":
        assert done.returncode, f"{block}: it should have failed"
        return expect(block, done.stdout + done.stderr)
    assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return expect(block, done.stdout)


def commands_in(code: str) -> list[list[str]]:
    """The words of each line behind `diffgraft`; nothing where a line is something else, or needs a shell."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        plain = shlex.shlex(line, posix=True, punctuation_chars=True)
        plain.whitespace_split = True
        words = list(plain)
        if words[:1] not in ([], ["diffgraft"]) or any(set(word) <= set("();<>|&") or set(word) & set("$`*?") for word in words):
            return []
        found += [words[1:]] * bool(words)
    return found


def expect(block: Block, got: str) -> None:
    """Hold what was printed against what the page shows."""
    if block.output is None:
        assert block.mark != "raises", f"{block}: a block that raises is followed by a text block with the error"
        return
    want, got = (re.sub(r"\d+\.\d+ s\b", "some s", text) for text in (block.output, got))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(want, got, flags), f"{block}: the page shows\n{want}\nit printed\n{got}"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Be in ``folder``, whose modules can be imported; afterwards it is as if they never had been."""
    before, modules = Path.cwd(), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as made:
            print(f"{name}: {run_page(Path(name).resolve(), Path(made))} blocks")
