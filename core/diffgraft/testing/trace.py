"""What can be seen of a pipeline from outside, and of the process: held before against after, it shows what a plugin left behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
PEFT = frozenset({"peft_config", "_hf_peft_config_loaded"})
"""What peft and diffusers note on a model that has a LoRA."""


class Same:
    """Compares by identity, and keeps its object alive so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):x}>"


Trace = Mapping[str, Any]


def trace(pipe: Any, base: type, modules: bool = True) -> Trace:
    """Attribute names, classes, configs, submodules, weights, hooks and processors of a pipeline, and the classes' own attributes.

    Args:
        base: the pipeline's class before anything was attached (the core gives the object a subclass of it).
        modules: False leaves out submodules, weights and what peft notes of a LoRA, for plugins that exchange or bring some while they
            are attached.
    """
    seen: dict[str, Any] = {"pipe.__dict__": frozenset(pipe.__dict__), "pipe.config": dict(pipe.config)}
    classes: set[type] = set(base.__mro__)
    for name, part in pipe.components.items():
        seen[name] = Same(part)
        if part is None:
            continue
        classes.update(type(part).__mro__)
        if isinstance(part, nn.Module):
            seen.update(_of_module(name, part, classes, modules))
        elif hasattr(part, "config") and hasattr(part, "step"):
            seen[f"{name}.__dict__"] = frozenset(part.__dict__)
            seen[f"{name}.config"] = dict(part.config)
    for cls in classes - {object}:
        for key, value in vars(cls).items():
            # Python makes an empty one when somebody (inspect, dataclasses) asks a class for it, and the other when an object is copied
            if (key == "__annotations__" and not value) or key == "__slotnames__":
                continue
            seen[f"class {cls.__module__}.{cls.__qualname__}.{key}"] = Same(value)
    for key, value in vars(torch.nn.functional).items():
        if callable(value):
            seen[f"torch.nn.functional.{key}"] = Same(value)
    return seen


def _of_module(name: str, root: nn.Module, classes: set[type], modules: bool) -> Iterator[tuple[str, Any]]:
    if hasattr(root, "config"):
        yield f"{name}.config", str(root.config)
    for path, module in root.named_modules() if modules else [("", root)]:
        where = f"{name}.{path}" if path else name
        classes.update(type(module).__mro__)
        yield f"{where}.__class__", Same(type(module))
        yield f"{where}.__dict__", frozenset(module.__dict__) - (frozenset() if modules else PEFT) - scratch(module)
        yield f"{where} hooks", tuple(len(getattr(module, hooks, ())) for hooks in HOOKS)
        if "processor" in module.__dict__ or "processor" in module._modules:
            yield f"{where}.processor", Same(module.processor)
        if modules:
            yield f"{where}._modules", {key: Same(child) for key, child in module._modules.items()}
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{where}.{key}", (Same(tensor), tensor._version)


def scratch(module: nn.Module) -> frozenset[str]:
    """What an autoencoder for video notes on itself at each clip (``clear_cache``), whoever asks it to encode or decode."""
    method = getattr(type(module), "clear_cache", None)
    code = getattr(method, "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def changed(before: Trace, after: Trace) -> list[str]:
    """What differs, by name."""
    return sorted(key for key in {*before, *after} if before.get(key) != after.get(key))


def expect_same_trace(before: Trace, after: Trace, what: str) -> None:
    """Raises AssertionError that names every difference."""
    lines = []
    for key in changed(before, after):
        old, new = before.get(key), after.get(key)
        if isinstance(old, frozenset) and isinstance(new, frozenset):
            lines.append(f"{key}: new {sorted(new - old)}, gone {sorted(old - new)}")
        elif isinstance(old, dict) and isinstance(new, dict):
            lines.append(f"{key}: changed {sorted(str(k) for k in {*old, *new} if old.get(k) != new.get(k))}")
        else:
            lines.append(f"{key}: {old!r} became {new!r}")
    assert not lines, f"{what}: " + "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let the garbage collector see only what is made from here on: it is much faster."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_tensors(pipe: Any) -> Counter[tuple[Any, ...]]:
    """The tensors that somebody still holds, as a bag of (shape, dtype); the scheduler's own schedule is the pipeline's business, and so is
    the last time that a guider was told."""
    gc.collect()
    own: set[int] = set()
    for value in (*vars(pipe.scheduler).values(), getattr(getattr(pipe, "guider", None), "_timestep", None)):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            own |= {id(item), id(getattr(item, "_base", None))}
    kinds = (Tensor, nn.Parameter)  # torch.compile keeps tensors of other classes, without values
    return Counter((tuple(x.shape), x.dtype) for x in gc.get_objects() if type(x) in kinds and id(x) not in own)
