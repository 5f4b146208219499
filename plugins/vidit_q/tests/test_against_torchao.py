"""ViDiT-Q's layers against torchao's own int8 ones, where torchao is installed (`pip install 'diffgraft[torchao]'`)."""

import importlib

import pytest
import torch
from diffgraft import load_pipeline
from diffgraft.installed import registry
from diffgraft.methods.quant.layers import QuantLinear

pytest.importorskip("torchao")

from torchao.quantization import Int8DynamicActivationInt8WeightConfig, MappingType, quantize_


def test_a_layer_is_torchaos_dynamic_int8_to_rounding():
    module, function = registry.families()["flux"].tiny.split(":")
    pipe = getattr(importlib.import_module(module), function)("FluxPipeline", 0).pipe
    load_pipeline(pipe, plugins=[("vidit_q", {"symmetric": True})])
    ours = [module for module in pipe.transformer.modules() if isinstance(module, QuantLinear)]
    assert len(ours) > 10
    for layer in ours:
        theirs = torch.nn.Sequential(torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
        theirs[0].load_state_dict(layer.state_dict())
        quantize_(theirs, Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC))
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(layer(x), theirs(x), atol=1e-5)
