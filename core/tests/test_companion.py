"""A companion beside the sample: LTX-2 denoises a picture and its sound in one forward, and steps the sound by a copy of its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.kernel.calls import Schedule
from diffgraft.methods.conditioning import ask
from diffgraft.methods.second import unhooked
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from probes import Effects, Everything, Probe, tiny, trace

TEXT, IMAGE = "LTX2Pipeline", "LTX2ImageToVideoPipeline"
STG = {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]}
ALL: dict[str, Any] = {**STG, "modality_scale": 3.0, "guidance_rescale": 0.7, "audio_guidance_scale": 7.0}
HOW: dict[str, dict[str, Any]] = {
    "guided": {},
    "every guidance": ALL,
    "isolated only": {**ALL, "stg_scale": 0.0},
    "unguided": {"guidance_scale": 1.0},
    "guided sound only": {"guidance_scale": 1.0, "audio_guidance_scale": 7.0},
}
both = pytest.mark.parametrize("name", [TEXT, IMAGE])


def generate(pipe: Any, kwargs: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of picture and sound."""
    out = pipe(**{**kwargs, "output_type": "latent", **more}, generator=torch.Generator().manual_seed(0))
    return out.frames, out.audio


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_plugin(name: str, *plugins: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pipe, kwargs = tiny(name)
    load_pipeline(pipe, plugins=list(plugins))
    return generate(pipe, kwargs, **more)


@both
@pytest.mark.parametrize("how", HOW)
def test_an_idle_plugin_changes_neither_and_leaves_nothing(name, how):
    pipe, kwargs = tiny(name)
    plain, before = generate(pipe, kwargs, **HOW[how]), trace(pipe)
    load_pipeline(pipe, plugins=[Everything])
    assert same(generate(pipe, kwargs, **HOW[how]), plain)
    report = pipe.plugins.report()
    fired, further = report.plugins["everything"].fired, {"every guidance": 2, "isolated only": 1}.get(how, 0)
    assert report.steps == 4
    assert fired["step"] == 8
    assert fired.get("guide", 0) == (0 if how == "unguided" else 8)
    assert fired["denoise"] == 4 * (1 + further)
    extra = {"every guidance": ("uncond_stg", "uncond_modality"), "isolated only": ("uncond_modality",)}.get(how, ())
    assert report.denoiser_calls == dict.fromkeys(("cond" if how == "unguided" else "both", *extra), 4)
    unload(pipe)
    assert trace(pipe) == before
    assert same(generate(pipe, kwargs, **HOW[how]), plain)


# both schedulers ------------------------------------------------------------------------------------------------------------------------


def bent(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas[:2], sigmas[2:] * 0.9])


class Bent(FlowMatchEulerDiscreteScheduler):
    """Makes by itself what the plugin makes of its schedule."""

    def set_timesteps(self, *args: Any, sigmas: Any = None, **kwargs: Any) -> None:
        super().set_timesteps(*args, sigmas=sigmas, **kwargs)
        self.sigmas = bent(self.sigmas)
        self.timesteps = self.sigmas[:-1] * 1000


class Bends(Probe):
    name = "bends"
    effects = Effects(edits=frozenset({"schedule"}))

    def schedule(self, call, next):
        sigmas = bent(next(call).sigmas)
        return Schedule(sigmas[:-1] * 1000, sigmas)


class Asks(Probe):
    """Has the scheduler make another schedule."""

    name = "asks"
    effects = Effects(edits=frozenset({"schedule"}))

    def schedule(self, call, next):
        return next(call.replace(sigmas=[1.0, 0.6, 0.5, 0.1]))


@both
@pytest.mark.parametrize("more", [{}, ALL], ids=["guided", "every guidance"])
def test_an_edited_schedule_is_that_of_both(name, more):
    pipe, kwargs = tiny(name)
    pipe.scheduler = Bent.from_config(pipe.scheduler.config)
    assert same(with_plugin(name, Bends, **more), generate(pipe, kwargs, **more))
    pipe, kwargs = tiny(name)
    assert same(with_plugin(name, Asks, **more), generate(pipe, kwargs, sigmas=[1.0, 0.6, 0.5, 0.1], **more))


def multistep(old: Any) -> Any:
    return UniPCMultistepScheduler.from_config(old.config, prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3)


class Solver(Probe):
    name = "solver"
    scheduler = UniPCMultistepScheduler
    effects = Effects(replaces=frozenset({"scheduler"}))

    def make_scheduler(self, old, family):
        return multistep(old)


@both
def test_a_plugins_solver_keeps_a_state_for_each(name):
    pipe, kwargs = tiny(name)
    pipe.scheduler = multistep(pipe.scheduler)
    plain = generate(pipe, kwargs, num_inference_steps=6)
    assert same(with_plugin(name, Solver, Everything, num_inference_steps=6), plain)
    assert not same(with_plugin(name, Everything, num_inference_steps=6), plain)


@dataclass
class Steps:
    seen: list[Any] = field(default_factory=list)


class Watches(Probe):
    name = "watches"
    State = Steps
    told: ClassVar[list[Any]] = []

    def run(self, call, next):
        out = next(call)
        self.told[:] = call.shared.seen
        return out

    def guide(self, call, next):
        call.state.seen.append(("guide", call.copy, call.step.index, tuple(call.combined.shape), call.scale))
        assert {tuple(x.shape) for x in call.branches.values()} == {tuple(call.combined.shape)}
        return next(call)

    def step(self, call, next):
        call.state.seen.append(("step", call.copy, call.step.index, tuple(call.sample.shape), call.scheduler is call.pipe.scheduler))
        if call.copy:
            assert [entry[1] for entry in call.state.seen] == [1] * len(call.state.seen), "nothing of the picture's"
            assert call.state is not call.shared
            if call.step.is_last:
                call.shared.seen += call.state.seen
        return next(call)


def test_hooks_know_which_they_see_and_keep_them_apart():
    shapes = {0: (1, 192, 4), 1: (1, 9, 4)}
    with_plugin(TEXT, Watches, audio_guidance_scale=7.0)
    told = [entry for entry in Watches.told if entry[1] == 0], [entry for entry in Watches.told if entry[1] == 1]
    for copy, entries in enumerate(told):
        assert [(what, index) for what, _, index, *_ in entries] == [(what, k) for k in range(4) for what in ("guide", "step")]
        assert {entry[3] for entry in entries} == {(1, entries[0][3][1], shapes[copy][2])}
        assert {entry[4] for entry in entries if entry[0] == "guide"} == {(3.0, 7.0)[copy]}
        assert {entry[4] for entry in entries if entry[0] == "step"} == {copy == 0}


# guidance --------------------------------------------------------------------------------------------------------------------------------


class Guides(Probe):
    name = "guides"
    factor: ClassVar[float] = 1.0

    def guide(self, call, next):
        return call.uncond + self.factor * call.scale * (call.cond - call.uncond)


class Doubles(Guides):
    name = "doubles"
    factor = 2.0


@both
def test_a_plugins_guidance_is_that_of_both_each_by_its_scale(name):
    pipe, kwargs = tiny(name)
    scales = {"guidance_scale": 3.0, "audio_guidance_scale": 5.0}
    twice = {key: 2 * value for key, value in scales.items()}
    for plugin, expected in ((Guides, scales), (Doubles, twice)):
        for ours, plain in zip(with_plugin(name, plugin, **scales), generate(pipe, kwargs, **expected), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


# what a denoiser call answers ------------------------------------------------------------------------------------------------------------


@dataclass
class Last:
    kept: Any = None


class Answers(Probe):
    """Gives the last step's prediction in each second step."""

    name = "answers"
    State = Last
    effects = Effects(skips=frozenset({"denoiser"}))

    def denoise(self, call, next):
        if call.step.index % 2 == 0:
            call.state.kept = next(call)
        return self.give(call)

    def give(self, call):
        return call.state.kept


class Copies(Answers):
    name = "copies"

    def give(self, call):
        return call.state.kept.clone() if call.step.index % 2 else call.state.kept


class Says(Answers):
    name = "says"

    def give(self, call):
        return call.accompanied(call.state.kept.clone(), call.companion_of(call.state.kept).clone())


def reused(pipe: Any) -> Any:
    """A plain pipeline whose transformer answers so."""
    forward, kept = pipe.transformer.forward, []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if len(kept) % 2 == 0:
            kept.append(forward(*args, **kwargs))
        else:
            kept.append(kept[-1])
        return kept[-1]

    pipe.transformer.forward = answer
    return pipe


@both
def test_an_answer_without_the_denoiser_brings_its_own_sound_or_is_refused(name):
    pipe, kwargs = tiny(name)
    plain = generate(reused(pipe), kwargs)
    assert same(with_plugin(name, Answers), plain)
    assert same(with_plugin(name, Says), plain)
    with pytest.raises(Unsupported, match=r"copies, denoise hook, step 2 of 4.*0 forward\(s\).*hidden_states alone.*audio_hidden_states"):
        with_plugin(name, Copies)


class Halves(Probe):
    """Asks for each branch alone."""

    name = "halves"
    says: ClassVar[bool] = False

    def denoise(self, call, next):
        parts = [next(call.only(branch)) for branch in call.branches]
        whole = torch.cat(parts)
        return call.accompanied(whole, torch.cat([call.companion_of(part) for part in parts])) if self.says else whole


class One(Probe):
    """Asks for one branch and gives it to both."""

    name = "one"

    def denoise(self, call, next):
        return torch.cat([next(call.only("cond"))] * 2)


class Scales(Probe):
    """Changes the picture's prediction."""

    name = "scales"

    def denoise(self, call, next):
        return next(call) * 1.01


def test_what_was_made_of_several_forwards_says_its_sound():
    class Said(Halves):
        says = True

    pipe, kwargs = tiny(TEXT)
    for ours, plain in zip(with_plugin(TEXT, Said), generate(pipe, kwargs), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    for plugin, forwards in ((Halves, 2), (One, 1)):
        with pytest.raises(Unsupported, match=rf"{plugin.name}, denoise hook, step 1 of 4.*{forwards} forward\(s\)"):
            with_plugin(TEXT, plugin)


def test_a_changed_picture_keeps_the_sound_of_its_forward():
    pipe, kwargs = tiny(TEXT)
    forward = pipe.transformer.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        picture, sound = forward(*args, **kwargs)
        return picture * 1.01, sound

    pipe.transformer.forward = louder
    assert same(with_plugin(TEXT, Scales), generate(pipe, kwargs))


@both
def test_another_denoiser_answers_for_both(name):
    from diffgraft_pipelines.tiny import make

    other: Any = make(name, seed=1).pipe

    class Other(Probe):
        name = "other"
        effects = Effects(replaces=frozenset({"denoiser"}))

        def denoise(self, call, next):
            with unhooked():
                return ask(call.family, other.transformer, call.arguments())

    pipe, kwargs = tiny(name)
    pipe.transformer = other.transformer
    assert same(with_plugin(name, Other), generate(pipe, kwargs))


# inside, and what is refused ----------------------------------------------------------------------------------------------------------


class Blocks(Probe):
    """Leaves out the second block in each second step: both streams as they came out of it before."""

    name = "blocks"
    State = Last
    effects = Effects(skips=frozenset({"blocks"}))

    def select_blocks(self, blocks):
        return [block for block in blocks if block.index == 1]

    def block(self, call, next):
        if call.step.index % 2 == 0:
            call.state.kept = next(call)
        return call.state.kept


@both
def test_a_block_that_is_left_out_gives_both_streams(name):
    pipe, kwargs = tiny(name)
    block, kept = pipe.transformer.transformer_blocks[1], []
    forward = block.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        kept.append(kept[-1] if len(kept) % 2 else forward(*args, **kwargs))
        return kept[-1]

    block.forward = answer
    assert same(with_plugin(name, Blocks), generate(pipe, kwargs))


def test_another_time_for_the_picture_is_refused():
    class Shifts(Probe):
        name = "shifts"
        effects = Effects(edits=frozenset({"timestep"}))

        def denoise(self, call, next):
            return next(call)

    pipe, _ = tiny(TEXT)
    before = trace(pipe)
    with pytest.raises(Unsupported, match=r"shifts works on the timestep.*audio_hidden_states is denoised with the sample"):
        load_pipeline(pipe, plugins=[Shifts])
    assert trace(pipe) == before


def test_a_session_gives_both():
    pipe, kwargs = tiny(TEXT)
    seen: list[Any] = []

    class Keeps(Probe):
        name = "keeps"

        def denoise(self, call, next):
            out = next(call)
            seen.append((call.arguments(), out.clone(), call.companion_of(out).clone()))
            return out

    load_pipeline(pipe, plugins=[Keeps])
    generate(pipe, kwargs, guidance_scale=1.0)
    arguments, picture, sound = seen[0]
    with pipe.plugins.session({"guidance_scale": 1.0}) as session, torch.no_grad():
        session.at(0)
        assert same(session.model(**arguments), (picture, sound))
        assert torch.equal(session.predict(arguments), picture)
