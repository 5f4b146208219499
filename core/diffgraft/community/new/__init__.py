"""``diffgraft new``: a plugin that installs and passes its own tests, written from the templates beside this file.

The method that it holds is none: at ``strength`` 0 it changes nothing, above it scales something by ``placeholder``, a function that says
that the paper's equation belongs there. So every case of the contract suite has something to look at from the first minute.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from diffgraft.community.catalogue import ARXIV
from diffgraft.community.check.packaging import dist_of, fault_of_name, module_of
from diffgraft.community.quality import Card, Quality, as_toml
from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, choices
from diffgraft.methods.extras import imported


@dataclass(frozen=True)
class HookPoint:
    """What the templates need of one hook point.

    what      for people who choose
    effects   arguments of ``Effects``
    symbols   what is imported from ``diffgraft.kernel.calls``
    families  what the skeleton claims: a U-Net and a DiT on which the placeholder shows
    active    the strength under test; small where what is scaled adds up over the steps, for the latents must stay as large as the denoiser
              expects at the time it is told
    """

    name: str
    what: str
    effects: str
    symbols: tuple[str, ...] = ()
    families: tuple[str, ...] = ("sd", "pixart")
    active: float = 0.25


KNOB = "TODO, the paper's symbol: how strong it is, 0 to 1; 0 is off, bit for bit"
EDITS_PREDICTION = 'edits=frozenset({"prediction"})'
HOOKS = {
    hook.name: hook
    for hook in (
        HookPoint("run", "one pipe(...) call: its arguments, stages, candidates", EDITS_PREDICTION, ("RunCall",)),
        HookPoint("schedule", "the timesteps and sigmas of a run", 'edits=frozenset({"schedule"})', ("Schedule", "ScheduleCall")),
        HookPoint("scheduler", "a scheduler of its own: solvers", 'replaces=frozenset({"scheduler"})', active=0.02),
        HookPoint("guide", "how the guidance branches become one prediction", EDITS_PREDICTION, ("GuideCall",)),
        HookPoint("denoise", "one denoiser call: its inputs, its prediction", EDITS_PREDICTION, ("DenoiseCall",)),
        HookPoint("block", "one block of the denoiser: caches, corrections", EDITS_PREDICTION, ("BlockCall", "BlockInfo")),
        HookPoint("attention", "one attention layer", 'edits=frozenset({"attention"})', ("AttentionCall",)),
        HookPoint(
            "control",
            "one ControlNet forward: its residuals",
            'edits=frozenset({"conditioning"})',
            ("ControlCall", "RunCall"),
            families=("sd",),
        ),
        HookPoint(
            "step",
            "scheduler.step: latents in, latents out",
            'edits=frozenset({"latents"})',
            ("StepCall", "StepOutput"),
            active=0.02,
        ),
        HookPoint("modules", "modules exchanged when the plugin is put on", 'edits=frozenset({"weights"})', ("ModulesCall",)),
    )
}
TEMPLATES = {
    "pyproject.toml.jinja": "pyproject.toml",
    "README.md.jinja": "README.md",
    "hooks/{hook}.jinja": "{module}/__init__.py",
    "test.py.jinja": "tests/test_{name}.py",
    "workflow.yml.jinja": ".github/workflows/test.yml",
    "gitignore.jinja": ".gitignore",
    "LICENSE.jinja": "LICENSE",
}
"""Template -> file of the plugin."""


@dataclass(frozen=True)
class Answers:
    """What must be known of a plugin to write it. ``arxiv`` may be empty."""

    name: str
    hook: str
    arxiv: str
    title: str

    @property
    def dist(self) -> str:
        return dist_of(self.name)

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def class_name(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("_"))


def check_answers(answers: Answers) -> None:
    """Raises ConfigError for a name, hook, number or title that no plugin can have, with the reason."""
    name = answers.name
    if fault := fault_of_name(name):
        raise ConfigError(f"NAME = {name!r}: {fault}")
    known = registry.installed()
    if name in known:
        raise ConfigError(f"NAME = {name!r}: {known[name].dist} is installed and offers a plugin of that name; choose another")
    if answers.hook not in HOOKS:
        raise ConfigError(f"--hook {answers.hook!r} is no hook point{choices(answers.hook, HOOKS, 'Known')}")
    if answers.arxiv and not re.fullmatch(ARXIV, answers.arxiv):
        raise ConfigError(
            f'--arxiv {answers.arxiv!r} is no arXiv number: like 2401.00000, without a version; "none" for a paper that is not there'
        )
    if not answers.title.strip() or not answers.title.isprintable():
        raise ConfigError(f"--title {answers.title!r}: give the paper's title in one line")


def write_plugin(answers: Answers, folder: Path) -> Path:
    """Write the plugin's folder, all of it or nothing.

    Raises:
        ConfigError: the folder is there and not empty.
    """
    check_answers(answers)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder}: it is there and not empty; choose another folder, or delete what is in it")
    texts = render(answers)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for path, text in texts.items():
            target = made / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        made.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def render(answers: Answers) -> dict[str, str]:
    """Every file of the plugin by its path in the folder."""
    jinja2 = imported("jinja2", "`diffgraft new`")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffgraft.community.new", "template"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["py"] = quoted
    environment.filters["docstring"] = in_docstring
    facts = {
        **asdict(answers),
        "dist": answers.dist,
        "module": answers.module,
        "class_name": answers.class_name,
        "hook": HOOKS[answers.hook],
        "knob": KNOB,
        "year": date.today().year,
    }
    texts = {
        path.format(name=answers.name, module=answers.module): environment.get_template(template.format(hook=answers.hook)).render(facts)
        for template, path in TEMPLATES.items()
    }
    texts[f"{answers.module}/quality.toml"] = as_toml(Quality({}, Card("research")))
    texts[f"{answers.module}/py.typed"] = ""
    return texts


def quoted(text: str) -> str:
    """A text as a Python (and TOML) literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def in_docstring(text: str) -> str:
    """A text that may stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"', "'")
