"""Weights of real quantisers: `pip install "diffgraft-core[quantisers]"`, or this file is not collected (see conftest)."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ArtefactMismatch, Unsupported, load_pipeline
from diffgraft.installed.registry import families, find
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.testing.runs import artefacts
from diffgraft.testing.setting import USUAL
from optimum.quanto import freeze, qint8, quantize
from probes import generate, tiny
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

SD, FLUX = "StableDiffusionPipeline", "FluxPipeline"


def quanto(model: torch.nn.Module) -> None:
    quantize(model, weights=qint8)
    freeze(model)


QUANTISERS = {
    "torchao weights": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "torchao weights and activations": lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
    "quanto weights": quanto,
}


@pytest.fixture(params=QUANTISERS)
def way(request):
    return request.param


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize("cls", [SD, FLUX])
def test_a_fingerprint_is_of_the_values_that_the_weights_stand_for(way, cls):
    model = denoiser(tiny(cls)[0])
    plain = Fingerprint.of(model)
    QUANTISERS[way](model)
    quantised = Fingerprint.of(model)
    assert (plain.layout, plain.kept) == (quantised.layout, "")
    assert quantised.kept
    assert max(abs(a - b) for a, b in zip(plain.weights, quantised.weights, strict=True)) < 5e-3


@pytest.mark.parametrize(("cls", "name"), [(SD, "dpm_solver_v3"), (FLUX, "dpm_solver_v3"), (FLUX, "ertacache")])
def test_statistics_of_plain_weights_are_refused(way, cls, name):
    pipe, _ = tiny(cls)
    QUANTISERS[way](denoiser(pipe))
    plugin = find(name)
    [family] = [family for family in families().values() if cls in family.pipelines]
    with pytest.raises(ArtefactMismatch, match=r"with weights kept as \w+ instead of plain numbers"):
        load_pipeline(pipe, plugins={name: {**plugin.active, **artefacts(plugin, family, cls, USUAL)}})


@pytest.mark.parametrize("name", ["time_shift", "deepcache", "bdia"])
def test_what_needs_no_statistics_runs(way, name):
    pipe, kwargs = tiny(SD)
    QUANTISERS[way](pipe.unet)
    load_pipeline(pipe, plugins={name: dict(find(name).active)})
    assert torch.isfinite(generate(pipe, kwargs)).all()


def test_gradients_are_there_or_refused_by_us(way):
    pipe, kwargs = tiny(SD)
    QUANTISERS[way](pipe.unet)
    load_pipeline(pipe, plugins={"a_star": dict(find("a_star").active)})
    if way == "torchao weights and activations":
        with pytest.raises(Unsupported, match=r"not by way of weights kept as \w+: load plain ones"):
            generate(pipe, kwargs)
    else:
        assert torch.isfinite(generate(pipe, kwargs)).all()
