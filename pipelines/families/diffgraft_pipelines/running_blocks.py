"""The blocks of a denoiser, as they were seen to run: their lists, what flows through them, where the text is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffgraft import BlockGroup
from torch import Tensor, nn

from diffgraft_pipelines.runs import alike, first_axes, same, tensors_of

Place = Literal["none", "front", "behind", "mixed", "alone"]
LAYERS = ("resnets", "attentions")
"""Of a U-Net's block, in running order; what changes the size comes last."""


def find_blocks(o: Any) -> tuple[BlockGroup, ...]:
    """The lists that run, in running order, with what flows through their blocks."""
    twice = o.twice.of(o.denoisers)[0].blocks if o.twice else None
    if twice is None:
        o.remarks["blocks"] = "what all rows of a batch share may be among what blocks take"
    ran: dict[str, list[int]] = {}
    for number, (path, _, _) in enumerate(o.first.blocks):
        ran.setdefault(path.partition(".")[0], []).append(number)
    groups, kept = [], []
    unet = hasattr(o.model(), "down_blocks")
    for path, numbers in ran.items():
        if not unet and (len(numbers) < 2 or not all(alike(o.first.blocks[k]) for k in numbers)):
            continue
        if unet and path not in ("down_blocks", "mid_block", "up_blocks"):
            continue
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            o.remarks["blocks"] = f"{path} runs in turn with other lists"
        takes, returns = flow(o, path, numbers, twice)
        layers = lists_in(o.model(), path) if unet else ()
        rows = rows_axis(o.first.blocks[numbers[0]][1], twice[numbers[0]][1]) if twice else 0
        place = "none" if unet else joined(o, numbers[0], [k for group in kept for k in group], rows)
        if place != "alone":
            kept.append(numbers)
        groups.append(BlockGroup(path, kind_of(path, ran), takes, returns, layers, place, rows))
    return tuple(groups)


def stream(o: Any, number: int) -> Any:
    """What runs through the blocks."""
    inputs = o.first.blocks[number][1]
    return inputs["hidden_states"] if "hidden_states" in inputs else next(iter(inputs.values()))


def rows_axis(inputs: Mapping[str, Any], twice: Mapping[str, Any]) -> int:
    """The axis on which the stream grows with the batch."""
    x, both = (next(iter(each.values())) for each in (inputs, twice))
    return int(grows_behind(x, both))


def grows_behind(x: Any, both: Any) -> bool:
    """Whether the second axis grows with the batch, not the first."""
    wide = isinstance(x, Tensor) and isinstance(both, Tensor) and x.ndim > 2
    return wide and x.shape[0] == both.shape[0] and 2 * x.shape[1] == both.shape[1]


def joined(o: Any, number: int, before: list[int], rows: int) -> Place:
    """Where in a block's stream the text is: where what comes out of the block before is not.

    Args:
        before: the blocks before it that have the sample in their stream.
    """
    x, later = stream(o, number), o.later().blocks
    if isinstance(x, Tensor) and same(x, next(iter(later[number][1].values()))):
        return "alone"  # neither the sample nor the time is in it
    if isinstance(x, Tensor) and not before and o.other is not None and (found := beside(o, number, rows)):
        return found
    first = stream(o, before[0]) if before else x
    if not isinstance(x, Tensor) or x.ndim != 3 or not isinstance(first, Tensor) or x.shape[1] == first.shape[1]:
        return "none"
    extra, n = x.shape[1] - first.shape[1], first.shape[1]
    if any(torch.equal(x[:, :n], part) for part in three_axes(o, before[-1], n)):
        return "behind"
    if any(torch.equal(x[:, -n:], part) for part in three_axes(o, before[-1], n)):
        texts = [text for k in range(number) for text in three_axes(o, k) if text.shape[1] > extra]
        return "mixed" if any(torch.equal(x[:, :extra], text[:, :extra]) for text in texts) else "front"  # without what pads it
    path = o.first.blocks[number][0]
    o.remarks["blocks"] = f"{path} gets {x.shape[1]} tokens, the first block {first.shape[1]}: which are the sample's"
    return "none"


def three_axes(o: Any, number: int, tokens: int | None = None) -> list[Tensor]:
    """What a block returns that is a stream, of so many tokens."""
    result = o.first.blocks[number][2]
    found = [value for value in (result if isinstance(result, tuple) else (result,)) if isinstance(value, Tensor) and value.ndim == 3]
    return found if tokens is None else [value for value in found if value.shape[1] == tokens]


def beside(o: Any, number: int, rows: int) -> Place | None:
    """Where the tokens are that another text changes and another step does not, of a stream that has them from the first block on."""
    runs = (o.first, o.later(), o.other.of(o.denoisers)[0])
    x, later, other = (next(iter(each.blocks[number][1].values())) for each in runs)
    if x.ndim != 3 or other.ndim != 3 or x.shape != later.shape:
        return None
    x, later, other = (each.movedim(rows, 0) for each in (x, later, other))
    moving = (x != later).any(-1).any(0)
    text = ~moving if x.shape != other.shape else ~moving & (x != other).any(-1).any(0)
    if not text.any():
        return None
    places, samples = text.nonzero(), moving.nonzero()
    return "front" if places.max() < samples.min() else "behind" if places.min() > samples.max() else None


def flow(o: Any, path: str, numbers: list[int], twice: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the blocks of a list take (the most that one takes) and return."""
    takes: dict[str, None] = {}
    wide = max(numbers, key=lambda number: len(tensors_of(o.first.blocks[number][1])))
    widest = o.first.blocks[wide][1]
    for name in tensors_of(widest):
        other = None if twice is None else twice[wide][1].get(name)
        if "rotary" not in name and (twice is None or first_axes(widest[name]) != first_axes(other) or grows_behind(widest[name], other)):
            takes[name] = None
    _, inputs, result = o.first.blocks[numbers[0]]
    results = result if isinstance(result, tuple) else (result,)
    returns = []
    for value in results:
        fits = [name for name in takes if isinstance(value, Tensor) and name not in returns and isinstance(inputs.get(name), Tensor)
                and inputs[name].shape == value.shape]  # fmt: skip
        if isinstance(value, tuple):
            returns.append("res_samples")
        else:
            if len(fits) > 1 and len(results) > 1:
                o.remarks["blocks"] = f"{path}: which output is which, as {' and '.join(fits)} have one shape"
            returns.append(fits[0] if fits else "hidden_states")
    return tuple(takes), tuple(returns)


def lists_in(model: nn.Module, path: str) -> tuple[str, ...]:
    """The lists of layers inside a U-Net's blocks."""
    part = getattr(model, path)
    found: dict[str, None] = {}
    for block in part if isinstance(part, nn.ModuleList) else [part]:
        found |= dict.fromkeys(name for name, child in block.named_children() if isinstance(child, nn.ModuleList))
    order = [*LAYERS, *(name for name in found if name not in LAYERS and not name.endswith("samplers"))]
    return tuple(sorted(found, key=lambda name: order.index(name) if name in order else len(order)))


def kind_of(path: str, ran: Mapping[str, Any]) -> str:
    """A short name for a list's blocks."""
    kind = path.removesuffix("s").removesuffix("block").replace("transformer", "").strip("_")
    return kind or ("double" if any(other.startswith("single") for other in ran) else "block")
