"""Modular pipelines: attached, run, taken off as standard ones are; their guider has the scale, their blocks name the arguments."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import PipelineNotFound, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.kernel.modular import family_of
from diffgraft.methods.inputs import CallSettings, calling, default_steps, make_pictures, make_samples, parameters, pictures_in
from diffusers import AnimaModularPipeline, ModularPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import PipelineState
from probes import Everything, Probe, Unguided, tiny, trace

NAMES = ("AnimaModularPipeline", "WanModularPipeline", "Wan22ModularPipeline", "FluxModularPipeline", "StableDiffusionXLModularPipeline")
every = pytest.mark.parametrize("name", NAMES)


def probe(pipe: Any) -> Probe:
    return Unguided() if family_of(pipe).guidance.layout == "none" else Everything()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(pipe: Any, kwargs: dict[str, Any], **more: Any) -> np.ndarray:
    return np.asarray(pictures_in(calling(pipe)(**{**kwargs, **more}, generator=seeded())))


def anima() -> tuple[Any, dict[str, Any]]:
    return tiny("AnimaModularPipeline")


class Listener(Probe):
    """Writes down what it is told in a run."""

    name = "listener"

    def run(self, call, next):
        self.heard = []
        return next(call)

    def denoise(self, call, next):
        self.heard.append((call.step.index, call.step.total, call.branch, call.run.guidance_scale(call.model_name)))
        return next(call)

    def guide(self, call, next):
        self.guided = call.scale, sorted(call.branches), dict(call.run.arguments)
        return next(call)


@every
def test_a_plugin_goes_on_runs_and_comes_off(name: str) -> None:
    pipe, kwargs = tiny(name)
    cls, plain = type(pipe), run(pipe, kwargs)
    before = trace(pipe)
    assert load_pipeline(pipe, plugins=[plugin := probe(pipe)]) is pipe
    assert isinstance(pipe, cls)
    assert pipe.plugins.list() == (plugin.name,)
    for _ in range(2):
        assert np.array_equal(run(pipe, kwargs), plain)
    guided = family_of(pipe).guidance.layout != "none"
    assert pipe.plugins.report().forwards == ({"cond": 4, "uncond": 4} if guided else {"cond": 4})
    assert pipe.plugins.report().steps == 4
    assert np.array_equal(run(copy.deepcopy(pipe), kwargs), plain)
    with pipe.plugins.disabled():
        assert np.array_equal(run(pipe, kwargs), plain)
    unload(pipe)
    assert type(pipe) is cls
    assert trace(pipe) == before
    assert np.array_equal(run(pipe, kwargs), plain)


def test_what_is_asked_for_is_returned() -> None:
    pipe, kwargs = anima()
    picture = run(pipe, kwargs)
    load_pipeline(pipe, plugins=[Everything()])
    assert isinstance(whole := pipe(**kwargs, generator=seeded()), PipelineState)
    assert np.array_equal(whole.images, picture)
    assert np.array_equal(pipe(**kwargs, generator=seeded(), output="images"), picture)
    both = pipe(None, ["images", "latents"], **kwargs, generator=seeded())
    assert np.array_equal(both["images"], picture)
    assert torch.equal(both["latents"], whole.latents)


def test_a_state_that_is_handed_on_says_what_the_call_does_not() -> None:
    pipe, kwargs = anima()
    load_pipeline(pipe, plugins=[listener := Listener()])
    state = PipelineState()
    for key in ("prompt", "num_inference_steps"):
        state.set(key, kwargs.pop(key))
    pipe(state, **{**kwargs, "height": 32}, generator=seeded())
    told = listener.guided[2]
    assert (told["prompt"], told["num_inference_steps"], told["height"]) == ("a red apple on the left", 4, 32)
    assert told["guidance_scale"] == kwargs["guidance_scale"]


def test_steps_branches_and_scale_are_told() -> None:
    pipe, kwargs = anima()
    load_pipeline(pipe, plugins=[listener := Listener()])
    run(pipe, kwargs)
    assert listener.heard == [(step, 4, branch, 4.0) for step in range(4) for branch in ("cond", "uncond")]
    assert listener.guided[:2] == (4.0, ["cond", "uncond"])


def test_the_second_guider_is_of_the_second_transformer() -> None:
    pipe, kwargs = tiny("Wan22ModularPipeline")
    load_pipeline(pipe, plugins=[listener := Listener()])
    run(pipe, kwargs)
    assert {each[-1] for each in listener.heard} == {kwargs["guidance_scale"], kwargs["guidance_scale_2"]}


def test_a_call_may_name_the_scale() -> None:
    pipe, kwargs = anima()
    own = pipe.guider
    del kwargs["guidance_scale"]
    usual = run(pipe, kwargs)
    pipe.guider = own.new(guidance_scale=2.0)
    expected = run(pipe, kwargs)
    pipe.guider = own
    load_pipeline(pipe, plugins=[listener := Listener()])
    assert np.array_equal(run(pipe, kwargs), usual)
    assert listener.guided[0] == own.guidance_scale
    assert np.array_equal(pipe(**kwargs, guidance_scale=2.0, generator=seeded()).images, expected)
    assert listener.guided[0] == 2.0
    assert pipe.guider is own
    with pipe.plugins.disabled():
        assert np.array_equal(pipe(**kwargs, guidance_scale=2.0, generator=seeded()).images, expected)
    pipe(**kwargs, guidance_scale=1.0, generator=seeded())
    assert pipe.plugins.report().forwards == {"cond": 4}
    pipe.guider.disable()
    pipe(**kwargs, generator=seeded())
    assert pipe.plugins.report().forwards == {"cond": 4}
    assert listener.heard[0][-1] == 1.0
    assert np.array_equal(pipe(**kwargs, guidance_scale=2.0, generator=seeded()).images, expected), "a scale that is said is heeded"


def test_guidance_that_is_cut_off_in_mid_run() -> None:
    pipe, kwargs = anima()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5))
    plain = run(pipe, kwargs)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5))  # it knows the last run's last step
    load_pipeline(pipe, plugins=[listener := Listener()])
    assert np.array_equal(run(pipe, kwargs), plain)
    assert [branch for *_, branch, _ in listener.heard] == ["cond", "uncond"] * 2 + ["cond"] * 2


SKIP = {"fqn": "transformer_blocks", "indices": [0]}
OTHERS = {
    "SkipLayerGuidance": lambda: SkipLayerGuidance(skip_layer_config=LayerSkipConfig(**SKIP)),
    "AutoGuidance": lambda: AutoGuidance(auto_guidance_config=LayerSkipConfig(**SKIP), dropout=1.0),
    "ClassifierFreeGuidance": lambda: ClassifierFreeGuidance(use_original_formulation=True),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_guider_of_another_kind_is_refused_before_anything_runs(kind: str) -> None:
    pipe, kwargs = anima()
    cls = type(pipe)
    pipe.update_components(guider=OTHERS[kind]())
    with pytest.raises(Unsupported, match=f"AnimaModularPipeline guides by a {kind}"):
        load_pipeline(pipe, plugins=[Everything()])
    assert type(pipe) is cls
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
    plain = run(pipe, kwargs)
    load_pipeline(pipe, plugins=[Everything()])
    pipe.update_components(guider=OTHERS[kind]())
    with pytest.raises(Unsupported, match=f"AnimaModularPipeline guides by a {kind}"):
        pipe(**kwargs)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
    assert np.array_equal(run(pipe, kwargs), plain)


def test_a_guider_that_combines_the_same_branches_otherwise() -> None:
    pipe, kwargs = anima()
    pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=4.0))
    plain = run(pipe, kwargs)
    load_pipeline(pipe, plugins=[Everything()])
    assert np.array_equal(run(pipe, kwargs), plain)


class Stops(Probe):
    """Raises in its second step."""

    name = "stops"
    error: BaseException | None = None

    def step(self, call, next):
        if self.error is not None and call.step.index == 1:
            raise self.error
        return next(call)


@pytest.mark.parametrize("error", [RuntimeError("in mid-run"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("name", ["AnimaModularPipeline", "WanModularPipeline"])
def test_stopped_in_mid_run(name: str, error: BaseException) -> None:
    pipe, kwargs = tiny(name)
    plain, before = run(pipe, kwargs), trace(pipe)
    load_pipeline(pipe, plugins=[stops := Stops(), Everything()])
    own = pipe.guider
    stops.error = error
    with pytest.raises(type(error)):
        pipe(**{**kwargs, "guidance_scale": 2.0}, generator=seeded())
    assert pipe.guider is own
    assert not pipe.plugins.report().completed
    stops.error = None
    assert np.array_equal(run(pipe, kwargs), plain)
    unload(pipe)
    assert trace(pipe) == before


class Asks(Probe):
    """Gives the pipeline an argument."""

    name = "asks"

    def run(self, call, next):
        return next(call.replace(cfg_normalization=True))


def test_what_no_block_takes() -> None:
    pipe, kwargs = anima()
    load_pipeline(pipe, plugins=[Asks()])
    with pytest.raises(Unsupported, match="AnimaModularPipeline for cfg_normalization, and none of its blocks"):
        pipe(**kwargs)
    unload(pipe)
    load_pipeline(pipe, plugins=[Everything()])
    with pytest.warns(UserWarning, match="Unexpected input"):  # as without plugins
        pipe(**kwargs, cfg_normalization=True)


def test_saved_and_loaded(tmp_path: Any) -> None:
    pipe, kwargs = anima()
    plain = run(pipe, kwargs)
    load_pipeline(pipe, plugins=[Everything()])
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_pipeline(tmp_path / "saved", plugins=[Everything()], dtype=torch.float32)
    assert type(again).__mro__[1] is AnimaModularPipeline
    np.testing.assert_allclose(run(again, kwargs), plain, atol=1e-5)  # loaded weights are aligned otherwise in memory
    bare = pickle.loads(pickle.dumps(unload(again)))
    assert type(bare) is AnimaModularPipeline
    shutil.rmtree(tmp_path / "saved" / "vae")
    with pytest.raises(PipelineNotFound, match="its vae cannot be read"):
        load_pipeline(str(tmp_path / "saved"), plugins=[])


def test_the_lab_asks_a_modular_pipeline_for_pictures() -> None:
    pipe, _ = anima()
    assert default_steps(pipe) == 50
    assert {"prompt", "height", "guidance_scale"} <= set(parameters(pipe))
    settings = CallSettings(steps=2, guidance_scale=3.0, height=32, width=32, extra={"max_sequence_length": 32})
    load_pipeline(pipe, plugins=[Everything()])
    pictures = make_pictures(pipe, make_samples(pipe, [0, 1], ["a red apple"]), settings)
    assert pictures.shape == (2, 1, 32, 32, 3)


def test_a_class_that_no_family_knows() -> None:
    class Mine(ModularPipeline):
        default_blocks_name = "AnimaAutoBlocks"

    with pytest.raises(Unsupported, match="no family describes Mine"):
        load_pipeline(Mine(), plugins=[])
    assert registry.find_family(AnimaModularPipeline).name == "anima"
