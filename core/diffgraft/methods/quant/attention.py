"""Attention whose operands lie on grids: queries, keys, values, and what the softmax gives (Q-Diffusion, arXiv 2302.04304, section 4).

Queries, keys and values are what their layers give, so these layers round them (``outputs``). The softmax is inside of the processor, often
inside of one fused kernel: while such an attention computes, torch's own softmax and its fused attention are answered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffgraft.installed.errors import Unsupported
from diffgraft.methods.quant.layers import QuantLinear, Rounder

QUERIES = ("to_q",)
OPERANDS = (*QUERIES, "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Names of the layers of an attention whose outputs are multiplied with each other."""
SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax})


def softmax_of(attn: nn.Module) -> Rounder | None:
    """What rounds the softmax of an attention, or None: it hangs at the layer of its queries, over which a LoRA may lie."""
    layer = getattr(attn, "to_q", None)
    layer = getattr(layer, "base_layer", layer)
    return layer.softmax if isinstance(layer, QuantLinear) and layer.active else None


class RoundedSoftmax(TorchFunctionMode):
    """While it is entered, what a softmax gives is rounded. ``met``: how many there were."""

    def __init__(self, rounder: Rounder) -> None:
        super().__init__()
        self.rounder, self.met = rounder, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.met += 1
            return attention(self.rounder, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAXES:
            self.met += 1
            return self.rounder(result)
        return result


def attention(
    rounder: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` [..., queries, d], written out, its softmax rounded.

    Raises:
        Unsupported: causal, or with fewer heads of keys, as no U-Net's is.
    """
    if is_causal or enable_gqa or dropout_p:
        raise Unsupported("quantised attention is neither causal, nor grouped, nor has it dropout: set softmax=32 to leave it as it is")
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return rounder(scores.softmax(-1)).to(value.dtype) @ value


def with_rounded_softmax(attn: nn.Module, compute: Callable[[], Any]) -> Any:
    """What ``compute()``, the processor of ``attn``, gives with its softmax on its grid.

    Raises:
        Unsupported: no softmax was seen in it (xformers computes it in a kernel of its own).
    """
    rounder = softmax_of(attn)
    with nullcontext() if rounder is None else RoundedSoftmax(rounder) as mode:
        result = compute()
    if mode is not None and mode.met == 0:
        processor = type(getattr(attn, "processor", attn)).__name__
        raise Unsupported(
            f"the softmax inside of {processor} cannot be reached to be quantised: take torch's attention "
            "(pipe.disable_xformers_memory_efficient_attention()), or set softmax=32"
        )
    return result


@contextmanager
def rounded_softmaxes(models: Iterable[nn.Module]) -> Iterator[None]:
    """The same for all attention layers of these models, called outside of a run."""
    handles: list[Any] = []
    entered: list[Any] = []

    def before(attn: nn.Module, args: Any) -> None:
        rounder = softmax_of(attn)
        entered.append(nullcontext() if rounder is None else RoundedSoftmax(rounder))
        entered[-1].__enter__()

    def after(attn: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    try:
        for model in models:
            for module in model.modules():
                if softmax_layer(module):
                    handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def softmax_layer(module: nn.Module) -> bool:
    """Whether it is an attention whose queries are quantised, with a softmax on a grid or not yet."""
    layer = getattr(module, "to_q", None)
    return isinstance(getattr(layer, "base_layer", layer), QuantLinear)
