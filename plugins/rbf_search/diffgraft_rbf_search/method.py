"""Stochastic sampling and rollover budget forcing for flow models (arXiv 2503.19385), in the paper's symbols; free of diffusers.

An interpolant keeps samples x_r = a_r x0 + s_r eps for times r from 1 (noise) to 0 (picture). Its velocity is
u_r = E[a_r' x0 + s_r' eps | x_r].
A flow model is trained on the linear one, a = 1 - t, s = t: v_t = E[eps - x0 | x_t]. The functions here take numbers as well as tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Grid = Literal["exp", "uniform", "pipeline"]
Shape = Literal["square", "linear", "constant", "sigma", "sin", "clipping", "exp", "tan"]
Way = Literal["rbf", "svdd", "best_of_n"]


class Level(NamedTuple):
    """An interpolant at time ``r``: signal ``a``, noise ``s``, their derivatives ``da``, ``ds``."""

    r: float
    a: float
    s: float
    da: float
    ds: float

    @property
    def t(self) -> float:
        """The linear time of the same signal-to-noise ratio, rho^-1(a_r / s_r) with rho(t) = (1 - t) / t."""
        return self.s / (self.a + self.s)

    @property
    def c(self) -> float:
        """How much larger a sample is than the linear one of the same ratio, s_r / t (which is a_r + s_r, also where t = 0)."""
        return self.a + self.s

    @property
    def dt(self) -> float:
        """dt/dr = t^2 (s a' - a s') / (s^2 (-t - (1 - t)))."""
        return (self.a * self.ds - self.s * self.da) / (self.a + self.s) ** 2

    @property
    def dc(self) -> float:
        """dc/dr = (t s' - s dt/dr) / t^2."""
        return self.da + self.ds


@dataclass(frozen=True)
class Linear:
    """The interpolant that flow models are trained on."""

    def at(self, r: float) -> Level:
        return Level(r, 1 - r, r, -1.0, 1.0)

    def time(self, t: float) -> float:
        """The time r at which the signal-to-noise ratio is that of the linear time ``t``."""
        return t


@dataclass(frozen=True)
class VP:
    """The variance-preserving interpolant, a = exp(-T / 2), T = (beta_max - beta_min) r^2 / 2 + beta_min r.

    It ends before pure noise: r = 1 is t = 0.99347. At r = 0 s' is infinite; nobody may ask for a velocity there.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def at(self, r: float) -> Level:
        T = (self.beta_max - self.beta_min) * r * r / 2 + self.beta_min * r
        dT = (self.beta_max - self.beta_min) * r + self.beta_min
        a, s = math.exp(-T / 2), math.sqrt(-math.expm1(-T))
        return Level(r, a, s, -dT / 2 * a, a * a * dT / (2 * s) if s else math.inf)

    def time(self, t: float) -> float:
        """As :meth:`Linear.time`; linear times behind the end (t > 0.99347) are r = 1."""
        if t >= 1:
            return 1.0
        T = math.log1p((t / (1 - t)) ** 2)
        slope = self.beta_max - self.beta_min
        root = math.sqrt(self.beta_min**2 + 2 * slope * T)
        return min(1.0, 2 * T / (self.beta_min + root))


def velocity(x: Any, v: Any, at: Level) -> Any:
    """u_r(x) = (c'/c) x + c t' v_t(x / c), the converted velocity; ``v`` is the flow model's at x / c and the linear time t."""
    return at.dc / at.c * x + at.c * at.dt * v


def score(x: Any, u: Any, at: Level) -> Any:
    """grad log p_r(x) = ((a / a') u - x) / (s^2 - (a / a') s' s)."""
    ratio = at.a / at.da
    return (ratio * u - x) / (at.s**2 - ratio * at.ds * at.s)


def tweedie(x: Any, u: Any, at: Level) -> Any:
    """x0 = (s u - s' x) / (a' s - s' a)."""
    return (at.s * u - at.ds * x) / (at.da * at.s - at.ds * at.a)


def diffusion(at: Level, norm: float, shape: Shape) -> float:
    """g_r = norm times r^2 (square, the paper's with norm 3) or another of the official code's forms of r."""
    r = at.r
    forms: dict[str, float] = {"square": r * r, "linear": r, "constant": 1.0, "sigma": at.s, "sin": math.sin(math.pi / 2 * r)}
    forms |= {"clipping": max(0.0, 2 * r - 1), "exp": math.exp(-(((r - 1) / 0.1) ** 2)), "tan": math.tan(math.pi / 2 * min(r, 0.95))}
    return norm * forms[shape]


def sde_step(x: Any, u: Any, at: Level, to: float, g: float, w: Any) -> Any:
    """One Euler-Maruyama step back from ``at.r`` to ``to``: x + (-u + g^2/2 grad log p) dr + g sqrt(dr) w. Any g keeps the marginals."""
    dr = at.r - to
    return x + (-u + g * g / 2 * score(x, u, at)) * dr + g * math.sqrt(dr) * w


def move(here: Level, there: Level, g: float) -> tuple[float, float, float]:
    """The step on the flow model's own samples: weights of x_t, of v and of the noise in the next x_t.

    x_t = x_r / c, so the model is always given what it was trained on. At r = 0 the next sample is Tweedie's x0 = x_t - t v.
    """
    if there.r <= 0:
        return 1.0, -here.t, 0.0

    def step(x: float, v: float, w: float) -> float:  # linear in all three: its values at unit vectors are the weights
        scaled = here.c * x
        return sde_step(scaled, velocity(scaled, v, here), here, there.r, g, w) / there.c

    return step(1.0, 0.0, 0.0), step(0.0, 1.0, 0.0), step(0.0, 0.0, 1.0)


def spaced(t: float, grid: Grid) -> float:
    """r of a uniformly spaced t: sqrt(1 - (1 - t)^2) (exp, the paper's) or t itself."""
    return math.sqrt(1 - (1 - t) ** 2) if grid == "exp" else t


def quota(max_nfe: int, particles: int, steps: int) -> int:
    """Q: evaluations that each step may spend before what earlier steps left over."""
    return (max_nfe - particles) // steps


class Verdict(NamedTuple):
    """What a reward decided about the candidate that earned it."""

    leads: bool
    """It is the best candidate of its step so far."""
    advances: bool
    """The best candidate becomes the state that children are proposed from."""
    shown: bool
    """Its picture would be the result if the search ended here."""


class Climb:
    """Rollover budget forcing of one sample: which state children are proposed from, and with which budget. Told one reward an evaluation.

    ``level`` is the state's place on the grid. The first ``particles`` evaluations are draws from the prior, of which the best becomes the
    state at level 0. A child whose reward is above the bar is accepted at once, and what is left of the budget is added to the next step's.
    The bar is the best reward so far and never falls. When the budget is used up, the best child is taken, better or not. The last step is
    not left: it gets all evaluations that remain.
    """

    def __init__(self, steps: int, particles: int, budget: int) -> None:
        self.last = steps - 2  # children of this level are at the last one, where a picture is one Tweedie step away
        self.particles = particles
        self.budget = budget
        self.nfe = self.level = self.accepted = self.exhausted = 0
        self.left = budget
        self.bar = -math.inf
        self.best = -math.inf  # of the candidates of this step

    @property
    def starting(self) -> bool:
        """Whether the next candidate is drawn from the prior."""
        return self.nfe < self.particles

    @property
    def candidate(self) -> int:
        """The level of the sample that is evaluated next."""
        return 0 if self.starting else self.level + 1

    @property
    def judged(self) -> bool:
        """Whether the reward of the next candidate is asked for."""
        return True

    def judge(self, reward: float) -> Verdict:
        leads = reward > self.best
        self.best = max(self.best, reward)
        starting = self.starting
        self.nfe += 1
        if starting:
            advances = not self.starting
        elif self.level == self.last:
            advances = False
        else:
            advances = self.moves_on(reward > self.bar)
            self.level += advances
        if advances:
            self.bar, self.best = max(self.bar, self.best), -math.inf
        return Verdict(leads, advances, leads)

    def moves_on(self, above: bool) -> bool:
        """Whether this child, whose reward is ``above`` the bar or not, ends its step."""
        self.left -= 1
        if not above and self.left > 0:
            return False
        self.accepted += above
        self.exhausted += not above
        self.left += self.budget
        return True


class Greedy(Climb):
    """SVDD (arXiv 2408.08252) with temperature 0: each step evaluates its whole budget and takes the best child."""

    def moves_on(self, above: bool) -> bool:
        self.left -= 1
        if self.left:
            return False
        self.exhausted += 1
        self.left = self.budget
        return True


class BestOfN(Climb):
    """Whole paths one after the other, max_nfe / steps of them, each from a noise of its own; only their ends are judged."""

    @property
    def starting(self) -> bool:
        return self.nfe % (self.last + 2) == 0

    @property
    def judged(self) -> bool:
        return self.candidate == self.last + 1

    def judge(self, reward: float) -> Verdict:
        ends, better = self.judged, reward > self.bar
        first = self.bar == -math.inf  # until a path has ended there is nothing better to show than where the first one is
        self.level = self.candidate
        self.nfe += 1
        if self.starting:
            self.level = 0
        if ends:
            self.bar = max(self.bar, reward)
        return Verdict(True, True, first or (ends and better))


WAYS: dict[Way, type[Climb]] = {"rbf": Climb, "svdd": Greedy, "best_of_n": BestOfN}
