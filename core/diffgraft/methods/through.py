"""A layer with some of its parts exchanged for one call: what an attention hook hands on where a method changes what lies inside a layer.

    return next(call.replace(attn=Through(call.attn, to_q=keep, to_out=(project, *call.attn.to_out[1:]))))

Nothing is written to the layer, so that LoRA, offload hooks and other plugins on it go on working.
"""

from __future__ import annotations

from typing import Any


class Through:
    """An attention module with ``changed`` parts; everything else is the module's own."""

    def __init__(self, attn: Any, **changed: Any) -> None:
        self.attn = attn
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["attn"], name)
