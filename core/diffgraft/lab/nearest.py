"""What quantisation costs without any method: the plain side of their benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from diffgraft.installed.plugin import Effects, Paper, Plugin
from diffgraft.kernel.calls import ModulesCall
from diffgraft.methods.quant.affine import Over, UniformAffine
from diffgraft.methods.quant.knobs import FLOAT, bits_in, weights_of
from diffgraft.methods.quant.layers import Layer, layers_of, put, quantised


class Nearest(Plugin):
    """Rounds to the nearest level of the whole range: weights of each output channel, inputs of what comes in.

    Args:
        bits: as "w4a8".
        of: which layers of the denoisers.
        over: what inputs have one range: a whole "tensor", or each "token".
        ends: bits that the first and the last convolution have at least.
    """

    name = "nearest"
    paper = Paper("none", "0000.00000", "rounds to the nearest")
    families = ("*",)
    effects = Effects(edits=frozenset({"weights"}))
    neutral: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        bits: str,
        of: Callable[[Mapping[str, nn.Module]], Iterable[Layer]] = layers_of,
        over: Over = "tensor",
        ends: int = 0,
    ) -> None:
        super().__init__()
        self.bits, self.of, self.over, self.ends = bits_in(bits), of, over, ends

    def modules(self, call: ModulesCall, next: Any) -> None:
        weights, inputs = self.bits
        for layer in list(self.of(call.denoisers)):
            own = max(weights, self.ends) if layer.path in ("conv_in", "conv_out") else weights
            over = self.over if isinstance(layer.module, nn.Linear) else "tensor"
            put(call.swap, layer, quantised(layer.module, weights_of(own), None if inputs == FLOAT else UniformAffine(inputs, over)))
        next(call)
