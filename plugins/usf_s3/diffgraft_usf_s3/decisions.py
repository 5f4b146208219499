"""A solver schedule: what is decided for each step, as JSON, checked; and the known solvers as such decisions.

    {"timesteps": [999.0, 641.2, 250.7],    where the denoiser is asked, in training timesteps (flow models: 1000 sigma)
     "end": 0.0,                            where the last step ends; null: at the clean sample, which a last step of order 1 can reach
     "steps": [
       {"type": "x0", "order": 1},
       {"type": "x0", "order": 2, "points": [[-2]], "relax": "dpm2", "correct": {"order": 3}},
       {"type": "eps", "order": 2, "start": -1, "relax": 0.12}]}

"first": "zero_x0" (the official code's word) begins with an analytical step, without a call: at the end of the training's noise the state
is taken for the noise itself, eps = x, so x0 = (1 - sigma) / alpha x is near 0; it ends at the first of ``timesteps``, and its value is one
more of the past. The default, "model", begins at the first of ``timesteps``.

Indices are the paper's: -1 is the newest value of the model, -2 the one before. A corrector counts from where it is done, one value later:
there -1 is the value at the end of the step, and the step begins at ``start`` - 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from diffgraft import ConfigError, nearest
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator
from typing_extensions import Self

from diffgraft_usf_s3.method import Kind, Relax

Number = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Index = Annotated[StrictInt, Field(le=-1)]
Points = tuple[tuple[Index, ...], ...]
Factor = Relax | Annotated[StrictFloat | StrictInt, Field(allow_inf_nan=False)] | None
HIGHEST = 4


class Part(BaseModel):
    """Order, active points and relaxation of one update."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    order: Annotated[StrictInt, Field(ge=1, le=HIGHEST)] = 1
    points: Points | None = None
    relax: Factor = None

    def fault(self, known: int, start: int, newest: bool) -> str | None:
        """What is wrong with it where ``known`` values are known, or None; ``newest``: the newest one must be used."""
        if start < -known:
            return f"it starts at {start}, and there are {known} values of the model then"
        if self.order > known:
            return f"order {self.order} needs {self.order} values of the model, and there are {known} then"
        if self.order == 1 and self.relax is not None:
            return f"relax = {self.relax!r} is a factor of the first derivative, and order 1 has none: leave it out, or set order = 2"
        lists = self.active(start)
        if len(lists) != self.order - 1:
            return f"points has {len(lists)} lists, order {self.order} has {self.order - 1} derivatives"
        for i, active in enumerate(lists, 1):
            if len(set(active)) < len(active) or start in active or len(active) < i or min(active) < -known:
                return (
                    f"points = {list(active)} for derivative {i}: {i} or more of the {known} values then, none twice and none the start's "
                    f"({start})"
                )
        if newest and not any(-1 in active for active in lists):
            return "its points leave out -1, the value that it is to use: it would correct nothing"
        return None

    def active(self, start: int) -> Points:
        """Points of each derivative: those given, or the order - 1 values nearest to the start, the newer ones first."""
        if self.points is not None:
            return self.points
        newer, older = range(start + 1, 0), range(start - 1, start - HIGHEST - 2, -1)
        return ((*newer, *older)[: self.order - 1],) * (self.order - 1)


class Corrector(Part):
    """The step again, when the model's value at its end is known: no further call."""

    order: Annotated[StrictInt, Field(ge=2, le=HIGHEST + 1)] = 2

    def active(self, start: int) -> Points:
        """The same with the value at the end of the step first."""
        found = super().active(start)
        if self.points is None and found and -1 not in found[0]:
            found = ((-1, *found[0][:-1]),) * len(found)
        return found


class Decision(Part):
    """One step."""

    type: Kind = "x0"
    start: Index = -1
    correct: Corrector | None = None

    def within(self, known: int) -> Decision:
        """The same where only ``known`` values are known (a run that begins in the middle): what needs more is left out."""
        step: Decision = self
        if self.fault(known, self.start, newest=False):
            step = Decision(type=self.type, order=min(self.order, known), correct=self.correct)
        if self.correct is not None and (step.start != self.start or self.correct.fault(known + 1, step.start - 1, newest=True)):
            step = step.model_copy(update={"correct": Corrector(order=min(self.correct.order, known + 1))})
        return step


class SolverSchedule(BaseModel):
    """All steps; :meth:`parse` makes one of what a user gives."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    timesteps: tuple[Number, ...] = Field(min_length=1)
    end: Number | None = None
    first: Literal["model", "zero_x0"] = "model"
    steps: tuple[Decision, ...]

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        times = [*self.timesteps, *(() if self.end is None else (self.end,))]
        if rising := next(((a, b) for a, b in pairwise(times) if a <= b), None):
            raise ValueError(f"timesteps: {rising[1]:g} follows {rising[0]:g}: each must be smaller than the one before, and end than all")
        if len(self.steps) != len(self.timesteps):
            raise ValueError(f"steps has {len(self.steps)} decisions for {len(self.timesteps)} timesteps: give one a timestep")
        for k, step in enumerate(self.steps):
            known = k + 1 + (self.first == "zero_x0")
            if why := step.fault(known, step.start, newest=False):
                raise ValueError(f"steps.{k}: {why}")
            if step.correct is not None and (why := step.correct.fault(known + 1, step.start - 1, newest=True)):
                raise ValueError(f"steps.{k}.correct: {why}")
        if self.steps[-1].correct is not None:
            raise ValueError(f"steps.{len(self.steps) - 1}.correct: nothing is known at the end of the last step: leave it out there")
        if self.end is None and self.steps[-1].order > 1:
            raise ValueError(f"steps.{len(self.steps) - 1}: the clean sample (end = null) is reached by order 1 only: set it, or an end")
        return self

    @classmethod
    def parse(cls, given: str | Path | Mapping[str, Any] | SolverSchedule) -> SolverSchedule:
        """A schedule from a path to a JSON file, JSON text, or what is in it.

        Raises:
            ConfigError: it is none; says where and what is wrong.
        """
        if isinstance(given, SolverSchedule):
            return given
        told: Any = given
        if isinstance(given, str | Path):
            text = str(given)
            try:
                if not text.lstrip().startswith("{"):
                    text = Path(text).expanduser().read_text(encoding="utf-8")
                told = json.loads(text)
            except (OSError, ValueError) as error:
                raise ConfigError(f"usf_s3: schedule = {str(given)[:80]!r} is no JSON file of a solver schedule ({error})") from error
        if isinstance(told, Mapping) and "made_for" in told:
            raise ConfigError("usf_s3: schedule is what `diffgraft evolve` wrote, which is bound to its model: give it as artefact=")
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise ConfigError(f"usf_s3: schedule: {'; '.join(dict.fromkeys(map(_words, error.errors()[:3])))}") from None

    def plain(self) -> dict[str, Any]:
        """As JSON values, without what is the default."""
        steps = []
        for step in self.steps:
            told = {"type": step.type, "order": step.order, **step.model_dump(mode="json", exclude_defaults=True, exclude={"correct"})}
            if step.correct is not None:
                told["correct"] = {"order": step.correct.order, **step.correct.model_dump(mode="json", exclude_defaults=True)}
            steps.append(told)
        first = {} if self.first == "model" else {"first": self.first}
        return {"timesteps": list(self.timesteps), "end": self.end, **first, "steps": steps}


def _words(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function", "literal", "constrained")))
    if item["type"] == "extra_forbidden":
        *owner, name = item["loc"]
        fields = SolverSchedule if not owner else Corrector if owner[-1] == "correct" else Decision
        return f"{where} is no field{nearest(str(name), list(fields.model_fields))}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{where} is missing"
    told = repr(item["input"])[:60]
    if "relax" in item["loc"]:  # of a union each member says what it wants
        words = ", ".join(map(repr, get_args(Relax)))
        return f"{where.partition('relax')[0]}relax = {told}: {words}, or a finite number c"
    if item["type"].startswith("model"):
        kind = Corrector if item["loc"][-1:] == ("correct",) else Decision if item["loc"] else SolverSchedule
        return f"{where + ' = ' if where else ''}{told}: give a dict of {', '.join(kind.model_fields)}"
    return f"{where} = {told}: {item['msg'].replace('tuple', 'list')}"


# known solvers ------------------------------------------------------------------------------------------------------------------------

Solver = Literal["ddim", "dpm", "dpm++", "dpm++ heun", "unipc", "unipc bh1", "dpm++ 2s"]


def known_solver(name: Solver, n: int, order: int = 2) -> tuple[Decision, ...]:
    """n steps of a solver as diffusers has it, with lower orders at the last steps.

    "ddim": order 1. "dpm", "dpm++", "dpm++ heun": DPM-Solver(++) multistep of ``order`` ("heun" and all of order 3 without relaxation).
    "unipc", "unipc bh1": UniPC of ``order`` with its corrector. "dpm++ 2s": DPM-Solver++ singlestep of order 2.
    """
    if name == "ddim":
        return (Decision(),) * n
    kind: Kind = "eps" if name == "dpm" else "x0"
    if name == "dpm++ 2s":
        pair = (Decision(), Decision(order=2, start=-2, relax="dpm2"))
        return (*(pair * (n // 2)), *((Decision(),) if n % 2 else ()))
    unipc = name.startswith("unipc")
    relax: Relax | None = "bh1" if name == "unipc bh1" else "dpm2" if name != "dpm++ heun" else None
    steps = []
    for k in range(n):
        m = min(order, k + 1, n - k)
        correct = Corrector(order=m + 1, relax=relax if m == 1 else None) if unipc and k < n - 1 else None
        steps.append(Decision(type=kind, order=m, relax=relax if m == 2 else None, correct=correct))
    return tuple(steps)


def spread(first: float, last: float, n: int) -> list[float]:
    """n timesteps at even distances, from ``first`` towards ``last``, which is where the n-th step ends."""
    return [first + (last - first) * k / n for k in range(n)]


def solver_schedule(timesteps: Sequence[float], end: float | None, name: Solver, order: int = 2) -> SolverSchedule:
    """A known solver on these timesteps."""
    return SolverSchedule(timesteps=tuple(timesteps), end=end, steps=known_solver(name, len(timesteps), order))
