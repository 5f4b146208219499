"""The playground in a browser, the whole way: pick, tick, see a clash, run, look at both pictures, copy the line. Offline."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHOTS = os.environ.get("DIFFGRAFT_SHOTS")
"""A folder for screenshots, for who looks at the page."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    if importlib.util.find_spec("playwright") is None or browser_path() is None:
        pytest.skip("no Chromium here")
    words = [sys.executable, "-m", "diffgraft", "ui", "--port", "0"]
    log = tmp_path_factory.mktemp("ui") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        deadline = time.monotonic() + 300
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not there after 5 minutes: {log.read_text()}"
            time.sleep(0.1)
        yield found.group()
    finally:
        server.terminate()
        server.wait(20)


def browser_path() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def pick(page: Any, plugin: str) -> None:
    field = page.locator("#plugins input")
    field.click()
    field.fill(plugin)
    page.get_by_role("option").filter(has_text=re.compile(rf"^\W*{plugin}\b")).first.click()
    field.blur()  # the list is closed
    page.locator(f".card-{plugin}").first.wait_for()


@pytest.mark.slow
def test_the_whole_way(address: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    faults: list[str] = []
    asked: list[str] = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(40_000)
        expect.set_options(timeout=40_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.locator("#pipeline input")).to_have_value("emoji-sd")
        expect(page.locator("#prompt textarea")).to_have_value(re.compile("penguin"))

        pick(page, "deepcache")
        pick(page, "faster_diffusion")
        expect(page.locator("#verdict")).to_contain_text("both skip blocks")
        expect(page.locator("#run")).to_be_disabled()
        shot(page, "clash")
        page.locator("#off-faster_diffusion").first.click()
        pick(page, "time_shift")
        expect(page.locator("#verdict")).to_contain_text("fit together")
        page.locator("#out-time_shift").first.click()
        expect(page.locator("#python")).to_contain_text("time_shift', 'deepcache")
        expect(page.locator(".card-deepcache").first).to_contain_text("2. deepcache")
        for patience in (10_000, 10_000, 40_000):  # what is typed while the cards are drawn anew is lost: nobody types so fast
            page.wait_for_timeout(1_500)
            page.locator("#knob-deepcache-interval input").fill("3")
            page.locator("#knob-deepcache-interval input").fill("0")
            with contextlib.suppress(AssertionError):
                expect(page.locator("#verdict")).to_contain_text("interval = 0", timeout=patience)
                break
        expect(page.locator("#verdict")).to_contain_text("interval = 0")
        page.locator("#knob-deepcache-interval input").fill("2")
        expect(page.locator("#run")).to_be_enabled()

        page.locator("#steps textarea, #steps input").fill("8")
        page.locator("#run").click()
        expect(page.locator("#slider img").first).to_be_visible(timeout=60_000)
        shot(page, "running")
        expect(page.locator("#figures")).to_contain_text("dB", timeout=90_000)
        expect(page.locator("#figures")).to_contain_text("multiply-adds", timeout=90_000)
        expect(page.locator("#state")).to_have_text("")
        sizes = page.eval_on_selector_all("#slider img", "all => all.map(each => each.naturalWidth)")
        line = page.locator("#python .cm-content").inner_text()
        shot(page, "desktop")

        page.locator("#runs .thumbnail-item").first.click()
        page.locator("#again").click()
        expect(page.locator("#steps textarea, #steps input")).to_have_value("8")
        page.locator("#steps textarea, #steps input").fill("90")
        page.locator("#run").click()
        page.locator("#stop:not([disabled])").click()
        expect(page.locator("#state")).to_contain_text("stopped: nothing of this run is kept")
        expect(page.locator("#slider img")).to_have_count(0)
        page.set_viewport_size({"width": 390, "height": 844})
        wide = page.evaluate("document.documentElement.scrollWidth")
        shot(page, "phone")
        browser.close()
    assert len(sizes) >= 2
    assert all(sizes)
    assert re.search(r"load_pipeline\('emoji-sd', plugins=\{'time_shift': \{\}, 'deepcache': \{'interval': 2\}\}\)", line), line
    compile(line, "line", "exec")
    assert wide <= 390, "a phone has to scroll sideways"
    assert not faults
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__).resolve()), str(Path.cwd() / "pyproject.toml")])
def test_no_file_of_the_machine_is_served(address: str, path: str) -> None:
    for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/{route}{path}", timeout=10)
        assert refused.value.code in (403, 404, 405)
