"""What a tuning is asked for, and the space that it looks through."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
from diffgraft import ConfigError
from diffgraft.lab.tune.goal import Candidate, Goal, Trial, front_of, ladder_of, parse_budget
from diffgraft.lab.tune.space import Space
from tuning import PLUGINS, SAMPLES, SETTINGS, SparseTuned


def test_targets_and_budgets():
    assert Goal.parse("psnr=30") == Goal("psnr", 30.0)
    assert str(Goal.parse("judge=0.9")) == "judge 0.9"
    assert [parse_budget(text) for text in ("90s", "30m", "1.5h", "1h30m")] == [90, 1800, 5400, 5400]
    assert ladder_of(50) == (50, 35, 25, 18, 12, 9, 6, 4)
    assert ladder_of(2) == (2, 1)


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=much", "psnr=-1", "psnr=nan", "psnr=inf", "ssim=2", "judge=90", "lpips=0.1", "=3"])
def test_bad_targets_are_refused(text):
    with pytest.raises(ConfigError, match=r"target .*psnr=30"):
        Goal.parse(text)


@pytest.mark.parametrize("text", ["", "0s", "30", "m", "-3m", "1.2.3m", "ten minutes"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="30m or 1h30m"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"trials": None}, "--budget 30m, --trials N"),
        ({"held_out": SAMPLES[1:]}, "other prompts or other seeds"),
        ({"samples": ()}, "at least one"),
        ({"steps": 0}, "steps = 0"),
        ({"ladder": (5,)}, "1 to the pipeline's own 4"),
        ({"ladder": (0,)}, "1 to the pipeline's own 4"),
        ({"reference_steps": 3}, "at least the pipeline's own 4"),
    ],
)
def test_bad_settings_are_refused(more, word):
    with pytest.raises(ConfigError, match=word):
        replace(SETTINGS, **more)


def test_the_space_is_legal_and_whole():
    space = Space(PLUGINS, SETTINGS.ladder)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.draw(study.ask()) for _ in range(300)]
    stacks = {tuple(candidate.plugins) for candidate in drawn}
    assert stacks == {(), ("sparse",), ("rival",), ("idle",), ("sparse", "idle"), ("rival", "idle")}, "sparse and rival skip the same"
    assert {candidate.steps for candidate in drawn} == {1, 2, 3, 4}
    assert {c.plugins["sparse"]["every"] for c in drawn if "sparse" in c.plugins} == {2, 3, 4}
    first = [space.draw(optuna.trial.FixedTrial(params)) for params in space.first()]
    assert [str(candidate) for candidate in first] == [
        *(f"plain, {steps} steps" for steps in (4, 3, 2, 1)),
        "sparse(every=2), 4 steps",
        "rival(every=2), 4 steps",
        "idle(off=False), 4 steps",
    ]


def test_a_knob_that_is_set_is_not_tuned():
    space = Space([SparseTuned(every=3, mode="x")], (4,))
    assert space.tables == {"sparse": {}}
    assert space.draw(optuna.trial.FixedTrial({"steps": 0, "use sparse": 1})).plugins == {"sparse": {"every": 3, "mode": "x"}}


def test_the_front():
    def trial(number: int, seconds: float, value: float) -> Trial:
        return Trial(number, Candidate(number), [seconds], [1.0], [value])

    trials = [trial(1, 1.0, 9), trial(2, 0.5, 5), trial(3, 0.6, 5), trial(4, 0.7, 4), trial(5, 0.5, 3), Trial(6, Candidate(6), reason="no")]
    assert [t.number for t in front_of(trials)] == [2, 1]
