"""Where the host waits for the device, by step: each wait stops the queue of kernels, and a GPU that is waited for at every step idles."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOLD = "called a synchronizing CUDA operation"
"""What torch warns of in its sync debug mode."""


class Reads(TorchDispatchMode):
    """On a CPU, where nothing waits: how often Python read a number out of a tensor, which on a GPU is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


class Syncs:
    """Counts between enter and exit; ``mark`` is given to a call as its ``callback_on_step_end``.

    On CUDA every wait that torch knows of in its sync debug mode counts, on other devices `Reads`.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[int] = []

    def __enter__(self) -> Syncs:
        self.undo = ExitStack()
        if self.cuda:
            self.seen: Any = self.undo.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self.undo.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self.reads = self.undo.enter_context(Reads())
        return self

    def __exit__(self, *error: object) -> None:
        self.undo.close()

    @property
    def count(self) -> int:
        return sum(TOLD in str(each.message) for each in self.seen) if self.cuda else self.reads.count

    def mark(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.marks.append(self.count)
        return tensors

    @property
    def by_step(self) -> list[int]:
        """Of every step but the first, which comes with what a run does once."""
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
