"""The stack on the page: what speaks against it, and how it is written in Python, in YAML and on a command line. Pure, without torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.community.quality import GOALS, read
from diffgraft.installed import registry
from diffgraft.installed.errors import DiffgraftError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.offers import core_version
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.plugin import Plugin
from diffgraft.installed.specs import build_plugin
from diffgraft.stacks.schema import Member, StackFile, written
from diffgraft.stacks.writing import HEAD
from diffgraft.ui.access import Access
from diffgraft.ui.controls import controls_of, set_knobs

Specs = list[tuple[str, dict[str, Any]]]
"""(plugin, knobs that were set), outermost first."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What one run of the page was asked for; None is the pipeline's own."""

    pipeline: str
    prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    specs: Specs = field(default_factory=list)

    @property
    def title(self) -> str:
        """The stack in a few words."""
        return " + ".join(f"{name}({in_words(knobs)})" if knobs else name for name, knobs in self.specs) or "no plugins"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a stack: ``faults`` and ``clashes`` keep it from running, ``warnings`` do not."""

    plugins: tuple[Plugin, ...] = ()
    faults: tuple[str, ...] = ()
    clashes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return not (self.faults or self.clashes)


def in_words(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in knobs.items())


def menu() -> list[tuple[str, str]]:
    """(what it says, name) of each plugin that may be used, those of one goal together; none is imported."""
    rows = []
    goals = [*GOALS]
    for name, offer in registry.installed().items():
        if offer.broken or not offer.allowed:
            continue
        quality = read(offer.module)
        goal = quality.card.goal if quality and quality.card else ""
        summary = re.sub(r" for diffgraft\b| \(arXiv [^)]*\)", "", offer.summary)
        label = f"{name} ({name.replace('_', ' ')})" if "_" in name else name  # the page finds what a label holds: "time shift" too
        rows.append((goals.index(goal) if goal in goals else len(goals), name, f"{label}: {summary}" if summary else label))
    return [(label, name) for _, name, label in sorted(rows)]


def pipeline_class(name: str) -> str | None:
    """The class of a pipeline in a folder, from its index file; None where only loading it tells (on the Hub)."""
    try:
        index = json.loads((Path(registry.resolve(name)) / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (DiffgraftError, OSError, ValueError, KeyError, TypeError):
        return None


def specs_of(names: Sequence[str], shown: Mapping[str, Mapping[str, Any]], access: Access) -> Specs:
    """The stack as (plugin, knobs that were set), outermost first.

    Raises:
        PluginNotFound, BrokenPlugin, ConfigError: a name or a value that cannot be.
    """
    found: Specs = []
    for name in names:
        cls = registry.find(name)
        knobs = set_knobs(cls, shown.get(name, {}))
        named = {control.name for control in controls_of(cls) if control.kind in ("file", "pipeline")}
        found.append((name, {knob: access.ensure(name, knob, value, knob in named) for knob, value in knobs.items()}))
    return found


def judge(names: Sequence[str], shown: Mapping[str, Mapping[str, Any]], access: Access, kind: str | None) -> Verdict:
    """What speaks against a stack on a pipeline of class ``kind`` (None: not known yet): every plugin's own fault, then the planner's
    word on all of them."""
    faults: list[str] = []
    plugins: list[Plugin] = []
    known = registry.family_of([kind]) if kind else None
    for name in names:
        try:
            ((_, knobs),) = specs_of([name], shown, access)
            plugins.append(build_plugin((name, knobs)))
            if known is not None and kind is not None:
                ensure_works_on(plugins[-1], known[0], kind)
        except DiffgraftError as error:
            faults.append(str(error))
    judged = plan([Part.of(plugin) for plugin in plugins])
    return Verdict(tuple(plugins), tuple(faults), judged.conflicts, judged.warnings)


def ensure_works_on(plugin: Plugin, family: Family, kind: str) -> None:
    """Raises Unsupported where a plugin says that it does not work on such pipelines."""
    if not plugin.claims(family):
        raise Unsupported(f"{plugin.name} does not work on {kind} (family {family.name}): it is for {', '.join(plugin.families)}")
    if (why := plugin.why_not_on(kind)) is not None:
        raise Unsupported(f"{plugin.name} does not work on {kind}: {why}")


def moved(names: Sequence[str], name: str, by: int) -> list[str]:
    """The order with one plugin so many places further out (negative) or in."""
    order = list(names)
    if name in order:
        place = order.index(name)
        order.insert(max(0, min(len(order) - 1, place + by)), order.pop(place))
    return order


# how it is written -----------------------------------------------------------------------------------------------------------------------


def as_python(asked: Asked, takes: Mapping[str, Any] | None = None) -> str:
    """Python that makes the picture of the stack once more.

    Args:
        takes: the arguments that the pipeline's call gets beside these; None: not known before it is loaded.
    """
    plugins = {name: knobs for name, knobs in asked.specs}
    words: Any = plugins if any(plugins.values()) else [*plugins]
    given = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance_scale}
    call = [] if takes is not None else [repr(asked.prompt)] if asked.prompt else []
    call += [f"{name}={value!r}" for name, value in (takes or {}).items()]
    call += [f"{name}={value!r}" for name, value in given.items() if value is not None]
    call.append(f"generator=torch.Generator().manual_seed({asked.seed})")
    return (
        "import torch\nfrom diffgraft import load_pipeline\n\n"
        f"pipe = load_pipeline({asked.pipeline!r}{f', plugins={words!r}' if words else ''})\n"
        f"result = pipe({', '.join(call)})\n"
        "print(pipe.plugins.report())\n"
    )


def as_yaml(asked: Asked) -> str:
    """A stack file (`load_pipeline(..., plugins="stack.yaml")`). Files stand in it by their names, without checksums."""
    members = []
    for name, knobs in asked.specs:
        offer = registry.named(name)
        members.append(Member(name=name, package=offer.dist, version=offer.version, knobs=knobs))
    pipeline = pipeline_class(asked.pipeline)
    found = registry.family_of([pipeline]) if pipeline else None
    family = found[0].name if found else None
    return HEAD + written(StackFile(family=family, pipeline=pipeline, diffgraft=core_version(), plugins=tuple(members)))


def as_command(asked: Asked) -> str:
    """The command that makes the picture once more, with its making in the file."""
    words = ["diffgraft", "run", asked.pipeline]
    words += ["--prompt", asked.prompt] if asked.prompt else []
    words += ["--plugins", ",".join(name for name, _ in asked.specs)] if asked.specs else []
    for name, knobs in asked.specs:
        for knob, value in knobs.items():
            words += ["-o", f"{name}.{knob}={value if isinstance(value, str) else json.dumps(value)}"]
    words += ["--steps", str(asked.steps)] if asked.steps is not None else []
    words += ["--guidance-scale", f"{asked.guidance_scale:g}"] if asked.guidance_scale is not None else []
    return shlex.join([*words, "--seed", str(asked.seed)])
