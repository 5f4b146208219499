"""What a run's report says of quantised layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from diffgraft.methods.quant.layers import bytes_of, ensure_current, quantised_in


def simulated(denoisers: Mapping[str, nn.Module], plugin: str, plan: str, how: str = "") -> str:
    """ "simulated, no speed: w4a8, learned; the weights of 206 layers would be 1.21 MB instead of 9.08".

    Raises:
        Unsupported: weights under a quantised layer were written to since it was made.
    """
    ensure_current(denoisers, plugin)
    layers = list(quantised_in(denoisers).values())
    kept, plain = bytes_of(layers)
    return (
        f"simulated, no speed: {plan}{f', {how}' if how else ''}; the weights of {len(layers)} layers would be {kept / 1e6:.2f} MB instead "
        f"of {plain / 1e6:.2f}"
    )
