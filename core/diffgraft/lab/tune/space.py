"""Which candidates a tuning may propose: numbers of steps, legal stacks, the knobs that plugins offer (see `diffgraft.lab.tune`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, DiffgraftError
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.plugin import Need, Plugin
from diffgraft.kernel.loading import load_pipeline
from diffgraft.lab.tune.goal import Candidate


def find_plugins(pipe: Any, fixed: Mapping[str, Mapping[str, Any]]) -> tuple[list[Plugin], dict[str, str]]:
    """The installed plugins that declare what to tune and can be put on ``pipe``, with the knobs that are ``fixed``; and why others not.

    Raises:
        DiffgraftError: a plugin with fixed knobs, which somebody wants, cannot take part.
    """
    found: list[Plugin] = []
    left_out: dict[str, str] = {}
    for name in registry.installed():
        try:
            cls = registry.find(name)
            if not cls.tune and name not in fixed:
                continue
            plugin = cls(**fixed.get(name, {}))
            missing = [need.knob for need in cls.needs if getattr(plugin.config, need.knob) is None and not makes(plugin, need)]
            if missing:
                raise ConfigError(f"needs {', '.join(missing)}: give " + " ".join(f"-o {name}.{knob}=..." for knob in missing))
            ensure_fits(pipe, plugin)
        except DiffgraftError as error:
            if name in fixed:
                raise
            left_out[name] = str(error)
        else:
            found.append(plugin)
    return found, left_out


def makes(plugin: Plugin, need: Need) -> bool:
    """Whether the artefact is for us to make: the plugin can calibrate it, and nobody has given it or set it to none."""
    return need.kind == "artefact" and plugin.calibration is not None and need.knob not in plugin.config.model_fields_set


def ensure_fits(pipe: Any, plugin: Plugin) -> None:
    """Raises what attaching raises."""
    load_pipeline(pipe, [plugin]).plugins.clear()


class Space:
    """Which candidates there are: a number of steps, then plugin after plugin whether it takes part, where it can, and with which knobs.

    Every candidate is legal by construction: a plugin that does not go with those before it is not asked.
    """

    def __init__(self, plugins: Sequence[Plugin], ladder: Sequence[int]) -> None:
        self.plugins = plugins
        self.ladder = ladder
        self.tables = {
            plugin.name: {knob: values for knob, values in plugin.tune.items() if knob not in plugin.config.model_fields_set}
            for plugin in plugins
        }

    def draw(self, trial: Any) -> Candidate:
        """The candidate that an Optuna trial stands for (numbers of rungs and values: neighbours are alike)."""
        steps = self.ladder[trial.suggest_int("steps", 0, len(self.ladder) - 1)]
        stack: list[Plugin] = []
        knobs: dict[str, dict[str, Any]] = {}
        for plugin in self.plugins:
            longer = with_plugin(stack, plugin)
            if longer is None or not trial.suggest_int(f"use {plugin.name}", 0, 1):
                continue
            stack, table = longer, self.tables[plugin.name]
            chosen = {knob: v[trial.suggest_int(f"{plugin.name}.{knob}", 0, len(v) - 1)] for knob, v in table.items()}
            knobs[plugin.name] = {**plugin.own_knobs, **chosen}
        return Candidate(steps, {plugin.name: knobs[plugin.name] for plugin in stack})

    def first(self) -> list[dict[str, int]]:
        """What is measured before anything is proposed: fewer steps alone, then each plugin alone, gently, those to calibrate last."""
        none = {"steps": 0, **{f"use {plugin.name}": 0 for plugin in self.plugins}}
        gentle = [
            {**none, f"use {plugin.name}": 1, **{f"{plugin.name}.{knob}": 0 for knob in self.tables[plugin.name]}}
            for plugin in sorted(self.plugins, key=lambda p: any(makes(p, need) for need in p.needs))
        ]
        return [{**none, "steps": i} for i in range(len(self.ladder))] + gentle


def with_plugin(stack: Sequence[Plugin], plugin: Plugin) -> list[Plugin] | None:
    """``stack`` and ``plugin`` at the place with the fewest warnings, innermost of equals; None where the planner accepts none."""
    best: tuple[int, list[Plugin]] | None = None
    for place in range(len(stack), -1, -1):
        longer = [*stack[:place], plugin, *stack[place:]]
        verdict = plan([Part.of(one) for one in longer])
        if not verdict.conflicts and (best is None or len(verdict.warnings) < best[0]):
            best = len(verdict.warnings), longer
    return None if best is None else best[1]
