"""What an artefact of a plugin that quantises was made with: one rule for all of them."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ArtefactMismatch, load_pipeline
from diffgraft.installed.registry import find
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.quant.kept import as_made
from diffgraft.methods.quant.layers import quantised_in
from probes import generate, tiny

PLUGINS = {
    "q_diffusion": {"timesteps": 1, "iterations": 1, "scale_iterations": 1, "batch": 2},
    "ptq4dm": {"p": 2.0},
    "tfmq": {"iterations": 0, "scales": "one"},
    "cachequant": {"interval": 2, "inputs": "dynamic", "correct": "cache"},
}
SAID = {"bits": "w6a8", "keep": ("mid_block",)}


@pytest.fixture(scope="module", params=PLUGINS)
def made(request):
    """(a plugin's name, an artefact of it that was made with other knobs than its defaults)."""
    pipe, kwargs = tiny("DDPMPipeline")
    plugin = find(request.param)(**SAID, **PLUGINS[request.param])
    return request.param, calibrate_call(pipe, plugin, lambda: generate(pipe, kwargs))


def test_it_holds_where_nothing_was_said(made):
    name, artefact = made
    pipes = [tiny("DDPMPipeline") for _ in range(2)]
    load_pipeline(pipes[0][0], plugins={name: {"artefact": artefact}})
    load_pipeline(pipes[1][0], plugins={name: {"artefact": artefact, **SAID, **PLUGINS[name]}})
    layers = quantised_in({"unet": pipes[0][0].unet})
    assert {weights.grid.bits for key, layer in layers.items() if "resnets" in key for weights in layer.weights} == {6}
    assert not any("mid_block" in key for key in layers)
    found = [generate(pipe, kwargs) for pipe, kwargs in pipes]
    assert torch.equal(*found)
    assert "w6a8" in pipes[0][0].plugins.report().plugins[name].notes[0]


@pytest.mark.parametrize(
    ("said", "fits"), [({"bits": "w4a8"}, "bits='w6a8'"), ({"keep": ()}, r"keep=\['mid_block'\]"), ({"bits": "w8a8"}, "bits='w6a8'")]
)
def test_what_was_said_and_differs_is_refused_and_the_setting_that_fits_comes_first(made, said, fits):
    name, artefact = made
    pipe, _ = tiny("DDPMPipeline")
    [knob] = said
    with pytest.raises(ArtefactMismatch, match=rf"take {fits}, or make one with `diffgraft calibrate {name} .*{name}\.{knob}="):
        load_pipeline(pipe, plugins={name: {"artefact": artefact, **said}})
    assert not quantised_in({"unet": pipe.unet})


def test_other_knobs_than_bits_hold_too_and_are_refused_too(made):
    name, artefact = made
    other = {"q_diffusion": {"softmax": 4}, "ptq4dm": {"p": 8.0}, "tfmq": {"scales": "timesteps"}, "cachequant": {"interval": 5}}[name]
    [knob] = other
    pipe, _ = tiny("DDPMPipeline")
    with pytest.raises(ArtefactMismatch, match=f"{knob} = .*take {knob}="):
        load_pipeline(pipe, plugins={name: {"artefact": artefact, **other}})


def test_a_plan_that_is_none_is_refused_in_our_words(made):
    name, artefact = made
    plan = {"plan": {**artefact.facts["plan"], "bits": "w99a8"}} if "plan" in artefact.facts else {"bits": "w99a8"}
    bent = Artefact(artefact.made_for, artefact.tensors, {**artefact.facts, **plan})
    pipe, _ = tiny("DDPMPipeline")
    with pytest.raises(ArtefactMismatch, match=r"says that it was made for .*write wXaY"):
        load_pipeline(pipe, plugins={name: {"artefact": bent}})


def test_without_an_artefact_a_config_is_itself():
    config = find("tfmq").Config(bits="w3a8")
    assert as_made(config, None) == config
