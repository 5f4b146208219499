"""The ecosystem: plugins, families and checkpoints that somebody else made, as wheels in a clean environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import release
from published import folders

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "apg": ("guide", "2410.02416", "APG"),
    "gradient_estimation": ("scheduler", "2306.04848", "GradientEstimation"),
    "block_caching": ("block", "2312.03209", "BlockCaching"),
}
"""Small methods that are in no catalogue of ours: hook point, paper, class."""


PLUGIN = ROOT / "plugins/deepcache"
"""The one that stands for all: what it requires is what every plugin requires."""
ALONE = """
import importlib.util, sys
from diffgraft import PipelineNotFound, load_pipeline
from diffgraft.cli import app
from diffgraft.methods.extras import EXTRAS
from typer.testing import CliRunner

def said(code, *words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output

{hub}
there = [name for name in EXTRAS if importlib.util.find_spec(name) and name != "jinja2"]  # torch brings jinja2
assert not there, there
try:
    load_pipeline("emoji-sd")
except PipelineNotFound as error:
    assert "`pip install diffgraft-checkpoints`" in str(error), error
else:
    raise AssertionError("emoji-sd is in no package that is here")
assert "deepcache" in said(0, "list")
assert "DeepCache" in said(0, "show", "deepcache")
doctor = said(0, "doctor")
assert "all is well" in doctor and "pip install diffgraft-checkpoints" in doctor
assert "wrote a.png" in said(0, "run", sys.argv[1], "-p", "deepcache", "--prompt", "a big apple", "--steps", "3", "--out", "a.png")
for words in (("compare", "model", "--plugins", "deepcache"), ("tune", "model", "--target", "psnr=30", "--trials", "2")):
    assert "pip install 'diffgraft[lab]'" in said(2, *words)
print("alone")
"""


def test_one_plugin_is_enough(tmp_path):
    """``pip install diffgraft-deepcache`` where nothing is but what it requires, and a folder in the Hub's layout."""
    python = release.clean_environment(tmp_path / "venv", [*folders()[:3], PLUGIN])
    release.build([*folders()[:3], PLUGIN], tmp_path / "dist", ["wheel"])
    release.install_by_name(python, "diffgraft-deepcache", tmp_path / "dist")
    shutil.copytree(release.HUB_FOLDER, tmp_path / "model")
    done = release.run(python, "-c", ALONE.format(hub=release.HUB), str(tmp_path / "model"), "deepcache", cwd=tmp_path)
    assert done.strip().endswith("alone")
    assert "skipped 4 of 6 (67%)" in done
    assert release.uninstall(python, ["diffgraft-deepcache", "diffgraft", "diffgraft-core", "diffgraft-families"]) == []


CORE_ONLY = """
import sys
from diffgraft import Unsupported
from diffgraft.installed.registry import find_family
try:
    find_family(type("StableDiffusionPipeline", (), {}))
except Unsupported as error:
    assert "`pip install diffgraft-families`" in str(error), error
else:
    raise AssertionError("no family knows it")
assert "torch" not in sys.modules
print("told")
"""
DOCTOR = """
from diffgraft.cli import app
from typer.testing import CliRunner
done = CliRunner().invoke(app, ["doctor"])
assert done.exit_code == 1, done.output
assert "`pip install diffgraft-families`" in done.output and "all is well" not in done.output
"""


def core_only(folder: Path) -> Path:
    """The python of an environment that has the core, and no family."""
    python = release.clean_environment(folder / "venv", folders()[:1])
    release.install(python, release.build(folders()[:1], folder / "dist", ["wheel"]))
    return python


def test_the_core_alone_says_what_is_missing(tmp_path):
    assert release.run(core_only(tmp_path), "-c", CORE_ONLY, cwd=tmp_path).strip() == "told"


@pytest.mark.slow
def test_the_doctor_of_a_core_alone(tmp_path):
    release.run(core_only(tmp_path), "-c", DOCTOR, cwd=tmp_path)


class World:
    """A clean environment with the wheels of everything of ours but the plugins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, release.clean_environment(folder / "venv")
        self.install(release.build(folders()[:4], folder / "dist", ["wheel"]))

    def install(self, wheels):
        release.install(self.python, wheels)

    def run(self, *words):
        return release.run(self.python, *words, cwd=self.folder)

    def diffgraft(self, *words):
        return self.run(str(self.python.with_name("diffgraft")), *words)

    def package(self, name, modules, entry_points, data=None):
        """Build and install somebody's package; gives its wheel."""
        home = self.folder / "sources" / name
        module = name.replace("-", "_")
        (home / module).mkdir(parents=True)
        for file, text in modules.items():
            (home / module / file).write_text(textwrap.dedent(text))
        for source, target in (data or {}).items():
            shutil.copytree(source, home / module / target)
        points = "\n".join(f'[project.entry-points."{group}"]\n{key} = "{value}"' for group, key, value in entry_points)
        (home / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["flit_core>=3.11"]\nbuild-backend = "flit_core.buildapi"\n'
            f'[project]\nname = "{name}"\nversion = "0.3"\n'
            f'description = "Somebody\'s {name}"\nrequires-python = ">=3.10"\ndependencies = ["diffgraft>=0.1,<0.2"]\n{points}\n'
        )
        (wheel,) = release.build([home], home / "dist", ["wheel"])
        self.install([wheel])
        return wheel

    def uninstall(self, *dists):
        release.pip(self.python, "uninstall", "-y", *dists)

    def traces(self, *words):
        site = next(self.folder.glob("venv/lib/python3*/site-packages"))
        return [path.name for path in (*site.iterdir(), *(self.folder / "venv/bin").iterdir()) if any(word in path.name for word in words)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_three_plugins_from_the_scaffold(world):
    wheels = []
    for name, (hook, arxiv, _) in METHODS.items():
        home = world.folder / f"diffgraft-{name}"
        world.diffgraft("new", name, "--hook", hook, "--arxiv", arxiv, "--title", f"The paper of {name}", "--out", str(home))
        shutil.copyfile(ROOT / "tests/ecosystem" / f"{name}.py", home / f"diffgraft_{name}" / "__init__.py")
        pyproject = home / "pyproject.toml"
        pyproject.write_text(entry_of(pyproject.read_text(), name))
    world.run("-c", KNOBS, *METHODS)
    for name in METHODS:
        home = world.folder / f"diffgraft-{name}"
        wheels += release.build([home], home / "dist", ["wheel"])
    world.install(wheels)
    rows = {row["name"]: row for row in json.loads(world.diffgraft("list", "--json"))}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(METHODS, "ok")
    assert json.loads(world.run("-c", CHECK, *METHODS).strip().splitlines()[-1]) == {name: [] for name in METHODS}
    assert world.run("-c", CONTRACT.format(classes={name: cls for name, (_, _, cls) in METHODS.items()})).strip().endswith("green")
    assert world.run("-c", STACK).strip().endswith("stacked")
    world.uninstall(*(f"diffgraft-{name.replace('_', '-')}" for name in METHODS))
    assert json.loads(world.diffgraft("list", "--json")) == []
    assert world.traces(*METHODS, *(name.replace("_", "-") for name in METHODS)) == []


def entry_of(text, name):
    """The scaffold's pyproject with the class that the method is really called."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
    return text.replace(line, f'{name} = "diffgraft_{name}:{METHODS[name][2]}"')


KNOBS = """
import sys
from diffgraft.cli import app
from typer.testing import CliRunner
for name in sys.argv[1:]:  # writes the README's table of knobs
    done = CliRunner().invoke(app, ["check", f"diffgraft-{name}", "--fix", "--no-contract", "--no-behaviour"])
    assert done.exit_code == 0, done.output
"""
CHECK = """
import json, sys
from diffgraft.community.check import check, open_project
def faults(name):
    return [f"{finding.rule}: {finding.problem.reason}" for finding in check(open_project(name), True, False, ["sd"]).problems]
print(json.dumps({name: faults(name) for name in sys.argv[1:]}))
"""
CONTRACT = """
from diffgraft.testing import contract_cases
for name in {classes!r}:
    cases = [case for case in contract_cases(name, ["sd"]) if case.class_name == "StableDiffusionPipeline"]
    assert len(cases) > 25, len(cases)
    for case in cases[::5]:
        case.run()
print("green")
"""
STACK = """
from diffgraft import load_pipeline
plain = load_pipeline("emoji-sd-small")
pipe = load_pipeline("emoji-sd-small", plugins=["apg", "block_caching", "gradient_estimation"])
import numpy as np, torch
def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a big apple on a blue background", num_inference_steps=6, guidance_scale=3.0, generator=generator, output_type="np").images
before = picture(plain)
assert not np.array_equal(picture(pipe), before)
report = pipe.plugins.report().plugins
assert report["apg"].fired["guide"] == 6, report["apg"]
assert report["block_caching"].total("skipped") == 3, report["block_caching"]
assert report["gradient_estimation"].fired["scheduler"] == 1
pipe.plugins.clear()
assert np.array_equal(picture(pipe), before)
print("stacked")
"""


@pytest.mark.slow
def test_a_new_plugin_of_this_repository_changes_its_own_folder_only(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    clone, site = tmp_path / "clone", tmp_path / "site"
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(clone)], check=True)
    folder = clone / "plugins/fresh_method"
    environment = {**os.environ, "PYTHONPATH": f"{site}:{folder}"}

    def run(*words):
        subprocess.run([sys.executable, *words], cwd=clone, env=environment, check=True, timeout=300)

    run("-m", "diffgraft", "new", "fresh_method", "--hook", "denoise", "--arxiv", "2401.00000", "--title", "T", "--out", str(folder))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), "-e", str(folder))
    run("-m", "diffgraft", "show", "fresh_method")
    run("-m", "diffgraft", "check", str(folder), "--no-contract", "--family", "pixart")
    run("examples/readme.py", "--check")
    run("examples/registry.py", "--check")
    told = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert told == "?? plugins/fresh_method/\n"


OLD = """
from diffgraft import Effects, Paper, Plugin
class Old(Plugin):
    api = {api}
    name = "old"
    paper = Paper("Old", "", "nothing")
    families = ("*",)
    neutral = {{}}
    def denoise(self, call, next):
        return next(call)
"""


REFUSED = """
from diffgraft.cli import app
from typer.testing import CliRunner
words = ["run", "emoji-sd-small", "--steps", "2", "--prompt", "x"]
done = CliRunner().invoke(app, [*words, "-p", "old"])
assert done.exit_code and "BrokenPlugin: plugin 'old'" in done.output, (done.output, done.exception)
print(done.output)
done = CliRunner().invoke(app, words)
assert done.exit_code == 0, (done.output, done.exception)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("api", "way_out"), [(0, "upgrade the plugin"), (99, "upgrade diffgraft")])
def test_a_plugin_for_another_contract_is_refused_and_breaks_nobody(world, api, way_out):
    world.package(f"diffgraft-old-{api}", {"__init__.py": OLD.format(api=api)}, [("diffgraft.plugins", "old", f"diffgraft_old_{api}:Old")])
    try:
        assert json.loads(world.diffgraft("list", "--json"))[0]["name"] == "old"  # to list is not to import
        said = world.run("-c", REFUSED)
        assert f"was written for contract {api}, this diffgraft speaks 1; {way_out}" in " ".join(said.split())
    finally:
        world.uninstall(f"diffgraft-old-{api}")


FAMILY = """
from diffgraft.installed.family import BlockGroup, Family, Guidance
family = Family(
    name="sound", pipelines=("DanceDiffusionPipeline",), denoisers=("unet",), kind="unet",
    blocks=(BlockGroup("down_blocks", "down"), BlockGroup("mid_block", "mid"), BlockGroup("up_blocks", "up")),
    guidance=Guidance("none"), sample="sample", conditioning=(), latents="pixels",
)
"""
SOUND = """
import torch
from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel
from diffgraft import Paper, Plugin, load_pipeline, unload
class Half(Plugin):
    name, paper, families, neutral = "half", Paper("t", "", "halves"), ("sound",), {}
    def denoise(self, call, next):
        return next(call) * 0.5
torch.manual_seed(0)
unet = UNet1DModel(sample_size=128, sample_rate=128, extra_in_channels=64, block_out_channels=(32, 32, 32), layers_per_block=1,
                   down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
                   up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"))
pipe = DanceDiffusionPipeline(unet=unet.eval(), scheduler=IPNDMScheduler())
pipe.set_progress_bar_config(disable=True)
def sound():
    return pipe(num_inference_steps=3, audio_length_in_s=1.0, generator=torch.Generator().manual_seed(0)).audios
before = sound()
load_pipeline(pipe, plugins=[Half])
after = sound()
assert pipe.plugins.report().plugins["half"].fired["denoise"] == 3
assert (before != after).any()
unload(pipe)
assert (sound() == before).all()
print("heard")
"""


@pytest.mark.slow
def test_somebodys_family(world):
    world.package("sound-family", {"__init__.py": FAMILY}, [("diffgraft.families", "sound", "sound_family:family")])
    try:
        assert "sound" in world.diffgraft("doctor")
        assert world.run("-c", SOUND).strip().endswith("heard")
    finally:
        world.uninstall("sound-family")
    with pytest.raises(RuntimeError, match=r"no family describes DanceDiffusionPipeline|'sound' is no"):
        world.run("-c", SOUND)
    assert world.traces("sound") == []


CHECKPOINT = """
from pathlib import Path
from diffgraft.installed.family import Bundled
here = Path(__file__).parent
bundled = Bundled(name="their-model", path=str(here / "weights"), prompts=("a big apple on a blue background",), steps=4, guidance_scale=2)
"""


@pytest.mark.slow
def test_somebodys_bundled_checkpoint(world):
    weights = ROOT / "pipelines/checkpoints/diffgraft_checkpoints/bundled/emoji-sd-small"
    points = [("diffgraft.pipelines", "their-model", "their_model:bundled")]
    world.package("their-model", {"__init__.py": CHECKPOINT}, points, {weights: "weights"})
    try:
        assert "wrote picture.png" in world.diffgraft("run", "their-model", "--out", "picture.png")
        assert (world.folder / "picture.png").stat().st_size > 1000
    finally:
        world.uninstall("their-model")
    with pytest.raises(RuntimeError, match="PipelineNotFound: 'their-model' is no bundled pipeline"):
        world.diffgraft("run", "their-model")
    assert world.traces("their") == []
