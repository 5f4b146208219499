"""Quantisation: uniform affine grids, layers that compute on them, learned rounding, and export to torchao's kernels.

    from diffgraft.methods.quant.layers import QuantLinear, layers_of, quantised
    for layer in layers_of(model, wanted):
        call.swap(layer.parent, layer.name, quantised(layer, UniformAffine(8, "channel"), UniformAffine(8, "token")))

What these layers compute is the arithmetic of integers in floats: it shows what a plan costs in pictures, and is not faster. Speed and
bytes come with ``export.exported``. The grids are written in torch alone, because rounding is learned through them and a quantised pipeline
is to load without torchao (which takes seconds to import); tests hold them against torchao's own primitives.
"""
