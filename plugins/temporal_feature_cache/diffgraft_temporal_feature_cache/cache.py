"""Linear layers that compute once for each level, and the store in which all of a denoiser keep what they gave."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffgraft import PluginNotFound, now
from diffgraft.methods.standing_in import stand_in
from torch import Tensor, nn

NAME = "temporal_feature_cache"


class Kept(NamedTuple):
    """What a layer got and gave, and how often its weight, its bias and ``y`` had been written to then."""

    x: Tensor
    y: Tensor
    weights: tuple[int, ...]
    y_version: int

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in (self.x, self.y))


@dataclass
class LevelOutputs:
    """Outputs of layers at one level; ``used`` the number of the run that asked last."""

    kept: dict[nn.Module, Kept] = field(default_factory=dict)
    used: int = 0

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.kept.values())


class Store:
    """Outputs by level, up to ``limit`` bytes.

    Room is made by levels that no run but an earlier one has used. What the run in progress has used stays: a schedule that does not fit
    whole has its first levels kept, instead of none of them when they come round again.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.run = limit, 0, 0
        self.levels: dict[Hashable, LevelOutputs] = {}
        self.weights: tuple[Hashable, ...] = ()
        """What the weights were that everything in here was computed with."""

    def begin(self, weights: tuple[Hashable, ...]) -> None:
        """A run begins with these weights: what others gave is worth nothing."""
        self.run += 1
        if weights != self.weights:
            self.levels, self.bytes, self.weights = {}, 0, weights

    def forget(self) -> None:
        self.levels, self.bytes = {}, 0

    def at(self, key: Hashable) -> LevelOutputs:
        """What is kept of a level, which is in use now."""
        found = self.levels.setdefault(key, LevelOutputs())
        found.used = self.run
        return found

    def keep(self, level: LevelOutputs, layer: nn.Module, new: Kept) -> None:
        """Keep an output in the place of the layer's old one, where there is room for it."""
        if (old := level.kept.pop(layer, None)) is not None:
            self.bytes -= old.bytes
        while self.bytes + new.bytes > self.limit:
            old_key = next((key for key, each in self.levels.items() if each.used < self.run), None)
            if old_key is None:
                return
            self.bytes -= self.levels.pop(old_key).bytes
        level.kept[layer] = new
        self.bytes += new.bytes


@dataclass
class Serving:
    """One denoiser call at one level: answers its layers. ``came`` and ``known`` are inputs that were not compared, for this would wait
    for the device."""

    store: Store
    level: LevelOutputs
    served: int = 0
    computed: int = 0
    came: list[Tensor] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)

    def answer(self, layer: CachedLinear, x: Tensor) -> Tensor:
        """What the layer gives for x."""
        kept = self.level.kept.get(layer)
        if kept is not None and self.fits(kept, layer, x):
            self.served += 1
            return uncounted_apart(kept.y)
        self.computed += 1
        y = layer.compute(x)
        self.store.keep(self.level, layer, Kept(x.detach().clone(), uncounted_apart(y).detach(), versions(layer.parameters()), version(y)))
        return y

    def fits(self, kept: Kept, layer: CachedLinear, x: Tensor) -> bool:
        """Whether what is kept is what the layer would give."""
        if (x.shape, x.dtype, x.device) != (kept.x.shape, kept.x.dtype, kept.x.device):
            return False
        if kept.weights != versions(layer.parameters()) or kept.y_version != version(kept.y):
            return False
        if torch.is_grad_enabled() and kept.y.is_inference():
            return False
        if waits(x):
            self.came.append(x)
            self.known.append(kept.x)
            return True
        return torch.equal(x, kept.x)

    def apart(self) -> list[Tensor]:
        """For each device whether an input there that was not compared was another one: bool tensors, nothing waits for them."""
        pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for came, known in zip(self.came, self.known, strict=True):
            pairs.setdefault(came.device, []).append((came.reshape(-1), known.reshape(-1)))
        return [differ(*(torch.cat(side) for side in zip(*each, strict=True))) for each in pairs.values()]


def differ(x: Tensor, y: Tensor) -> Tensor:
    """Whether a value is another one, a bool; not a number is the same as not a number."""
    return (x.ne(y) & ~(x.isnan() & y.isnan())).any()


def uncounted_apart(y: Tensor) -> Tensor:
    """A tensor, or a copy where it does not count how often it is written to: what gets it may write to it, and what is kept would not
    tell."""
    return y.clone() if y.is_inference() else y


def waits(x: Tensor) -> bool:
    """Whether reading values of x would wait for a device."""
    return x.device.type != "cpu"


def version(x: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count that."""
    return 0 if x.is_inference() else x._version


def versions(parameters: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(version(each) for each in parameters)


class CachedLinear(nn.Linear):
    """A plain linear's parameters and hooks, the same objects, and what it gave for the levels that are kept.

    Computes itself outside of runs with the plugin, in compiled graphs, and where a gradient or tangent is to flow through it.
    """

    def __init__(self, layer: nn.Linear, store: Store) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        stand_in(self, layer)
        self.store = store

    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        serving = None if torch.compiler.is_compiling() or self.learns(input) else current()
        return self.compute(input) if serving is None else serving.answer(self, input)

    def learns(self, x: Tensor) -> bool:
        """Whether a derivative goes through: what is kept has none."""
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *self.parameters())):
            return True
        return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def current() -> Serving | None:
    """What serves the denoiser call in progress; None where the plugin is no part of the run (another pipeline has the same denoiser)."""
    run = now()
    if run is None:
        return None
    try:
        found: Serving | None = run.shared(NAME).serving
    except PluginNotFound:
        return None
    return found


INTEGERS = {1: torch.int8, 2: torch.int16}
"""By bytes of a value; wider ones are words of 32 bits: of the top bit of 64 the products would keep nothing else."""

CHUNK = 1 << 20
"""So many values of a parameter are summed up at a time: 8 MB as they are multiplied."""


def checksums(modules: Sequence[nn.Module]) -> tuple[Hashable, ...]:
    """What the parameters of modules (of a cached layer also those below it) are: type, shape and a number for each. One wait for each
    device.

    Attributes tell of most changes, but not of all: a LoRA is fused by writing past the counters.
    """
    found = list(dict.fromkeys(p for module in modules for p in module.parameters(recurse=isinstance(module, CachedLinear))))
    sums: dict[torch.device, list[Tensor]] = {}
    for parameter in found:
        sums.setdefault(parameter.device, []).append(checksum(parameter))
    read = {
        device: iter(torch.stack(each).tolist())  # check: allow host_sync because it is asked twice a run
        for device, each in sums.items()
    }
    return tuple((each.dtype, each.shape, next(read[each.device])) for each in found)


def checksum(parameter: Tensor) -> Tensor:
    """u^T B v modulo 2^64 (int64), where B are the bits of the values as whole numbers of at most 32 bits [rows, columns]; 0 without any.

    Exact, so the same on every device, and in any order of summing. All u and v are odd, so one other word is always seen; they have no
    pattern, so changes that have one (signs, rows, places) do not cancel, unless by a chance of about 2^-32.
    """
    if parameter.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=parameter.device)
    words = torch.atleast_1d(parameter.detach().contiguous()).view(INTEGERS.get(parameter.element_size(), torch.int32))
    bits = torch.atleast_2d(words).flatten(1)
    u, v = odd(sum(bits.shape), bits.device).split(list(bits.shape))
    return (torch.cat([(part * v).sum(1) for part in bits.split(max(1, CHUNK // len(v)))]) * u).sum()


def odd(count: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern [count], int64: 1, 2, ... mixed as in SplitMix64 (Steele, Lea, Flood 2014), modulo 2^64."""
    x = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) | 1
