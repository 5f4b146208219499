"""One run of a tiny pipeline, written down: what its components and its scheduler get and give, and questions about tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from diffgraft import Tiny
from diffgraft.methods.inputs import calling
from torch import Tensor, nn


@dataclass
class Forward:
    """One forward of a component: its name, how many steps were over, inputs by parameter name, first output; of a denoiser also its blocks
    in running order, as (path, inputs, output). Pictures that came as a list, in ``lists``, are one tensor of rows here; ``emptied`` are
    lists that were empty in the end."""

    component: str
    step: int
    inputs: dict[str, Any]
    output: Any = None
    blocks: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list)
    lists: frozenset[str] = frozenset()
    emptied: frozenset[str] = frozenset()


@dataclass
class Seen:
    """One run: the components' forwards and the scheduler's steps (sample, timestep, model_output); copies of it that step instead of it
    (``copies``), or beside it (``beside``: the sample of the first such step)."""

    forwards: list[Forward]
    steps: list[dict[str, Any]]
    copies: bool = False
    beside: Tensor | None = None

    def of(self, names: tuple[str, ...], step: int = 0) -> list[Forward]:
        """Forwards of these components in a step."""
        return [each for each in self.forwards if each.step == step and each.component in names]

    def companion(self, first: Forward) -> str | None:
        """The input of the denoiser that holds what a copy of the scheduler steps beside it."""
        inputs = ((name, value) for name, value in first.inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
        return None if self.beside is None else next((name for name, value in inputs if embedded(self.beside, value) is not None), None)


def watch(tiny: Tiny, **changes: Any) -> Seen:
    """Run a tiny pipeline and write down what its components and its scheduler get and give."""
    pipe: Any = tiny.pipe
    seen = Seen([], [])
    open_forwards: list[tuple[Forward, dict[str, Any]]] = []
    handles = []

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raw = bound(module, args, kwargs)
        given = kept(raw)
        lists = {key: stacked for key, value in given.items() if (stacked := rows_of(value)) is not None}
        seen.forwards.append(Forward(name, len(seen.steps), {**given, **lists}, lists=frozenset(lists)))
        open_forwards.append((seen.forwards[-1], raw))

    def leave(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        forward, raw = open_forwards.pop()
        forward.output = kept(first_of(result))
        forward.emptied = frozenset(name for name, value in raw.items() if type(value) is list and not value and len(forward.inputs[name]))

    def block(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if open_forwards:
            open_forwards[-1][0].blocks.append((path, bound(module, args, kwargs), result))

    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            handles.append(component.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            handles.append(component.register_forward_hook(leave))
            for path, module in block_candidates(component):
                handles.append(module.register_forward_hook(partial(block, path), with_kwargs=True))
    scheduler, original = type(pipe.scheduler), type(pipe.scheduler).step
    signature = inspect.signature(original)

    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        if self is not pipe.scheduler and seen.steps and not seen.copies:
            seen.beside = kept(given["sample"]) if seen.beside is None else seen.beside
            return original(self, *args, **kwargs)
        seen.copies |= self is not pipe.scheduler
        seen.steps.append(kept({name: given[name] for name in ("sample", "timestep", "model_output")}))
        return original(self, *args, **kwargs)

    scheduler.step = step  # on the class for the length of the run: pipelines may step copies
    try:
        calling(pipe)(**{**tiny.kwargs, **changes}, generator=torch.Generator().manual_seed(0))
    finally:
        scheduler.step = original
        for handle in handles:
            handle.remove()
    return seen


def block_candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Members of the lists that a model has itself, and its single blocks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", member) for number, member in enumerate(child))
        elif name.endswith("block"):
            yield name, child


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; what goes through ``**kwargs`` by its own."""
    signature = inspect.signature(module.forward)
    found = dict(signature.bind(*args, **kwargs).arguments)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return found | found.pop(rest, {}) if rest in found else found


def kept(value: Any) -> Any:
    """Tensors as they are now: pipelines write into some."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: kept(each) for key, each in value.items()}
    return [kept(each) for each in value] if type(value) is list else value


def first_of(result: Any) -> Any:
    """The first output of a model."""
    while isinstance(result, (tuple, list, dict)) and len(result):
        if (stacked := rows_of(result)) is not None:
            return stacked
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return result


def rows_of(value: Any) -> Tensor | None:
    """[rows, channels, height, width] of a list of pictures [channels, 1, height, width]."""
    if type(value) is not list or not all(isinstance(each, Tensor) and each.ndim == 4 and each.shape[1] == 1 for each in value):
        return None
    return torch.stack(value).squeeze(2) if len({each.shape for each in value}) == 1 else None


def parts_of(value: Any, many: int) -> list[Any] | None:
    """A tensor, a list of rows, or a dict of such, in so many equal parts; None where it cannot be parted."""
    if isinstance(value, dict) and value:
        found = [parts_of(each, many) for each in value.values()]
        return None if any(each is None for each in found) else [dict(zip(value, each, strict=True)) for each in zip(*found, strict=True)]  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.ndim and len(value) >= many and len(value) % many == 0:
        return list(value.chunk(many))
    if isinstance(value, list) and len(value) >= many and len(value) % many == 0:
        size = len(value) // many
        return [value[k * size : (k + 1) * size] for k in range(many)]
    return None


def same(first: Any, second: Any) -> bool:
    """Whether two values are equal, tensors inside them too."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(type(first) is type(second) and not isinstance(first, Tensor) and first == second)


def same_start(first: Any, second: Any) -> bool:
    """Whether they are equal as far as both go: a text may be padded to the length of another."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == second.ndim:
        for axis in range(1, first.ndim):
            size = min(first.shape[axis], second.shape[axis])
            first, second = first.narrow(axis, 0, size), second.narrow(axis, 0, size)
    return same(first, second)


def first_axes(value: Any) -> list[int | None]:
    """The first axis of each tensor in a value."""
    if isinstance(value, Tensor):
        return [value.shape[0] if value.ndim else None]
    if isinstance(value, dict):
        value = list(value.values())
    return [size for each in value for size in first_axes(each)] if isinstance(value, (tuple, list)) else []


def embedded(sample: Tensor, value: Tensor) -> tuple[int | None, float] | None:
    """(axis on which ``value`` is longer, factor) where its first rows begin with ``sample``; None where they do not."""
    if value.ndim != sample.ndim or (len(value) % len(sample) and len(sample) % len(value)):
        return None
    longer = [axis for axis in range(1, value.ndim) if value.shape[axis] != sample.shape[axis]]
    if len(longer) > 1 or any(value.shape[axis] < sample.shape[axis] for axis in longer):
        return None
    part = value[: len(sample)].float()
    if longer:
        part = part.narrow(longer[0], 0, sample.shape[longer[0]])
    known = sample[: len(part)].float()
    factor = float((part * known).sum() / known.square().sum())
    apart = float((part - factor * known).norm() / part.norm().clamp_min(1e-12))
    return (longer[0] if longer else None, factor) if apart < 1e-3 else None


def largest(value: Any) -> float:
    if isinstance(value, Tensor) and value.is_complex():
        value = value.real
    return float(torch.as_tensor(value).float().max()) if torch.as_tensor(value).numel() else 0.0


def tensors_of(inputs: Mapping[str, Any]) -> list[str]:
    """Inputs that hold tensors, alone or in tuples."""
    return [name for name, value in inputs.items()
            if isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(each, Tensor) for each in value))]  # fmt: skip


def alike(ran: tuple[str, dict[str, Any], Any]) -> bool:
    """Whether a block gives back what it takes: a list of projections or embeddings does not."""
    _, inputs, result = ran
    shapes = [value.shape for value in inputs.values() if isinstance(value, Tensor) and value.ndim > 1]
    results = result if isinstance(result, tuple) else (result,)
    return any(isinstance(value, Tensor) and value.shape in shapes for value in results)
