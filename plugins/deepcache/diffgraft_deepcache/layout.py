"""Which parts of a U-Net lie below a skip connection. Skip connections are numbered from 0, which ``conv_in`` makes, downward."""

from __future__ import annotations

from collections.abc import Sequence

from diffgraft import BlockInfo, Unsupported

EVERYTHING = 1 << 30
"""The number of the mid block: below every connection."""


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


def connection_numbers(blocks: Sequence[BlockInfo]) -> dict[int, int]:
    """For each block and layer (by ``order``) the shallowest skip connection it makes or takes: a skip step runs those up to its branch.

    Raises:
        Unsupported: the blocks are not those of a U-Net whose layers make and take one connection each.
    """
    down, up = ([b for b in blocks if b.kind == kind] for kind in ("down", "up"))
    made = connections_made([(_layers(blocks, b), _has(blocks, b, "downsampler")) for b in down])
    taken = connections_taken([_layers(blocks, b) for b in up])
    if not down or not up or not taken[0] or made[-1].stop != taken[0].start + 1:
        raise Unsupported(
            f"deepcache: the family lists down and up blocks that make {made[-1].stop if made else 0} skip connections and take "
            f"{taken[0].start + 1 if taken else 0}; it needs a U-Net whose layers ('resnets', 'downsamplers') make and take one each"
        )
    if any(hasattr(b.module, "skip_conv") for b in blocks):
        raise Unsupported("deepcache: these U-Net blocks carry a second, image-sized path (skip_conv), which skipping would cut")
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


def bypassed(blocks: Sequence[BlockInfo], branch: int) -> list[BlockInfo]:
    """What a skip step at ``branch`` leaves out: whole blocks, and the single layers in the two blocks that it runs in part."""
    numbers = connection_numbers(blocks)
    out = {block.path: block for block in blocks if numbers[block.order] > branch}
    return [block for path, block in out.items() if not (block.is_layer and path.rsplit(".", 2)[0] in out)]


def _inside(blocks: Sequence[BlockInfo], block: BlockInfo) -> list[BlockInfo]:
    return [b for b in blocks if b.is_layer and b.path.rsplit(".", 2)[0] == block.path]


def _layers(blocks: Sequence[BlockInfo], block: BlockInfo) -> int:
    return sum(b.kind == f"{block.kind}.resnet" for b in _inside(blocks, block))


def _has(blocks: Sequence[BlockInfo], block: BlockInfo, layer: str) -> bool:
    return any(b.kind == f"{block.kind}.{layer}" for b in _inside(blocks, block))
