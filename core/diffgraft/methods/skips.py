"""A U-Net whose deep part is left out at some steps: which parts lie below a skip connection, and the tensor that stands for them.

Skip connections are numbered from 0, which ``conv_in`` makes, downward. A whole call keeps one tensor, the main-branch input of the up
layer that takes connection ``branch``; a call that skips runs only what lies above, and every module below hands out a stand-in of the
right shape, which nothing reads (DeepCache, arXiv 2312.00858, eqs. 4 and 5).

    State = Caches

    def select_blocks(self, blocks):
        return bypassed(blocks, self.config.branch, self.name)

    def denoise(self, call, next):
        return skipping(call, next, lambda cache: call.step.index - cache.last >= self.config.interval)

    def block(self, call, next):
        return bypassing(call, next)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffgraft.installed.anatomy import BlockInfo
from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.kernel.calls import BlockCall, DenoiseCall

EVERYTHING = 1 << 30
"""The number of the mid block: below every connection."""

# which parts ------------------------------------------------------------------------------------------------------------------------


def connections_made(down: Sequence[tuple[int, bool]]) -> list[range]:
    """The skip connections that each down block makes, given its number of layers and whether it ends in a downsampler.

    Connection 0 comes from ``conv_in``; then each layer makes one and each downsampler one. With two layers a block, connection
    3 b + l is the DeepCache package's branch l of block b.
    """
    made, first = [], 1
    for layers, downsampler in down:
        made.append(range(first, first + layers + downsampler))
        first = made[-1].stop
    return made


def connections_taken(up: Sequence[int]) -> list[range]:
    """The skip connections that each up block takes, given its number of layers: one a layer, the one made last first, down to 0."""
    taken, first = [], sum(up) - 1
    for layers in up:
        taken.append(range(first, first - layers, -1))
        first -= layers
    return taken


def connection_numbers(blocks: Sequence[BlockInfo], plugin: str) -> dict[int, int]:
    """For each block and layer (by ``order``) of one denoiser the shallowest skip connection it makes or takes: a skip step runs those up
    to its branch.

    Raises:
        Unsupported: the blocks are not those of a U-Net whose layers make and take one connection each.
    """
    down, up = ([b for b in blocks if b.kind == kind] for kind in ("down", "up"))
    made = connections_made([(_layers(blocks, b), _has(blocks, b, "downsampler")) for b in down])
    taken = connections_taken([_layers(blocks, b) for b in up])
    if not down or not up or not taken[0] or made[-1].stop != taken[0].start + 1:
        raise Unsupported(
            f"{plugin}: the family lists down and up blocks that make {made[-1].stop if made else 0} skip connections and take "
            f"{taken[0].start + 1 if taken else 0}; it needs a U-Net whose layers ('resnets', 'downsamplers') make and take one each"
        )
    if any(hasattr(b.module, "skip_conv") for b in blocks):
        raise Unsupported(f"{plugin}: these U-Net blocks carry a second, image-sized path (skip_conv), which skipping would cut")
    numbers: dict[int, int] = {}
    for block in blocks:
        if block.kind.startswith("down"):
            own = made[block.index]
            ends = block.kind == "down.downsampler"
            numbers[block.order] = own[-1] if ends else own[max(block.layer, 0)]
        elif block.kind.startswith("up"):
            own = taken[block.index]
            whole = not block.is_layer or block.kind == "up.upsampler"
            numbers[block.order] = own[-1] if whole else own[block.layer]
        else:
            numbers[block.order] = EVERYTHING
    return numbers


def by_model(blocks: Sequence[BlockInfo]) -> list[list[BlockInfo]]:
    """The blocks of each denoiser."""
    return [[b for b in blocks if b.model == model] for model in dict.fromkeys(block.model for block in blocks)]


def ensure_branch(blocks: Sequence[BlockInfo], branch: int, plugin: str) -> None:
    """Raises ConfigError where a denoiser has nothing below skip connection ``branch``, Unsupported where it is no such U-Net."""
    for own in by_model(blocks):
        deepest = sorted(set(connection_numbers(own, plugin).values()))[-2]  # the deepest branch with anything left below it
        if branch > deepest:
            raise ConfigError(f"plugin {plugin!r}: branch = {branch}: this {own[0].model} allows 0 to {deepest}")


def bypassed(blocks: Sequence[BlockInfo], branch: int, plugin: str) -> list[BlockInfo]:
    """What a skip step at ``branch`` leaves out: whole blocks, and the single layers in the two blocks that it runs in part."""
    found: list[BlockInfo] = []
    for own in by_model(blocks):
        numbers = connection_numbers(own, plugin)
        out = {block.path: block for block in own if numbers[block.order] > branch}
        found += [block for path, block in out.items() if not (block.is_layer and path.rsplit(".", 2)[0] in out)]
    return found


def is_on_the_way_up(block: BlockInfo) -> bool:
    """Whether what a bypassed block returns may be what feeds the branch: the last one of these does."""
    return not block.kind.startswith("down")


def _inside(blocks: Sequence[BlockInfo], block: BlockInfo) -> list[BlockInfo]:
    return [b for b in blocks if b.is_layer and b.path.rsplit(".", 2)[0] == block.path]


def _layers(blocks: Sequence[BlockInfo], block: BlockInfo) -> int:
    return sum(b.kind == f"{block.kind}.resnet" for b in _inside(blocks, block))


def _has(blocks: Sequence[BlockInfo], block: BlockInfo, layer: str) -> bool:
    return any(b.kind == f"{block.kind}.{layer}" for b in _inside(blocks, block))


# what is kept ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """What one U-Net call of a step keeps until the next: one feature tensor, and stand-ins without memory of their own.

    last     the solver's step at which the whole U-Net ran last, and ``call`` the number of that ``scheduler.step`` call
    whole    whether it runs whole now
    feature  what feeds the branch, as the last whole call had it
    """

    last: int = -1
    call: int = -1
    seen: Any = None
    whole: bool = True
    in_place: bool = False
    thin: bool = True
    """Whether nothing is added to what blocks return, so that stand-ins need no channels."""
    feeder: int = -1
    feature: Any = None
    stand_ins: dict[int, Any] = field(default_factory=dict)


@dataclass
class Caches:
    """Of one guidance branch in one run: a cache for the first, second... U-Net call of a ``scheduler.step`` (a plugin may ask often)."""

    place: int = -1
    number: int = 0
    of_call: list[Cache] = field(default_factory=list)

    def begin(self, place: int) -> Cache:
        """The cache of the U-Net call that begins now, for this ``scheduler.step`` call."""
        if place < self.place:  # the schedule began again
            self.of_call.clear()
        self.number = self.number + 1 if place == self.place and self.of_call else 0
        self.place = place
        if self.number == len(self.of_call):
            self.of_call.append(Cache())
        return self.of_call[self.number]

    @property
    def now(self) -> Cache:
        return self.of_call[self.number]


def skipping(call: DenoiseCall, next: Callable[[DenoiseCall], Tensor], due: Callable[[Cache], bool]) -> Tensor:
    """A plugin's ``denoise``, whose state is :class:`Caches`: a whole U-Net call, or one that skips.

    Args:
        due: whether the whole U-Net runs, where there is a cache that fits; where there is none (first call, other shape, guidance cut off
            in mid-run) it does.
    """
    step, sample = call.step, call.sample
    cache: Cache = call.state.begin(step.call)
    cache.in_place = edits_in_place(call)
    cache.thin = not cache.in_place and all(x is None for name, x in call.arguments().items() if "residual" in name)
    seen = (call.model_name, sample.shape, sample.dtype, sample.device, cache.thin)
    if cache.feature is None or seen != cache.seen:  # the first call, or guidance was cut in mid-run
        cache.whole = True
        cache.stand_ins.clear()
    else:
        cache.whole = due(cache)
    if cache.whole:
        cache.last, cache.call, cache.feature = step.index, step.call, None  # first free the old one
    cache.seen = None  # a forward that fails half-way leaves nothing to reuse
    call.count("computed" if cache.whole else "skipped")
    out = next(call)
    cache.seen = seen
    return out


def bypassing(call: BlockCall, next: Callable[[BlockCall], Any], correct: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A plugin's ``block`` on the :func:`bypassed` ones.

    Args:
        correct: what a call that skips makes of the feature.
    """
    cache: Cache = call.state.now
    order = call.info.order
    if cache.whole:
        out = next(call)
        if is_on_the_way_up(call.info):  # the last one on the way up feeds the branch
            cache.feeder, cache.feature = order, fresh(out) if cache.in_place else out
        if order not in cache.stand_ins:
            cache.stand_ins[order] = stand_in(out, cache.thin)
        return out
    out = cache.feature if order == cache.feeder else cache.stand_ins[order]
    if correct is not None and order == cache.feeder:
        out = corrected_first(out, correct)
    return fresh(out) if cache.in_place else out


def corrected_first(out: Any, correct: Callable[[Tensor], Tensor]) -> Any:
    """What a block returned, its stream corrected: the mid block's or an up block's tensor, or the first of several."""
    return (correct(out[0]), *out[1:]) if isinstance(out, tuple) else correct(out)


def stand_in(out: Any, thin: bool) -> Any:
    """A block's output without its memory: no channels at all, so that concatenating it is free, or (not ``thin``) its whole shape."""
    if isinstance(out, Tensor):
        return out.new_empty((out.shape[0], 0, *out.shape[2:])) if thin and out.ndim >= 4 else out.new_zeros(()).expand(out.shape)
    return tuple(stand_in(part, thin) for part in out) if isinstance(out, tuple) else out


def fresh(out: Any) -> Any:
    """A copy that may be written to."""
    if isinstance(out, Tensor):
        return out.clone()
    return tuple(map(fresh, out)) if isinstance(out, tuple) else out


def edits_in_place(call: DenoiseCall) -> bool:
    """Whether this U-Net call writes into what blocks return: T2I-Adapter residuals are added, FreeU scales, in place."""
    adapter = call.get("down_intrablock_additional_residuals") is not None
    legacy = call.get("down_block_additional_residuals") is not None and call.get("mid_block_additional_residual") is None
    return adapter or legacy or any(getattr(b, "s1", None) for b in getattr(call.model, "up_blocks", ()))
