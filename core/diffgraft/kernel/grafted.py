"""The class of one pipeline that has plugins: its calls go through the stack, its copies are of the plain objects.

A run shows things in places that are the user's (a plugin's scheduler, wrappers on methods). Whoever copies, pickles or saves the pipeline
in the middle of one, or makes another of its components, gets what lies under them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from diffgraft.kernel.defaults import plain_class
from diffgraft.kernel.slots import class_for_one, plain_state, reduced_as, uncover, underneath, wraps_method
from diffgraft.kernel.surgery import Surgery, follow
from diffgraft.stacks.reading import NAME

STACK = "_diffgraft_stack"


class GraftedStack(Protocol):
    """What the class asks of its stack."""

    base_class: type
    surgery: Surgery

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def copy_to(self, pipe: Any) -> None: ...

    def save(self, path: Path, *, copy_files: bool = False) -> Path: ...


def class_with(stack: GraftedStack) -> type:
    """A subclass of the pipeline's class, for this one object, that runs its calls through ``stack``."""
    base = stack.base_class

    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return stack(*args, **kwargs)

    def __deepcopy__(pipe: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        new: Any = object.__new__(base)
        memo[id(pipe)] = new
        for exchanged, original in stack.surgery.exchanged():  # the copy's plugins exchange its own modules themselves
            memo[id(exchanged)] = twin = copy.deepcopy(original, memo)
            follow(twin, exchanged)
        state = plain_state(pipe.__dict__)
        new.__dict__.update(copy.deepcopy(state, memo))
        uncover(_parts(state.values()), memo)
        stack.copy_to(new)
        return new

    def __copy__(pipe: Any) -> Any:  # noqa: N807
        new: Any = object.__new__(base)
        new.__dict__.update(plain_state(pipe.__dict__))
        return new

    def components(pipe: Any) -> dict[str, Any]:  # `from_pipe` in a run takes the user's own, not what a plugin shows in its place
        return {name: underneath(value) for name, value in base.components.__get__(pipe).items()}  # type: ignore[attr-defined]

    def bare(pipe: Any) -> Any:
        """What is written down is the plain pipeline: which plugins its reader has installed is not ours to say."""
        if not stack.surgery.operated():
            return pipe
        pipe = copy.deepcopy(pipe)
        pipe.plugins.clear()
        return pipe

    def save_pretrained(pipe: Any, save_directory: Any, *args: Any, plugins: bool = False, **kwargs: Any) -> Any:
        if plugins:  # first: what cannot be saved is said before anything is written
            stack.save(Path(save_directory) / NAME, copy_files=True)
        return base.save_pretrained(copy.copy(bare(pipe)), save_directory, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce_ex__(pipe: Any, protocol: Any) -> Any:  # noqa: N807
        return reduced_as(bare(pipe), plain_class(base), protocol)

    body = {
        "__call__": wraps_method(base, "__call__", __call__),
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "components": property(components, doc=base.components.__doc__),  # type: ignore[attr-defined]
        "save_pretrained": wraps_method(base, "save_pretrained", save_pretrained),
        "plugins": property(lambda pipe: stack, doc="The plugins on this pipeline."),
        STACK: stack,
    }
    return class_for_one(base, body)


def _parts(values: Iterable[Any]) -> Iterator[Any]:
    """The objects that a run may have slots on."""
    for value in values:
        if isinstance(value, nn.Module):
            yield from value.modules()
        elif hasattr(value, "__dict__"):
            yield value
