"""Every snippet of the READMEs runs: Python as written, `diffgraft` lines through the command line, block after block.

Only what no test can have is exchanged: a Hub id for the bundled checkpoint of its kind, large sizes and many steps for small and few, long
searches for short ones. Names, knobs, arguments, and files that one line makes and the next reads are the README's own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import load_pipeline
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.kernel import loading
from diffgraft.kernel.defaults import give_defaults, own_defaults
from diffgraft_pipelines.tiny import make
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from sampling import sample_of
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
READMES = {"project": ROOT / "README.md", **{path.parent.name: path for path in sorted((ROOT / "plugins").glob("*/README.md"))}}
PAGES = [*READMES.values(), *sorted((ROOT / "docs").glob("**/*.md"))]
SHIPS = tuple(registry.bundled_names())
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
STANDS_IN = {
    "runwayml/stable-diffusion-v1-5": "emoji-sd",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "emoji-sd",
    "CompVis/stable-diffusion-v1-4": "emoji-sd",
    "owner/model": "emoji-sd",
    "owner/large": "emoji-sd",
    "owner/small": "emoji-sd-small",
    "stabilityai/stable-diffusion-xl-base-1.0": "emoji-sd",
    "segmind/SSD-1B": "emoji-sd-small",
    "black-forest-labs/FLUX.1-dev": "emoji-flux",
    "black-forest-labs/FLUX.1-schnell": "emoji-flux",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "emoji-wan",
    "facebook/DiT-XL-2-256": "emoji-dit",
    "google/ddpm-cifar10-32": "ddpm",
}
STEPS = 8
SHORTER = {  # options that make a line of the command line short; they come last and win
    "compare": "--repeats 1 --warmup 0 --num-prompts 2",
    "calibrate dpm_solver_v3": "-o dpm_solver_v3.intervals=10",
    "fit harmonica": "--steps 1 --batch 1",
    "fit segment_lora": "--steps 1 --batch 1",
    "fit zoodip": "--steps 1 --batch 1",
    "evolve": "--population 2 --epochs 1 --reference-steps 6",
}
ELSEWHERE = {"new", "check", "tune"}
"""Commands whose snippets other tests run (test_ecosystem, core/tests/test_tune)."""


def pytest_generate_tests(metafunc: Any) -> None:
    if "readme" in metafunc.fixturenames:
        of_plugins = [path.parent for name, path in READMES.items() if name != "project"]
        names = [folder.name for folder in sample_of(metafunc.config).folders("READMEs that are run", of_plugins)]
        project = pytest.param(READMES["project"], id="project", marks=pytest.mark.slow)
        metafunc.parametrize("readme", [project, *(pytest.param(READMES[name], id=name) for name in names)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that snippets name as the reader's own, and short runs."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a big apple on the left on a blue background", "steps": 2}\n')
    Path("prompts.txt").write_text("a big apple on the left on a blue background\na small star at the top on a red background\n")
    for name in ("apple.png", "picture.png"):
        Image.effect_noise((64, 64), 60).convert("RGB").save(name)
    Path("tomatoes").mkdir()
    Image.effect_noise((64, 64), 60).convert("RGB").save("tomatoes/one.png")
    make("DDPMPipeline").pipe.save_pretrained("ddpm")
    read = loading.read_pipeline

    def short(name: Any, **given: Any) -> Any:
        given.pop("dtype", None)  # no half precision on a CPU
        pipe = read(STANDS_IN.get(str(name), name), **given)
        give_defaults(pipe, {**own_defaults(pipe), "num_inference_steps": min(STEPS, own_defaults(pipe).get("num_inference_steps", STEPS))})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    for module in ("diffgraft.kernel.loading", "diffgraft.methods.needs"):
        monkeypatch.setattr(f"{module}.read_pipeline", short)
    monkeypatch.setattr(torch.nn.Module, "to", cpu_only(torch.nn.Module.to))
    monkeypatch.setattr(DiffusionPipeline, "to", cpu_only(DiffusionPipeline.to))
    return tmp_path


def cpu_only(function: Any) -> Any:
    return lambda self, *args, **kwargs: self if args == ("cuda",) else function(self, *args, **kwargs)


def scope() -> dict[str, Any]:
    """What snippets take from their reader."""
    small = {"load_pipeline": load_pipeline, "torch": torch, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    return {**small, "my_reward": lambda images, prompts: [0.5] * len(images), "small": "emoji-sd-small"}


def python(code: str, names: dict[str, Any]) -> None:
    """Run one block; sizes and numbers of steps are made small."""
    code = re.sub(r"num_inference_steps=\d{2,}", f"num_inference_steps={STEPS}", code)
    code = code.replace('"max_nfe": 500', '"max_nfe": 50')
    code = re.sub(r"(height|width)=1024", r"\1=64", code)
    code = code.replace("plugins=[...]", "plugins=[]").replace(', attention_backend="xformers"', "")
    exec(compile(code, "README", "exec"), names)


def command_line(code: str) -> None:
    """Run the `diffgraft` lines of one block."""
    code = re.sub(r"iterations=\d+", "iterations=2", code)
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["diffgraft"] or words[1] in ELSEWHERE:
            continue
        words = [STANDS_IN.get(word, word) for word in words[1:]]
        words += shlex.split(SHORTER.get(words[0], "")) + shlex.split(SHORTER.get(" ".join(words[:2]), ""))
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


@pytest.mark.parametrize("name", [name for name in READMES if name != "project"])
def test_a_readme_opens_with_a_line_that_runs_with_what_ships(name: str) -> None:
    opening = READMES[name].read_text().partition("\n## ")[0]
    assert any(word in opening for word in SHIPS), f"{name}: nobody has a model of the Hub offline; one of {', '.join(SHIPS)} has everybody"
    assert "prompts.txt" not in opening or "one prompt a line" in opening, f"{name}: whose file is prompts.txt, and what is in it?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_snippet_brings_what_it_names(page: Path) -> None:
    text = page.read_text()
    assert "torch_dtype" not in text, "deprecated in diffusers: dtype"
    code = "".join(code for _, code in BLOCK.findall(text))
    assert not re.search(r"\bArtefact\b", code) or "import Artefact" in code, "Artefact is in diffgraft.methods.artefacts"


def test_snippets_run(readme: Path, folder: Path) -> None:
    names = scope()
    if readme.parent.name == "diversity_distillation" or readme == READMES["project"]:
        names["my_pipe"] = names["turbo"] = load_pipeline("emoji-sd-lcm")
    blocks = BLOCK.findall(readme.read_text())
    for kind, code in blocks:
        if readme == READMES["project"] and "pipe.plugins.configure" in code:  # what can be done with the stack of the first lines
            python(blocks[0][1], names)
        if "from_pretrained" in code:
            continue  # a second Hub model by hand; what is done with it is the plugin's own test
        python(code, names) if kind == "python" else command_line(code)
