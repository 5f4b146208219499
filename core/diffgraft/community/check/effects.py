"""Rules on behaviour: what the plugin declares is what it is seen to do on tiny pipelines, and the contract suite is green."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from diffgraft.community.check.declared import line_of_class
from diffgraft.community.check.project import Project
from diffgraft.community.check.rule import Problem
from diffgraft.community.check.source import classes_of
from diffgraft.installed import registry
from diffgraft.installed.errors import DiffgraftError
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Effects, Plugin


def families_to_run(cls: type[Plugin], names: Iterable[str] | None = None) -> list[Family]:
    """The families with a tiny pipeline to watch a plugin on: those named, or the fastest U-Net and DiT that it claims."""
    from diffgraft.testing.case import one_of_each_kind

    claimed = [family for family in registry.families().values() if cls.claims(family) and family.tiny is not None]
    if names is None:
        return one_of_each_kind(claimed)
    chosen = list(names)
    return [family for family in claimed if family.name in chosen]


@dataclass
class Observed:
    """What a plugin was seen to do, over all families on which it was watched: word -> where."""

    skips: dict[str, str]
    edits: dict[str, str]
    needs: dict[str, str]
    draws: dict[str, str]
    waits: dict[tuple[str, int], str]
    couples: str
    saves_nothing: str
    inactive: list[str]


def observe(project: Project, families: Iterable[Family]) -> Observed:
    """Run the plugin at its active settings between two neighbours, and a sample alone against the same in a batch."""
    from diffgraft.community.check.watch import Listening, Seen, neighbours
    from diffgraft.kernel.loading import load_pipeline
    from diffgraft.testing.repeats import PAIR
    from diffgraft.testing.setting import Setting
    from diffgraft.testing.subject import Subject, distance, rounding

    cls = project.cls
    total = Observed({}, {}, {}, {}, {}, "", "", [])
    for family in families:
        subject = Subject(cls, family, family.pipelines[0])
        seen = Seen()
        plain, listening = Listening(Seen(), project.package), Listening(seen, project.package)
        before, after = neighbours(cls, plain.seen)
        bare = load_pipeline(subject.make(), plugins=[before, after])
        outer, inner = neighbours(cls, seen)
        pipe = load_pipeline(subject.make(), plugins=[outer, subject.instance(**cls.active), inner])
        subject.baseline()
        with plain:
            subject.run(bare)
        with listening:
            subject.run(pipe)
        if cls.scheduler is not None and listening.drawn_in_step > plain.drawn_in_step:
            seen.draws["step"] = "its scheduler draws in scheduler.step"
        for name in ("skips", "edits", "needs", "draws", "waits"):
            for word, where in getattr(seen, name).items():
                getattr(total, name).setdefault(word, where if name == "waits" else f"{family.name}, {where}")
        total.inactive += [f"{family.name}: {note}" for note in subject.excuses(subject.report(pipe))]
        saves = cls.effects.skips and "extra_forwards" not in cls.effects.needs
        if saves and (work := subject.fresh().work) >= subject.work_of_baseline():
            total.saves_nothing = f"{family.name}: the denoiser's layers get {work} values, as many as without the plugin"
        if not subject.couples and subject.supports(PAIR):
            for i in PAIR.samples:
                alone = Setting(samples=(i,))
                noise = distance(subject.baseline(PAIR)[i : i + 1], subject.baseline(alone))
                apart = distance(subject.fresh(PAIR).output[i : i + 1], subject.fresh(alone).output)
                if apart > rounding(noise, subject.fresh(alone).output):
                    total.couples = f"{family.name}: sample {i} alone differs from the same in a batch by {apart:.3g}"
    return total


STANDS_FOR = {"features": ("prediction", "attention", "weights"), "resolution": ("latents",), "latents": ("resolution",)}
"""What is seen as the one may be declared as the other: the vocabulary has no word for features, and sizes change with the latents."""


def effects_problems(project: Project, families: Iterable[Family]) -> Iterator[tuple[str, Problem]]:
    """(rule, problem) for everything that is done and not declared, and what is declared and not done."""
    file, line = line_of_effects(project)
    try:
        seen = observe(project, families)
    except (AssertionError, DiffgraftError) as error:
        yield (
            "effects",
            Problem(f"it cannot be watched: {type(error).__name__}: {error}", "make it run at its `active` settings", file, line),
        )
        return
    effects = project.cls.effects
    replaces = bool(effects.replaces & {"denoiser"})

    def undeclared(field: str, word: str, where: str) -> tuple[str, Problem]:
        reason = f"it {field} {word} ({where}), but Effects does not say so: the planner cannot see what it clashes with"
        return "effects", Problem(reason, f"add {word!r} to Effects({field}=...), or do not do it", file, line)

    if not replaces:
        for word, where in seen.skips.items():
            if word not in effects.skips and not (word in ("denoiser", "branches") and effects.skips & {"denoiser", "branches"}):
                yield undeclared("skips", word, where)
    for word, where in seen.edits.items():
        accepted = {word, *STANDS_FOR.get(word, ())}
        implied = (word in ("prediction", "features") and (replaces or effects.skips)) or (
            word in ("schedule", "timestep") and "scheduler" in effects.replaces
        )
        if not accepted & effects.edits and not implied:
            yield undeclared("edits", "prediction" if word == "features" else word, where)
    for word, where in seen.needs.items():
        accepted = {"gradients", "plain_gradients"} if word == "gradients" else {word}
        if not accepted & effects.needs and not (replaces and word == "extra_forwards"):
            yield undeclared("needs", word, where)
    for where in list(seen.draws.values())[:1]:
        if not effects.stochastic and (seen.edits or not effects.reads_only):  # a plugin that only looks may draw for itself
            yield "effects", Problem(f"it draws noise of its own ({where}) and does not say so", "Effects(stochastic=True)", file, line)
    if seen.couples and not effects.couples_batch:
        yield (
            "effects",
            Problem(f"it couples the samples of a batch ({seen.couples}) and does not say so", "Effects(couples_batch=True)", file, line),
        )
    if not seen.inactive:
        yield from overdeclared(effects, seen, file, line)
    if project.cls.scheduler is not None and "scheduler" not in effects.replaces:
        yield "effects", Problem("it has a scheduler and does not say that it replaces one", 'Effects(replaces={"scheduler"})', file, line)
    for (path, number), point in seen.waits.items():
        source = next((source for source in project.sources if str(source.path) == path), None)
        yield (
            "host_sync",
            Problem(
                f"a value is read from a tensor in {point}: every step waits until the device has computed it",
                "stay on tensors, or read it once a run in `run` or `schedule`",
                source.where if source else path,
                number,
            ),
        )


def overdeclared(effects: Effects, seen: Observed, file: str, line: int) -> Iterator[tuple[str, Problem]]:
    """What the plugin says that it does, and does not at its active settings."""
    if seen.saves_nothing:
        reason = f"it says that it skips {', '.join(sorted(effects.skips))}, but computes everything ({seen.saves_nothing})"
        yield (
            "effects",
            Problem(reason, "skip it, choose `active` so that it shows, or take the word out of Effects(skips=...)", file, line),
        )
    if effects.stochastic and not seen.draws:
        reason = "it says that it draws noise of its own, but draws none: it is refused beside what needs determinism for nothing"
        yield "effects", Problem(reason, "Effects(stochastic=False)", file, line)


def line_of_effects(project: Project) -> tuple[str, int]:
    """Where the class declares its effects."""
    found = classes_of(project).get(project.class_name)
    for item in found[1].body if found else []:
        targets = getattr(item, "targets", None) or [getattr(item, "target", None)]
        if found and any(getattr(target, "id", None) == "effects" for target in targets):
            return found[0].where, item.lineno
    return line_of_class(project)


def contract_problems(project: Project, families: Iterable[str] | None) -> Iterator[tuple[str, Problem]]:
    """(rule, problem) for every case of the contract suite that fails."""
    from diffgraft.testing import contract_cases

    file, line = line_of_class(project)
    cases = contract_cases(project.cls, families)
    if not cases:
        yield (
            "contract",
            Problem(
                "no case of the contract applies", "claim a family that has a tiny pipeline (`pip install diffgraft-families`)", file, line
            ),
        )
    for case in cases:
        try:
            case.run()
        except AssertionError as error:
            yield "contract", Problem(str(error), "pytest on diffgraft.testing.contract_cases runs this case alone", file, line)
