"""The documentation is true: every block of every page runs and prints what the page shows, the hook pages' plugins keep the contract,
the site is built without a warning and opens in a browser without a fault."""

from __future__ import annotations

import html
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffgraft
import diffgraft.installed
import diffgraft.kernel
import diffgraft.methods
import diffusers
import generate
import pytest
from blocks import Block, blocks_of, commands_in, inside, run_page
from diffgraft.cli import app
from diffgraft.cli.values import plugin_specs
from diffgraft.installed import errors, registry
from diffgraft.installed.plugin import POINTS, Plugin
from diffgraft.testing import contract_cases
from diffgraft_pipelines.families.refused import REFUSED
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOT_WRITTEN = {"generated", "changelog"}
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md")) if not NOT_WRITTEN & set(path.parent.parts)}
HOOKS = {point: DOCS / "hooks" / f"{point}.md" for point in (*POINTS, "scheduler")}
OF_ITS_OWN = {"first-plugin.md"}  # see test_docs_first_plugin.py


LONG = {"quickstart.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in LONG))
        for name, path in PAGES.items()
        if name not in OF_ITS_OWN and blocks_of(path)
    ],
)
def test_blocks(page: str, tmp_path: Path) -> None:
    assert run_page(PAGES[page], tmp_path) > 0


# the runner can fail ----------------------------------------------------------------------------------------------------------------------


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "the page shows\n2"),
        ("```bash\necho said; false\n```\n", "exit code 1\nsaid"),
        ("% raises\n```python\nx = 1\n```\n\n```text\nError\n```\n", "should have raised"),
        ("% raises\n```python\n1 / 0\n```\n", "followed by a text block"),
        ("```{code-block} python\n:caption: made.py\nx = 2\n```\n\n```python\nimport made\nassert made.x == 3, made.x\n```\n", "2"),
    ],
)
def test_a_wrong_page_is_caught(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(AssertionError, match=re.escape(fault)):
        run_page(page_of(tmp_path, text), tmp_path / "folder")


@pytest.mark.parametrize("text", ["```\nx\n```\n", "% shown only\n```python\nx\n```\n", "% skip: why\n```python\nx\n```\n"])
def test_every_exception_has_a_reason(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:"):
        blocks_of(page_of(tmp_path, text))


def test_comparing_output(tmp_path: Path) -> None:
    text = "```python\nprint('4 steps in 1.25 s; a 1')\n```\n\n```text\n4 steps in 0.31 s; ... 1\n```\n"
    (tmp_path / "folder").mkdir()
    assert run_page(page_of(tmp_path, text), tmp_path / "folder") == 1


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("diffgraft list\n\ndiffgraft run emoji-sd \\\n  --prompt 'a; b'  # why\n", [["list"], ["run", "emoji-sd", "--prompt", "a; b"]]),
        ("diffgraft list\nls\n", []),
        ("diffgraft list | head\n", []),
        ("diffgraft list 2>&1\n", []),
        ("diffgraft list && ls\n", []),
        ("diffgraft compare $MODEL\n", []),
        ("diffgraft compare *.yaml\n", []),
        ("DIFFGRAFT_PLUGINS=a diffgraft list\n", []),
        ("cat > a.py <<'EOF'\nx = 1\nEOF\n", []),
    ],
)
def test_only_lines_that_need_no_shell_run_without_one(code: str, lines: list[list[str]]) -> None:
    assert commands_in(code) == lines


# hook points ------------------------------------------------------------------------------------------------------------------------------

CHECKS = ("declared", "bad_knob", "neutral", "same_seed", "fires", "saves_work", "no_trace", "switches", "exception", "guidance_cut")


def plugin_block(point: str) -> Block:
    return next(block for block in blocks_of(HOOKS[point]) if block.file)


@pytest.mark.parametrize("point", HOOKS)
def test_a_hook_pages_plugin(point: str, tmp_path: Path) -> None:
    block = plugin_block(point)
    assert block.file is not None
    assert len(block.code.splitlines()) < 60
    (tmp_path / block.file).write_text(block.code)
    with inside(tmp_path):
        module = importlib.import_module(Path(block.file).stem)
        [cls] = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Plugin) and v.__module__ == module.__name__]
        assert cls.name == module.__name__
        assert point in cls.points() or (point == "scheduler" and cls.scheduler is not None)
        family = "sd" if registry.families()["sd"].is_among(cls.families) else "flux"
        main = registry.families()[family].pipelines[0]
        where = (main, "StableDiffusionControlNetPipeline") if point == "control" else (main,)
        cases = [case for case in contract_cases(cls, [family]) if case.check.name in CHECKS and case.class_name in where]
        assert len(cases) >= 7
        for case in cases:
            case.run()


# commands ---------------------------------------------------------------------------------------------------------------------------------


COMMANDS = re.compile(r"(?:^ {4,}|^|&& |; |[A-Z_]=\S+ )diffgraft ([a-z]+(?: .*)?)$", re.MULTILINE)


@cache
def command() -> Any:
    """The command line; made once, for it takes a while."""
    return get_command(app)


def commands_of(page: Path) -> list[list[str]]:
    """Every command that a page quotes, as words; a sentence that begins with the project's name is none."""
    known = command().commands
    lines = COMMANDS.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    lines = [line.removesuffix(" 2>&1") for line in lines]  # the shell's, and no argument
    return [shlex.split(EXPANDED.sub(printed, line), comments=True) for line in lines if line.split()[0] in known]


EXPANDED = re.compile(r"\$\((printf [^)]*)\)")
"""What a shell writes out before it calls the command: sixty class labels."""


def printed(expression: re.Match[str]) -> str:
    return subprocess.run(["bash", "-c", expression[1]], capture_output=True, text=True, check=True).stdout


def wrong_in(words: list[str]) -> str:
    """What the command line would say against it before anything is loaded: options, their values, the plugins' knobs."""
    now, rest = command(), list(words)
    while hasattr(now, "commands"):
        now = now.commands[rest.pop(0)]
    try:
        told = now.make_context(words[0], rest).params
        names = [told[key] for key in ("plugin", "plugins", "name") if told.get(key)]
        flat = [name for each in names for name in (each if isinstance(each, list) else each.split(","))]
        given = [option for option in told.get("option") or [] if option.split(".")[0] in registry.installed()]
        flat += [option.split(".")[0] for option in given if told.get("stack")]  # whose plugins the page's own run knows
        for name, knobs in plugin_specs(flat, given):
            for knob in knobs:
                if knob not in registry.find(name).Config.model_fields:
                    return f"{name} has no knob {knob}"
    except errors.DiffgraftError as error:
        return str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer brings its own copy of click, whose exceptions have no public name
            raise
        return str(error.format_message())
    return ""


QUOTING = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("*.md", "plugins/*/README.md", "docs/**/*.md", "examples/**/*.md", "pipelines/*/README.md")
    for path in sorted(ROOT.glob(pattern))
    if not NOT_WRITTEN & set(path.parts) and commands_of(path)
}


@pytest.mark.parametrize("page", QUOTING)
def test_commands_that_are_quoted_can_be_given(page: str) -> None:
    """Those of blocks that are only shown too."""
    found = {" ".join(words): wrong_in(words) for words in commands_of(QUOTING[page])}
    assert not {line: why for line, why in found.items() if why}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("run emoji-sd --prompt x --stps 3", "No such option"),
        ("run emoji-sd --prompt x --steps many", "--steps"),
        ("compare emoji-sd --plugins deepcache -o deepcache.interwal=2", "has no knob interwal"),
        ("compare emoji-sd --plugins deepcache -o a_star.alpha=2", "not in the list"),
    ],
)
def test_a_wrong_command_is_found(line: str, why: str) -> None:
    assert why in wrong_in(line.split())


# the files of the two lowest floors and the names of the package are all told -------------------------------------------------------------


def test_every_file_of_the_two_lowest_floors_has_its_line() -> None:
    text = PAGES["concepts/life-of-a-call.md"].read_text()
    for path in [path for floor in (diffgraft.installed, diffgraft.kernel) for path in Path(floor.__path__[0]).glob("*.py")]:
        assert path.name == "__init__.py" or f"`{path.name}`" in text


def test_every_public_name_is_in_the_reference() -> None:
    told = "\n".join(path.read_text() for name, path in PAGES.items() if name.startswith("reference/"))
    missing = [name for name in diffgraft.__all__ if not re.search(rf"diffgraft\.{name}\b", told)]
    assert missing == ["__version__"]


def test_authors_import_from_two_places() -> None:
    for page, path in PAGES.items():
        for block in blocks_of(path):
            if block.mark == "raises" and "diffgraft.cli.mistakes" in block.code:
                continue  # the command line's own errors, provoked without one: nobody is told to write that
            found = re.findall(r"(?:from|import) (diffgraft\.(?!methods|testing)\w+)", block.code)
            assert not found, f"{page} imports {found}: users need `diffgraft`, authors `diffgraft.methods` and `diffgraft.testing` too"


# troubleshooting --------------------------------------------------------------------------------------------------------------------------


def test_every_error_has_its_section_and_a_provoked_message() -> None:
    text = PAGES["troubleshooting.md"].read_text()
    tree = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.DiffgraftError)]
    for cls in tree:
        assert f"\n## {cls.__name__}\n" in text
    provoked = {block.output.split(":")[0] for block in blocks_of(PAGES["troubleshooting.md"]) if block.mark == "raises" and block.output}
    assert {cls.__name__ for cls in tree} <= provoked


# pages made from READMEs ------------------------------------------------------------------------------------------------------------------


def test_a_readme_stands_on_its_page_with_pictures_and_links() -> None:
    home = ROOT / "plugins" / "bdia"
    text = (
        "![a](benchmarks/edit.png) [b](../../examples/benchmarks/speed.md#x) [c](../../docs/security.md) [d](benchmarks/order.py) "
        "[`plugins/bdia/pyproject.toml`](pyproject.toml) [e](https://arxiv.org) [f](#knobs)"
    )
    known = {"examples/benchmarks/speed.md": "measured/speed.md", "docs/security.md": ""}
    files: dict[str, bytes] = {}
    assert generate.placed(text, home, "plugins/bdia.md", known, files) == (
        "![a](bdia/edit.png) [b](../measured/speed.md#x) [c](../../security.md) d (`plugins/bdia/benchmarks/order.py`) "
        "`plugins/bdia/pyproject.toml` [e](https://arxiv.org) [f](#knobs)"
    )
    assert files == {"plugins/bdia/edit.png": (home / "benchmarks" / "edit.png").read_bytes()}


LINKED = {path.relative_to(DOCS).as_posix(): path for path in [*PAGES.values(), *sorted(DOCS.glob("notebooks/*.ipynb"))]}


@pytest.mark.parametrize("page", LINKED)
def test_links_of_a_page_lead_to_what_lies_in_the_repository(page: str) -> None:
    """Where pages are read too: docs/generated is there only after a build."""
    path = LINKED[page]
    targets = [path.parent / link["target"] for link in generate.LINK.finditer(FENCED.sub("", path.read_text()))]
    missing = [target for target in targets if not target.exists() or (DOCS / "generated") in target.resolve().parents]
    assert not missing


FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_links_of_a_page_to_what_has_a_page_lead_there_on_the_site() -> None:
    text = (
        "[a](../../plugins/bdia/README.md) [b](../../core/diffgraft/methods) ![c](../../plugins/bdia/README.md) [d](ui.md#x) "
        "[e](../../README.md#y)"
    )
    assert generate.led(text, DOCS / "howto", generate.sources()) == (
        "[a](../generated/plugins/bdia.md) [b](../generated/methods/index.md) ![c](../../plugins/bdia/README.md) [d](ui.md#x) "
        "[e](../generated/catalogue.md)"
    )


def test_the_gallery_shows_the_pictures_of_every_page() -> None:
    about = [{"name": name, "paper": {"implemented": "draws"}} for name in ("one", "two")]
    pages = {"plugins/one.md": "# one\n\n![a row](one/grid.png) and [a link](x.md)\n", "plugins/two.md": "no picture"}
    text = generate.gallery(about, pages)
    assert "## [one](plugins/one.md)\n\nDraws.\n\n![a row](plugins/one/grid.png)\n\n*a row*\n" in text
    assert "two" not in text
    assert "x.md" not in text


def test_every_pipeline_class_of_diffusers_is_told():
    page = generate.pipelines()
    known = {name for family in registry.families().values() for name in family.pipelines}
    classes = {name for name in diffusers._import_structure["pipelines"] if name.endswith("Pipeline")}
    assert all(f"`{name}`" in page for name in classes)
    assert "| `FluxPipeline` | flux |" in page
    assert not known & set(REFUSED)
    assert set(REFUSED) <= classes


def test_every_helper_of_methods_has_a_page() -> None:
    pages = generate.methods()
    for path in Path(diffgraft.methods.__path__[0]).glob("[!_]*.py"):
        assert f"| [`{path.stem}`]({path.stem}.md) | " in pages["methods/index.md"]
        assert f".. automodule:: diffgraft.methods.{path.stem}\n" in pages[f"methods/{path.stem}.md"]


# the site ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "latex2mathml"):
        pytest.importorskip(name, reason="pip install -r docs/requirements.txt")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-b", "html", "--fail-on-warning", "--keep-going", "--quiet", "-d", f"{out}/trees"]
    done = subprocess.run([*build, str(DOCS), f"{out}/html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "html"


@pytest.mark.slow
def test_every_plugin_is_in_the_catalogue(site: Path) -> None:
    page = (site / "generated" / "catalogue.html").read_text()
    for name, info in registry.installed().items():
        assert f"plugins/{name}.html" in page
        own = (site / "generated" / "plugins" / f"{name}.html").read_text()
        assert info.dist in own
        assert all(f'id="{part}' in own for part in ("at-a-glance", "knobs", "limits", "measured-here"))


@pytest.mark.slow
def test_links_lead_somewhere_and_nothing_is_fetched(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    assert len(pages) > 40
    for page, text in pages.items():
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="https?:[^"]+"|<link[^>]+rel="stylesheet"[^>]+href="https?:[^"]+"', text)
        assert not fetched, f"{page.name} fetches {fetched}"
        for href in re.findall(r'<a [^>]*href="([^"]+)"', text):
            path, _, anchor = href.partition("#")
            if re.match(r"[a-z]+:", href):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.relative_to(site)} links to {href}"
            if anchor and target in pages:
                assert f'id="{anchor}"' in pages[target], f"{page.relative_to(site)} links to {href}"


OPENER = """<!doctype html><iframe id="window" style="width: WIDTHpx; height: 844px; border: 0"></iframe><pre id="told"></pre><script>
const told = {}, view = document.getElementById("window"), later = ms => new Promise(done => setTimeout(done, ms));
const load = address => new Promise(done => { view.onload = done; view.src = address; });
(async () => {
  for (const page of PAGES) {
    await load(page);
    const root = view.contentDocument.documentElement, text = root.querySelector(".content");
    const reach = Math.max(root.scrollWidth, text.getBoundingClientRect().left + text.scrollWidth);
    const wide = [...text.querySelectorAll("*")].filter(one => one.getBoundingClientRect().right > WIDTH + 1);
    const box = one => /auto|scroll|hidden/.test(getComputedStyle(one).overflowX);
    const scrolls = one => one && one !== text && (box(one) || scrolls(one.parentElement));
    told[page] = [reach, wide.filter(one => !scrolls(one.parentElement)).slice(0, 3).map(one => one.outerHTML.slice(0, 120))];
  }
  await load("search.html?q=guidance");
  for (let i = 0; i < 100 && !told.found; i++) {
    await later(100);
    told.found = view.contentDocument.querySelectorAll("#search-results li a").length;
  }
  document.getElementById("told").textContent = JSON.stringify(told);
})();
</script>"""
"""A page that opens the others in a window of some width, and tells how far to the right their text goes and what sticks out. (The theme
lets the whole text scroll sideways where something is too wide, and hides that from the document's own width.)"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_opens_in_a_browser(site: Path, width: int, tmp_path: Path) -> None:
    """No page is wider than a phone's window, the search finds something without a server, and no script complains."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if not path.name.startswith(("opener", "search")))
    opener = site / f"opener-{width}.html"
    opener.write_text(OPENER.replace("WIDTH", str(width)).replace("PAGES", json.dumps(pages)))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    look = ["--allow-file-access-from-files", "--window-size=1400,1000", "--virtual-time-budget=600000", "--dump-dom", opener.as_uri()]
    done = subprocess.run([chromium, *quiet, *look], capture_output=True, text=True, check=True, timeout=300)
    [said] = re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    told = json.loads(html.unescape(said))
    assert told.pop("found") > 3
    assert set(told) == set(pages)
    wide = {page: (reach, sticking) for page, (reach, sticking) in told.items() if reach > width + 1}
    assert not wide, f"wider than {width} px: {wide}"
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
