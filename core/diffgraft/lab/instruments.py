"""Instruments: a clock and a counter of multiply-adds for the denoiser(s) of a pipeline (by module hooks), a counter of live memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop, shape_wrapper

from diffgraft.installed.anatomy import denoisers_of
from diffgraft.kernel.stack import PluginStack


class DenoiseClock:
    """Time from the first denoiser call's start to the last one's end, by module hooks; without waiting for the GPU in between."""

    def __init__(self, stack: PluginStack, device: torch.device) -> None:
        self.stack = stack
        self.kind = device.type
        self.first: Any = None
        self.last: Any = None

    def now(self) -> Any:
        if self.kind == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def __enter__(self) -> DenoiseClock:
        @torch.compiler.disable
        def before(module: Any, args: Any) -> None:
            if self.first is None:
                self.first = self.now()

        @torch.compiler.disable
        def after(module: Any, args: Any, result: Any) -> None:
            self.last = self.now()

        self.handles = hook_denoisers(self.stack, before, after)
        return self

    def __exit__(self, *error: object) -> None:
        self.handles.close()

    def seconds(self) -> float | None:
        """The measured time; None where there is no clock for it (neither CPU nor CUDA)."""
        if self.first is None or self.last is None or self.kind not in ("cpu", "cuda"):
            return None
        return float(self.first.elapsed_time(self.last)) / 1e3 if self.kind == "cuda" else float(self.last - self.first)


class MacMode(TorchDispatchMode):
    """``macs``: multiply-adds of all matrix products, convolutions and attention that run under it, by torch's own formulas.

    ``FlopCounterMode`` counts the same, and costs more: it keeps a table by module, and tries to take every other operator apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.formulas = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in missing_formulas().items()}}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "_overloadpacket", func))
        if formula is None and torch.is_inference_mode_enabled():  # composite operators come here whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    @property
    def macs(self) -> int:
        return self.flops // 2


def missing_formulas() -> dict[Any, Any]:
    """FLOP formulas that torch's counter lacks: attention on the CPU."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop(query, key, value))

    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if op is None else {op: attention}


class MacCounter:
    """Counts the multiply-adds inside the denoiser(s) between enter and exit."""

    def __init__(self, stack: PluginStack) -> None:
        self.stack = stack
        self.flops = 0

    def __enter__(self) -> MacCounter:
        counter = MacMode()
        entered: list[int] = []

        def before(module: Any, args: Any) -> None:
            entered.append(counter.flops)

        def after(module: Any, args: Any, result: Any) -> None:
            start = entered.pop()
            if not entered:  # a denoiser called inside a denoiser counts once
                self.flops += counter.flops - start

        self.handles = hook_denoisers(self.stack, before, after)
        self.handles.enter_context(counter)
        return self

    def __exit__(self, *error: object) -> None:
        self.handles.close()

    @property
    def macs(self) -> int:
        return self.flops // 2


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors alive at the worst moment, counted at every operator: ``peak`` of all that is made, from birth to death.

    ``known``: storages (``tensor.untyped_storage()._cdata``) that were there before and do not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.died, key, size)
        return out

    def died(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def hook_denoisers(stack: PluginStack, before: Callable[[Any, Any], None], after: Callable[[Any, Any, Any], None]) -> ExitStack:
    """Hooks on every denoiser, removed when the stack is closed. Plugins sit inside ``forward``, so a call that they answer counts too."""
    handles = ExitStack()
    for module in denoisers_of(stack.pipe, stack.family).values():
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
            handles.callback(handle.remove)
    return handles


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
