"""Ranks that run one denoiser together (context, tensor or sharded parallel): what depends on data is decided once for all of them.

Each has a part of the tokens or of the weights, and asks the others for theirs inside the denoiser: where one rank leaves out a call that
another makes, both wait for ever. Ranks with a whole denoiser each (data parallel) ask nobody, and may decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STAND_IN: ContextVar[Callable[[Any], Any] | None] = ContextVar("diffgraft_ranks", default=None)
"""What answers in the place of the other ranks, for tests in one process."""


def groups_of(models: Iterable[Any]) -> tuple[Any, ...]:
    """The process groups of more than one rank in which these denoisers talk, by what shares them out: diffusers' context and tensor
    parallel, FSDP in both forms, any ``DTensor``."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Shard

    found = []
    for model in filter(None, models):
        parallel = getattr(model, "_parallel_config", None)
        if (context := getattr(parallel, "context_parallel_config", None)) is not None:
            found.append(context._flattened_mesh.get_group())
        found += [part.process_group for part in model.modules() if isinstance(part, FullyShardedDataParallel)]
        for value in model.parameters():
            if isinstance(value, DTensor):
                found += [value.device_mesh.get_group(i) for i, place in enumerate(value.placements) if isinstance(place, Shard)]
    return tuple(group for group in dict.fromkeys(found) if dist.get_world_size(group) > 1)


def of_the_first(value: Any, groups: Iterable[Any], device: torch.device) -> Any:
    """``value`` (a bool, a number or a tensor) as the first rank of the groups has it. Waits for it."""
    if isinstance(value, Tensor):
        shared = value.clone(memory_format=torch.contiguous_format)
    else:
        shared = torch.tensor(float(value), dtype=torch.float64, device=device)
    for group in groups:
        dist.broadcast(shared, group=group, group_src=0)
    return shared if isinstance(value, Tensor) else type(value)(shared.item())
