"""The documentation is true: every block of every page runs and prints what the page shows, the hook pages' plugins keep the contract,
the site is built without a warning and opens in a browser without a fault."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import Block, blocks_of, inside, run_page
from diffgraft.kernel import errors, registry
from diffgraft.kernel.plugin import POINTS, Plugin
from diffgraft.testing import contract_cases

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOT_WRITTEN = {"generated", "changelog"}
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md")) if not NOT_WRITTEN & set(path.parent.parts)}
HOOKS = {point: DOCS / "hooks" / f"{point}.md" for point in (*POINTS, "scheduler")}
OF_ITS_OWN = {"first-plugin.md"}  # see test_docs_first_plugin.py


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if name not in OF_ITS_OWN and blocks_of(path)])
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


# troubleshooting --------------------------------------------------------------------------------------------------------------------------


def test_every_error_has_its_section_and_a_provoked_message() -> None:
    text = PAGES["troubleshooting.md"].read_text()
    tree = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.DiffgraftError)]
    for cls in tree:
        assert f"\n## {cls.__name__}\n" in text
    provoked = {block.output.split(":")[0] for block in blocks_of(PAGES["troubleshooting.md"]) if block.mark == "raises" and block.output}
    assert {cls.__name__ for cls in tree} <= provoked


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
        assert info.dist in (site / "generated" / "plugins" / f"{name}.html").read_text()


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


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_opens_in_a_browser(site: Path, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    faults: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url))
        for name in ("index", "concepts/onion", "hooks/guide", "generated/catalogue", "reference/calls", "troubleshooting"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        page.goto((site / "search.html").as_uri() + "?q=guidance")
        page.wait_for_selector("#search-results li a")
        browser.close()
    assert not faults
