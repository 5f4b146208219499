"""What the planner judges: what is switched on and not neutral, when it is put on, switched on or configured."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from diffgraft import BrokenPlugin, ConfigError, Conflict, Effects, PluginConfig, Unsupported, load_pipeline
from diffgraft.community.tables import pipelines_of
from diffgraft.installed import registry
from diffgraft.installed.config import build_config
from diffusers import FirstBlockCacheConfig
from probes import Everything, Probe, generate, tiny
from pydantic import field_validator, model_validator


class Amount(PluginConfig):
    amount: float = 1.0


class Noisy(Probe):
    name = "noisy"
    Config = Amount
    neutral: ClassVar[dict[str, Any]] = {"amount": 0.0}
    effects = Effects(edits=frozenset({"latents"}), stochastic=True)

    def denoise(self, call, next):
        return next(call)


class Exact(Noisy):
    name = "exact"
    effects = Effects(needs=frozenset({"determinism"}))


def test_a_neutral_plugin_stands_beside_any_until_it_is_configured_away(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Noisy(amount=0.0), Exact])
    generate(pipe, kwargs)
    with pytest.raises(Conflict, match="exact needs a deterministic run, but noisy draws noise"):
        pipe.plugins.configure("noisy", amount=0.5)
    assert pipe.plugins["noisy"].config.amount == 0.0, "refused, but configured"
    generate(pipe, kwargs)
    pipe.plugins.configure("exact", amount=0.0)
    pipe.plugins.configure("noisy", amount=0.5)
    generate(pipe, kwargs)
    with pytest.raises(Conflict, match="exact needs"):
        pipe.plugins.configure("exact", amount=1.0)
    pipe.plugins.disable("exact")
    pipe.plugins.configure("exact", amount=1.0)  # off: it is judged when it is switched on
    with pytest.raises(Conflict, match="exact needs"):
        pipe.plugins.enable()
    assert "exact (disabled)" in repr(pipe.plugins)
    generate(pipe, kwargs)


def test_a_disabled_plugin_stands_beside_any_until_it_is_enabled(sd):
    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Everything, Noisy])
    pipe.plugins.disable()
    pipe.plugins.add(Exact)
    generate(pipe, kwargs)
    twin = copy.deepcopy(pipe)
    assert repr(twin.plugins) == repr(pipe.plugins)
    with pytest.raises(Conflict, match="exact needs"):
        pipe.plugins.enable("everything", "noisy")
    assert pipe.plugins.plan.order == ("exact",), "refused, but one was switched on"
    with pipe.plugins.disabled("exact"):
        pipe.plugins.enable("noisy")
        generate(pipe, kwargs)
        pipe.plugins.disable("noisy")
    assert pipe.plugins.plan.order == ("exact",)
    pipe.plugins.remove("noisy")
    with pytest.raises(Conflict, match="exact needs"), pipe.plugins.disabled("exact"):
        pipe.plugins.add(Noisy)
    assert pipe.plugins.plan.order == ("noisy",), "what was put on inside stays, what it does not fit with is off"
    generate(pipe, kwargs)
    pipe.plugins.remove("noisy")
    pipe.plugins.enable("exact")
    generate(pipe, kwargs)


def test_an_old_conflict_keeps_no_other_plugin_from_being_changed():
    """diffusers' own cache came later: each run is refused until it is off, but what has nothing to do with it may change."""

    class Skips(Noisy):
        name = "skips"
        effects = Effects(skips=frozenset({"blocks"}))

    pipe, kwargs = tiny("FluxPipeline")
    load_pipeline(pipe, plugins=[Skips, Noisy])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(Conflict, match="skip blocks"):
        generate(pipe, kwargs)
    pipe.plugins.configure("noisy", amount=0.5)
    pipe.plugins.disable("noisy")
    pipe.plugins.enable("noisy")
    pipe.plugins.configure("skips", amount=0.0)
    generate(pipe, kwargs)
    with pytest.raises(Conflict, match="skip blocks"):
        pipe.plugins.configure("skips", amount=1.0)
    assert pipe.plugins["skips"].config.amount == 0.0


def test_knobs_that_do_not_go_together_are_told_in_the_plugins_own_words():
    class Ordered(PluginConfig):
        low: int = 0
        high: int = 1

        @field_validator("high")
        @classmethod
        def _even(cls, value: int) -> int:
            if value == 7:
                raise ValueError("seven is taken")
            return value

        @model_validator(mode="after")
        def _order(self) -> Ordered:
            if self.low > self.high:
                raise ValueError(f"low = {self.low} is above high = {self.high}")
            return self

    for knobs, text in (({"low": 2}, "low = 2 is above high = 1."), ({"high": 7}, "high = 7: seven is taken.")):
        with pytest.raises(ConfigError) as raised:
            build_config("ordered", Ordered, knobs)
        assert str(raised.value) == f"plugin 'ordered': {text}"


def test_the_report_says_why_denoiser_calls_are_not_counted(sd):
    class Stepping(Probe):
        name = "stepping"

        def step(self, call, next):
            return next(call)

    pipe, kwargs = sd
    load_pipeline(pipe, plugins=[Stepping])
    generate(pipe, kwargs)
    assert "denoiser calls: not counted, as no plugin here hooks the denoiser" in str(pipe.plugins.report())
    pipe.plugins.add(Everything)
    generate(pipe, kwargs)
    assert "denoiser calls: both 4" in str(pipe.plugins.report())


def test_a_pipeline_class_that_a_plugin_is_not_made_for_is_refused_and_not_listed():
    class Fresh(Noisy):
        name = "fresh"
        families = ("sd",)
        not_on: ClassVar[dict[str, str]] = {"*Img2Img*": "it starts from a picture", "*Inpaint*": "it starts from a picture"}

    pipe, _ = tiny("StableDiffusionImg2ImgPipeline")
    own = type("Mine", (type(pipe),), {})
    for cls in (type(pipe), own):
        pipe.__class__ = cls
        with pytest.raises(Unsupported, match=f"fresh does not work on {cls.__name__}: it starts from a picture"):
            load_pipeline(pipe, plugins=[Fresh])
        assert type(pipe) is cls
    others = [name for name in registry.families()["sd"].pipelines if "Img2Img" not in name and "Inpaint" not in name]
    assert pipelines_of(Fresh) == sorted(others)
    assert {"StableDiffusionControlNetPipeline", "StableDiffusionPipeline"} <= set(others)


def test_neutral_settings_are_known_in_every_form():
    class Shares(PluginConfig):
        shares: tuple[float, ...] = (1.0, 2.0)

        @field_validator("shares", mode="before")
        @classmethod
        def _one(cls, value: Any) -> Any:
            return value if isinstance(value, (list, tuple)) else (value,)

    class Shared(Noisy):
        Config = Shares
        neutral: ClassVar[dict[str, Any]] = {"shares": 0}

    assert [Shared(shares=given).is_neutral for given in (0, 0.0, [0], (0.0,), (0, 0), 1)] == [True] * 4 + [False] * 2
    assert not Shared().is_neutral
    assert not Probe().is_neutral, "it has no such settings"


def test_a_plugin_that_is_neutral_at_no_knob_of_its_own_is_broken(sd):
    class Mistaken(Noisy):
        neutral: ClassVar[dict[str, Any]] = {"amounts": 0.0}

    with pytest.raises(BrokenPlugin, match="neutral at 'amounts', and has no such knob"):
        load_pipeline(sd[0], plugins=[Mistaken])
