"""The judge as a reward."""

from __future__ import annotations

import math

import pytest
from diffgraft import ConfigError, RewardError
from diffgraft.methods.rewards import find_reward
from diffgraft_checkpoints.emoji import scenes
from PIL import Image

PROMPTS = ["a big apple on a blue background", "a cat face on the left and a star on the right on a red background"]


def gray():
    return Image.new("RGB", (64, 64), (128, 128, 128))


def test_the_judge_is_a_reward_that_prefers_the_right_background():
    reward = find_reward("reward", "emoji_judge")
    blue = Image.new("RGB", (64, 64), scenes.BACKGROUNDS["blue"])
    worse, better, pair = reward([gray(), blue, gray()], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert worse < better < 0
    assert pair < 0
    assert reward([], []) == []


@pytest.mark.parametrize("answer", [[1.0, 2.0], [math.nan], [math.inf], 0.5, None, ["good"], [[0.5, 0.5]], {"a": 1}])
def test_what_is_no_score_is_refused(answer):
    reward = find_reward("reward", lambda images, prompts: answer)
    with pytest.raises(RewardError, match=r"lambda.*gave"):
        reward([gray()], ["x"])


def test_what_a_reward_raises_comes_through():
    def broken(images, prompts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        find_reward("reward", broken)([gray()], ["x"])


def test_one_number_for_all_pictures_says_what_is_expected():
    with pytest.raises(RewardError, match=r"reward 'total' gave 0\.5.*: it must give a list with one number for each of the 2 pictures"):
        find_reward("reward", total)([gray(), gray()], ["x", "y"])


def total(images, prompts):
    return 0.5


@pytest.mark.parametrize("value", [lambda images: [0.5], lambda images, prompts, model: [0.5], lambda *, images, prompts: [0.5], len])
def test_a_reward_that_cannot_take_pictures_and_prompts_is_refused_when_it_is_given(value):
    with pytest.raises(ConfigError, match=r"my_plugin: reward = .*: it is called with \(images, prompts\), and cannot be: "):
        find_reward("my_plugin: reward", value)


@pytest.mark.parametrize("value", [lambda pictures, texts, device="cpu": [0.5], lambda *given: [0.5], max])
def test_a_reward_may_name_its_arguments_as_it_likes(value):
    assert find_reward("reward", value).scores is value


@pytest.mark.parametrize("value", ["emoji_juge", "no.such.module:x", "math:pi", "math:nothing", 3])
def test_a_name_that_leads_nowhere(value):
    with pytest.raises(ConfigError, match=r"my_plugin: reward = "):
        find_reward("my_plugin: reward", value)


def test_a_reward_by_its_place():
    assert find_reward("reward", "diffgraft_checkpoints.emoji.judge:reward").name == "diffgraft_checkpoints.emoji.judge:reward"
