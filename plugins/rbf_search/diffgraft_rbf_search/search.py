"""The search of one run: for every sample of the batch the state that children are proposed from, and the best of them so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import ConfigError
from torch import Tensor

from diffgraft_rbf_search.method import WAYS, Climb, Level, Way
from diffgraft_rbf_search.schedulers import FlowSDEScheduler, VPFlowScheduler


@dataclass
class Search:
    """Samples are searched each on its own, in step only with respect to the number of evaluations; tensors are [rows, ...], float32."""

    levels: Sequence[Level]
    max_nfe: int
    particles: int
    quota: int
    result: str
    way: Way = "rbf"
    captions: Sequence[str] = ()
    asked: int = -1
    """The turn in which the model was last told the candidates' times."""
    climbs: list[Climb] = field(default_factory=list)
    state: tuple[Tensor, Tensor] | None = None
    """x_t and v of the state that children are proposed from."""
    best: tuple[Tensor, Tensor] | None = None
    """The same of the best candidate of the present step."""
    x0: Tensor | None = None
    """The picture, if the search ended here: Tweedie's x0 of what ``best`` holds, or of the best candidate of all steps."""
    reward: list[float] = field(default_factory=list)
    """The reward of that picture, for each row."""
    history: list[tuple[list[int], list[float], list[float]]] = field(default_factory=list)
    """Of every evaluation the candidate's level and reward and the reward of the picture then, for each row."""

    def begin(self, captions: Sequence[str]) -> None:
        """The first candidates are about to be evaluated, one for each caption."""
        self.captions = captions
        self.climbs = [WAYS[self.way](len(self.levels) - 1, self.particles, self.quota) for _ in captions]
        self.reward = [-math.inf] * len(captions)

    @property
    def is_over(self) -> bool:
        """Whether every evaluation has been made."""
        return self.climbs[0].nfe == self.max_nfe

    def places(self) -> list[Level]:
        """Where the candidates are that are evaluated next."""
        return [self.levels[climb.candidate] for climb in self.climbs]

    @property
    def is_judged(self) -> bool:
        """Whether the rewards of the candidates that are evaluated next are asked for."""
        return any(climb.judged for climb in self.climbs)

    def clean(self, x: Tensor, v: Tensor) -> Tensor:
        """Tweedie's x0 of the candidates."""
        t = torch.tensor([level.t for level in self.places()], dtype=torch.float32)
        return x - rowwise(t, x) * v

    def judge(self, x: Tensor, v: Tensor, x0: Tensor, rewards: Sequence[float]) -> None:
        """Take the candidates' rewards to account."""
        at = [climb.candidate for climb in self.climbs]
        verdicts = [climb.judge(reward) for climb, reward in zip(self.climbs, rewards, strict=True)]
        leads = [verdict.leads for verdict in verdicts]
        old = self.best or (x, v)
        self.best = choose(leads, x, old[0]), choose(leads, v, old[1])
        shown = [verdict.shown for verdict in verdicts]
        if self.result == "best":
            new_best = [new > before or before == -math.inf for new, before in zip(rewards, self.reward, strict=True)]
            shown = [s and new for s, new in zip(shown, new_best, strict=True)]
        self.x0 = choose(shown, x0, self.x0 if self.x0 is not None else x0)
        self.reward = [new if s else before for s, new, before in zip(shown, rewards, self.reward, strict=True)]
        advances = [verdict.advances for verdict in verdicts]
        old = self.state or self.best
        self.state = choose(advances, self.best[0], old[0]), choose(advances, self.best[1], old[1])
        self.history.append((at, list(rewards), list(self.reward)))

    def propose(self, noise: Tensor, scheduler: FlowSDEScheduler | VPFlowScheduler) -> Tensor:
        """The next candidates [rows, ...]: noise from the prior, or a child of each state."""
        assert self.state is not None
        steps = [(self.levels[climb.level], self.levels[climb.level + 1]) for climb in self.climbs]
        children = scheduler.children(*self.state, steps, noise)
        return choose([climb.starting for climb in self.climbs], noise / self.levels[0].c, children)

    def records(self) -> dict[str, Tensor]:
        """What the search did, [evaluations, rows]."""
        levels, rewards, results = zip(*self.history, strict=True)
        return {"level": torch.tensor(levels), "reward": torch.tensor(rewards), "result": torch.tensor(results)}


def rowwise(values: Tensor, x: Tensor) -> Tensor:
    """One value a row, in the shape and on the device of ``x``."""
    return values.to(x.device, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def choose(first: Sequence[bool], a: Tensor, b: Tensor) -> Tensor:
    """Rows of ``a`` where ``first``, else of ``b``."""
    return torch.where(rowwise(torch.tensor(first), a), a, b)


def nominal(max_nfe: int, particles: int, quota: int, steps: int, way: Way = "rbf") -> list[int]:
    """The level of each evaluation if nothing were left over: what other plugins are shown as the schedule."""
    if way == "best_of_n":
        return [i % steps for i in range(max_nfe)]
    at = [0] * particles + [1 + i // quota for i in range(max_nfe - particles)]
    return [min(level, steps - 1) for level in at]


def captions(given: Any, arguments: Mapping[str, Any], rows: int) -> list[str]:
    """The caption of each row; a prompt with several pictures has its rows one behind the other.

    Raises:
        ConfigError: the call has no prompt in words, and none was given.
    """
    found = given if given is not None else arguments.get("prompt")
    if found is None:
        raise ConfigError("plugin 'rbf_search': captions = None, and the call has no prompt in words for the reward: give captions")
    texts = [found] if isinstance(found, str) else list(found)
    if not texts or rows % len(texts):
        raise ConfigError(f"plugin 'rbf_search': captions: {len(texts)} for {rows} pictures")
    return [text for text in texts for _ in range(rows // len(texts))]
