"""Decoding in mid-run gives what the pipeline's own end gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffgraft import Unsupported
from diffgraft.installed.registry import find_family
from diffgraft.methods.decoding import decode, ensure_decodes
from diffgraft_pipelines.tiny import make


def call(made, output_type):
    generator = torch.Generator().manual_seed(0)
    return made.pipe(**{**made.kwargs, "num_inference_steps": 1, "output_type": output_type}, generator=generator)[0]


NAMES = ("FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "QwenImagePipeline", "WanPipeline")


@pytest.mark.parametrize("name", NAMES)
def test_as_the_pipeline_itself(name):
    made = make(name)
    family = find_family(type(made.pipe))
    found = decode(made.pipe, family, call(made, "latent"), made.kwargs)
    wanted = call(made, "pil")
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    if name == "WanPipeline":
        assert len(found[0]) == 5


def test_the_size_may_be_the_models():
    made = make("FluxPipeline")
    family = find_family(type(made.pipe))
    side = made.pipe.default_sample_size * made.pipe.vae_scale_factor
    tokens = torch.zeros(1, (made.pipe.default_sample_size // 2) ** 2, 16)
    assert decode(made.pipe, family, tokens, {})[0].size == (side, side)


@pytest.mark.parametrize("name", ["LTXPipeline", "CogVideoXPipeline", "DiTPipeline", "DDPMPipeline", "AnimateDiffPipeline"])
def test_layouts_that_are_not_known_are_refused(name):
    made = make(name)
    with pytest.raises(Unsupported, match=type(made.pipe).__name__):
        ensure_decodes(made.pipe, find_family(type(made.pipe)))
