"""Do these plugins fit together? Pure rules over declared effects: no torch, no pipeline, no list of names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from diffgraft.installed.errors import Conflict
from diffgraft.installed.plugin import Effects, Plugin

STEPWISE = frozenset({"latents", "timestep", "schedule", "resolution"})
"""What may be edited only where one step follows another."""


@dataclass(frozen=True)
class Part:
    """What the planner knows of one plugin."""

    name: str
    effects: Effects
    unknown: bool = False
    """Whether it does something that is not known here."""

    @classmethod
    def of(cls, plugin: Plugin) -> Part:
        """A plugin with its knobs: at its neutral settings it does nothing that another one could mind."""
        return cls(plugin.name, Effects() if plugin.is_neutral else plugin.effects)


@dataclass(frozen=True)
class Plan:
    """The verdict on a stack: ``order`` outermost first; ``conflicts`` refuse it, ``warnings`` do not."""

    order: tuple[str, ...]
    conflicts: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    def ensure(self, known: Collection[str] = ()) -> Plan:
        """Raises Conflict with every reason at once, but those that are ``known``."""
        if new := [text for text in self.conflicts if text not in known]:
            raise Conflict("these plugins do not fit together:\n  - " + "\n  - ".join(new))
        return self


def plan(parts: Sequence[Part], foreign: Sequence[Part] = ()) -> Plan:
    """Order a stack (the user's order: first = outermost) and judge every pair of it by what the two do.

    Args:
        foreign: what others have put on the denoiser (diffusers' own caches): inside of all plugins, and judged with each of them.
    """
    conflicts = [
        f"{part.name} is in the list {count} times; keep one and set its knobs with plugins={{{part.name!r}: {{...}}}}"
        for part, count in {p.name: (p, sum(q.name == p.name for q in parts)) for p in parts}.values()
        if count > 1
    ]
    warnings: list[str] = []
    for outer, inner in combinations(parts, 2):
        if outer.name != inner.name:
            clashes, surprises = judge(outer, inner)
            conflicts += clashes
            warnings += surprises
    for part, other in product(parts, foreign):
        clashes, surprises = judge_foreign(part, other)
        conflicts += clashes
        warnings += surprises
    return Plan(tuple(part.name for part in parts), tuple(conflicts), tuple(warnings))


def judge_foreign(part: Part, other: Part) -> tuple[list[str], list[str]]:
    """(conflicts, warnings) of a plugin and something foreign inside it, which cannot be told when the plugin does something unusual."""
    mine = part.effects
    skips = other.effects.skips
    if other.unknown:
        return [], [f"{part.name} runs beside {other.name}, and what that does is not known here"] if mine != Effects() else []
    if skips and "plain_gradients" in mine.needs:
        return [f"{part.name} needs gradients through the denoiser itself, and {other.name} would answer with an old step's features"], []
    if skips and "resolution" in mine.edits:
        return [f"{part.name} changes the resolution in mid-run, and {other.name} would reuse features of the other size"], []
    conflicts, warnings = judge(part, other)
    if skips and not conflicts and ({"denoiser"} & (mine.skips | mine.replaces) or "extra_forwards" in mine.needs):
        warnings.append(f"{other.name} counts the denoiser's calls and takes each for a step, but with {part.name} they are others")
    if "attention" in other.effects.edits and "conditioning" in mine.edits:
        warnings.append(f"{part.name} edits the conditioning, of which {other.name} may keep what it was")
    return conflicts, warnings


def judge(outer: Part, inner: Part) -> tuple[list[str], list[str]]:
    """(conflicts, warnings) of two plugins, ``outer`` before ``inner`` in the list."""
    a, b = outer.effects, inner.effects
    conflicts: list[str] = []
    warnings: list[str] = []
    both = f"{outer.name} and {inner.name}"
    for what in sorted(a.replaces & b.replaces):
        conflicts.append(f"{both} both replace the {what}: only one can be there; remove one")
    for what in sorted(a.skips & b.skips):
        conflicts.append(f"{both} both skip {what}: each would reuse what the other did not compute; remove one or disable it in turn")
    for x, y in ((outer, inner), (inner, outer)):
        skipped = x.effects.skips & {"denoiser", "blocks"}
        if skipped and "all_blocks" in y.effects.needs:
            conflicts.append(f"{y.name} needs every block computed, but {x.name} skips {', '.join(sorted(skipped))}; disable one")
        elif skipped and "gradients" in y.effects.needs:
            conflicts.append(
                f"{y.name} needs gradients through the denoiser, but {x.name} skips {', '.join(sorted(skipped))}: "
                f"the gradient would be that of an old step; disable {x.name}"
            )
        if skipped and "plain_gradients" in y.effects.needs:
            warnings.append(
                f"{y.name} takes its gradients through the whole denoiser, past {x.name}: {x.name} saves work in the other calls only"
            )
        if "denoiser" in x.effects.replaces and "plain_gradients" in y.effects.needs:
            warnings.append(f"{y.name} takes its gradients through the pipeline's own denoiser also where {x.name} lets another one run")
        if x.effects.stochastic and "determinism" in y.effects.needs:
            conflicts.append(f"{y.name} needs a deterministic run, but {x.name} draws noise of its own; disable {x.name} or set it neutral")
        if "own_steps" in y.effects.needs and (edited := sorted(x.effects.edits & STEPWISE)):
            conflicts.append(
                f"{x.name} edits {', '.join(edited)} from step to step, but the calls of {y.name} are no successive steps: disable one"
            )
        if "resolution" in x.effects.edits and "calibrated_run" in y.effects.needs:
            conflicts.append(
                f"{y.name} was calibrated for runs of one size and number of steps, but {x.name} runs the pipeline in stages of several: "
                "remove one"
            )
        elif "resolution" in x.effects.edits and "one_size" in y.effects.needs:
            conflicts.append(f"{y.name} was given something of the call's size, and {x.name} begins with smaller pictures: remove one")
        elif "resolution" in x.effects.edits and "blocks" in y.effects.skips:  # it reuses features of an earlier step
            warnings.append(f"{x.name} changes the resolution in mid-run: {y.name} starts its cache again at each change")
    if ("denoiser" in a.skips and "blocks" in b.skips) or ("blocks" in a.skips and "denoiser" in b.skips):
        warnings.append(f"{both}: one skips whole denoiser calls, the other blocks inside them; their savings do not add up")
    for what in sorted(a.edits & b.edits & {"timestep", "schedule"}):
        warnings.append(f"{both} both edit the {what}: {inner.name} sees what {outer.name} made of it")
    if "scheduler" in a.replaces | b.replaces and "schedule" in a.edits | b.edits:
        warnings.append(f"{both}: the edited schedule goes to the replaced scheduler")
    return conflicts, warnings
