"""diffusers' hooks without diffusers' patches: put on a shadow of the model, called from hook points.

Which hook belongs on which module is decided by diffusers' own ``apply_...`` functions. They write ``forward`` and a registry into the
modules that they are given, so they are given modules that nobody runs: a shadow has the classes, names and attributes of the model, and
no parameters. What is taken from it are the hook objects, and these are called around the real modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diffgraft import root_of
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import HookFunctionReference, StateManager
from diffusers.hooks.sea_cache import apply_sea_cache
from torch import nn

from diffgraft_diffusers_cache.knobs import STACK

APPLY: Mapping[str, Callable[[nn.Module, Any], None]] = {
    "first_block": apply_first_block_cache,
    "mag": apply_mag_cache,
    "taylorseer": apply_taylorseer_cache,
    "sea": apply_sea_cache,
    "pab": apply_pyramid_attention_broadcast,
    "faster": apply_faster_cache,
}
"""method -> diffusers' function that puts its hooks on a model."""
OWN = ("forward", "processor", "_diffusers_hook", "_compiled_call_impl", "_hf_hook", "_old_forward")
"""Attributes of a module that others put there to change what it runs."""
DECISIONS = ("_should_compute_remaining_blocks", "resolve_gate")
"""What First Block Cache's hook and SeaCache's shared state call their decision whether this step computes."""
DEEP = 99


def shadow_of(model: nn.Module, depth: int = DEEP, known: dict[int, nn.Module] | None = None) -> nn.Module:
    """A module tree of the same classes, names and attributes, without parameters, buffers and anybody's hooks.

    ``depth``: how far down; 2 is the blocks in their lists.
    """
    known = {} if known is None else known
    model = root_of(model)
    if (twin := known.get(id(model))) is None:
        twin = known[id(model)] = object.__new__(type(model))
        children = {name: child and shadow_of(child, depth - 1, known) for name, child in model._modules.items()} if depth else {}
        twin.__dict__.update(model.__dict__)
        for name in OWN:
            twin.__dict__.pop(name, None)
        twin.__dict__.update(_modules=children, _parameters={}, _buffers={})
    return twin


def hooks_for(method: str, model: nn.Module, config: Any) -> dict[str, list[ModelHook]]:
    """Path of each module that diffusers puts a hook on ("" the model itself) -> its hooks, the innermost first.

    Raises:
        ValueError, IndexError: as diffusers does, for a model that it cannot put them on.
    """
    twin = shadow_of(model, 2 if method in STACK else DEEP)
    APPLY[method](twin, config)
    found: dict[str, list[ModelHook]] = {}
    for path, module in twin.named_modules():
        registry: HookRegistry | None = module.__dict__.get("_diffusers_hook")
        if registry is not None and registry.hooks:
            found[path] = list(registry.hooks.values())
    return found


def managers_of(hooks: Mapping[str, list[ModelHook]]) -> list[StateManager]:
    """What holds the hooks' state, each once."""
    found = {id(v): v for group in hooks.values() for hook in group for v in vars(hook).values() if isinstance(v, StateManager)}
    return list(found.values())


def let_agree(hooks: Mapping[str, list[ModelHook]], agree: Callable[[bool], bool]) -> None:
    """Have every decision by data go through ``agree``: ranks that run a denoiser together see other tokens."""
    deciding = {id(part): part for group in hooks.values() for hook in group for part in (hook, getattr(hook, "shared_state", None))}
    for part in deciding.values():
        for name in DECISIONS:
            if own := getattr(part, name, None):
                setattr(part, name, partial(agreed, agree, own))


def agreed(agree: Callable[[bool], bool], own: Callable[..., bool], *args: Any) -> bool:
    return agree(own(*args))  # check: allow host_sync because First Block Cache reads one value a step


class Place:
    """A module's hooks, called around whatever its forward is at the moment, in the order in which a ``HookRegistry`` calls them.

    ``ran`` whether the last call asked the forward; ``turn`` in which denoiser call that was.
    """

    __slots__ = ("call", "chain", "next", "ran", "turn")

    def __init__(self, module: nn.Module, hooks: Sequence[ModelHook]) -> None:
        self.chain: Callable[..., Any] = self.computed
        for hook in hooks:
            led = HookFunctionReference()  # the one it had led to the shadow
            led.original_forward = self.chain
            hook.fn_ref = led  # check: allow foreign_writes because this hook was made for this run
            self.chain = partial(hook.new_forward, module)  # type: ignore[attr-defined]
        self.ran, self.turn = False, -1
        self.call: Any = None
        self.next: Any = None

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """The forward. Its arguments are the call's own: no hook on a layer changes them."""
        self.ran = True
        return whole(self.next(self.call), self.call)

    def through(self, call: Any, next: Callable[[Any], Any], turn: int) -> Any:
        """One forward, or what stands for it."""
        self.call, self.next, self.ran, self.turn = call, next, False, turn
        out = self.chain(*call.args, **call.kwargs)  # check: allow host_sync because First Block Cache reads one value a step
        self.call = self.next = None  # they hold the module's input; after an exception the whole cache is given up
        return out


def whole(out: Any, call: Any) -> Any:
    """A block's output with nothing left out: SD3's last block gives no text, which First Block Cache would subtract from one."""
    if type(out) is not tuple or all(part is not None for part in out):
        return out
    return tuple(call.get(name) if part is None else part for name, part in zip(call.info.returns, out, strict=False))
