"""The denoisers, blocks, attention layers and ControlNets of a live pipeline, as its family says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffgraft.installed.family import Family


@dataclass(frozen=True, eq=False)
class BlockInfo:
    """A hookable block.

    ``path`` on the denoiser ("up_blocks.2.resnets.1"), ``kind`` ("up", "up.resnet", "double"...), ``index`` of the (top-level) block within
    its group, ``layer`` index inside the block or -1, ``order`` running number over the denoisers, ``takes``, ``returns``, ``joined``,
    ``rows`` as the family says, ``model`` the denoiser's attribute name, and the ``module``.
    """

    path: str
    kind: str
    index: int
    layer: int
    order: int
    takes: tuple[str, ...]
    returns: tuple[str, ...]
    model: str
    module: nn.Module
    joined: str = "none"
    rows: int = 0

    @property
    def is_layer(self) -> bool:
        return self.layer >= 0

    @property
    def stream(self) -> str:
        """The parameter that takes the stream which runs through all blocks."""
        return self.takes[0] if self.takes and "hidden_states" not in self.takes else "hidden_states"


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """A hookable attention layer: ``path`` on the denoiser, running number, whether it attends to the text, and the module."""

    path: str
    order: int
    is_cross: bool
    model: str
    module: nn.Module


@dataclass(frozen=True)
class Target:
    """What a plugin's ``check`` may look at before anything is touched."""

    pipe: Any
    family: Family
    denoisers: Mapping[str, nn.Module]
    blocks: tuple[BlockInfo, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the plugin needs, by knob, fetched already."""


def root_of(model: nn.Module) -> nn.Module:
    """The model itself where it is compiled."""
    return getattr(model, "_orig_mod", model)


def denoisers_of(pipe: Any, family: Family) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by attribute name (Wan 2.2 may have two)."""
    found = {name: getattr(pipe, name, None) for name in family.denoisers}
    return {name: module for name, module in found.items() if module is not None}


def eager_forward(denoiser: nn.Module) -> Callable[..., Any] | None:
    """The forward of a compiled denoiser, whole or in place, as it was before; None where it is not compiled."""
    if (root := root_of(denoiser)) is denoiser and denoiser.__dict__.get("_compiled_call_impl") is None:
        return None
    return root.forward  # type: ignore[no-any-return]


def blocks_of(family: Family, denoisers: Mapping[str, nn.Module]) -> tuple[BlockInfo, ...]:
    """All hookable blocks in running order, each followed by the layers inside it."""
    found: list[BlockInfo] = []
    for model, denoiser in denoisers.items():
        for group in family.blocks:
            part = getattr(root_of(denoiser), group.path, None)
            if part is None:  # a U-Net without a mid block
                continue
            blocks = list(part) if isinstance(part, nn.ModuleList) else [part]
            for index, block in enumerate(blocks):
                path = group.path if block is part else f"{group.path}.{index}"
                facts = group.takes, group.returns, model, block, group.joined, group.rows
                found.append(BlockInfo(path, group.kind, index, -1, len(found), *facts))
                for name in group.layers:
                    for where, kind, number, layer in layers_in(block, name):
                        place = f"{path}.{where}", f"{group.kind}.{kind}"
                        found.append(BlockInfo(*place, index, number, len(found), (), (), model, layer))
    return tuple(found)


def layers_in(block: nn.Module, name: str) -> list[tuple[str, str, int, nn.Module]]:
    """(path in the block, kind, number, module) of each layer that the attribute ``name`` holds: those of a list, or a module alone."""
    part = getattr(block, name, None)
    if isinstance(part, nn.Module) and not isinstance(part, nn.ModuleList):
        return [(name, name, 0, part)]
    kind = name.removesuffix("s")
    return [(f"{name}.{number}", kind, number, layer) for number, layer in enumerate(part or ()) if layer is not None]


def attention_of(denoisers: Mapping[str, nn.Module]) -> tuple[AttentionInfo, ...]:
    """All attention layers that have a processor, in module order."""
    found: list[AttentionInfo] = []
    for model, denoiser in denoisers.items():
        for path, module in root_of(denoiser).named_modules():
            if callable(getattr(module, "processor", None)):
                cross = getattr(module, "is_cross_attention", path.endswith("attn2"))
                found.append(AttentionInfo(path, len(found), bool(cross), model, module))
    return tuple(found)


def controls_of(pipe: Any) -> list[nn.Module]:
    """The ControlNets of a pipeline: diffusers calls that component ``controlnet`` in every pipeline that has one."""
    network = getattr(pipe, "controlnet", None)
    return [network] if isinstance(network, nn.Module) else []
