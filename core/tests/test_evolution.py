"""The loop of a search by itself: it minimises, counts, repeats itself, and refuses bad plans."""

from __future__ import annotations

import math

import pytest
from diffgraft import ConfigError
from diffgraft.installed.errors import RewardError
from diffgraft.methods.search import Plan, evolve
from test_search import SMALL, Line


def test_the_loop_minimises_counts_and_repeats_itself():
    judged: list[int] = []

    def judge(genome):
        judged.append(genome)
        return (genome - 77) ** 2

    plan = Plan.of(10, epochs=6, seed=1)
    assert (plan.top, plan.mutations, plan.crossovers) == (2, 5, 2)
    one = evolve(Line(), judge, plan)
    assert len(judged) == len(set(judged)) == one.judged == 60
    assert one.start == (160 - 77) ** 2 == judged[0] * 0 + 83**2
    assert one.loss == min((g - 77) ** 2 for g in judged) == (one.best - 77) ** 2
    assert one.loss < min((g - 77) ** 2 for g in judged[:10]), "later generations have found nothing better"
    assert [entry["judged"] for entry in one.history] == [10, 20, 30, 40, 50, 60]
    assert all(a["best"] >= b["best"] for a, b in zip(one.history, one.history[1:], strict=False))
    assert evolve(Line(), judge, plan) == one
    assert evolve(Line(), judge, Plan.of(10, epochs=6, seed=2)) != one


def test_a_space_with_less_than_a_generation_ends():
    class Few(Line):
        def first(self, rng, number, size):
            return number % 2

        def draw(self, rng, epoch):
            return rng.randint(0, 3)

        def mutate(self, rng, parent, epoch):
            return None

    got = evolve(Few(), lambda genome: -genome, Plan.of(8, epochs=4))
    assert (got.best, got.judged) == (3, 4)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_fitness_that_is_no_number_is_refused(loss):
    with pytest.raises(RewardError, match=r"the fitness is .* for the candidate 160"):
        evolve(Line(), lambda genome: loss, SMALL)


@pytest.mark.parametrize(("key", "value"), [("population", 0), ("epochs", 0), ("top", 0), ("mutations", 9), ("crossovers", -1)])
def test_bad_plans_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        Plan(**{"population": 5, "mutations": 2, "crossovers": 1, key: value})
