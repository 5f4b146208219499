"""Which objects of a pipeline are its denoisers, blocks, attention layers and ControlNets, as its family says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from diffgraft.kernel.facts import AttentionInfo, BlockInfo
from diffgraft.kernel.family import Family
from diffgraft.kernel.weights import root_of


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
                found.append(BlockInfo(path, group.kind, index, -1, len(found), group.takes, group.returns, model, block))
                for layers in group.layers:
                    kind = f"{group.kind}.{layers.removesuffix('s')}"
                    for number, layer in enumerate(getattr(block, layers, None) or ()):
                        if layer is not None:
                            where = f"{path}.{layers}.{number}"
                            found.append(BlockInfo(where, kind, index, number, len(found), (), (), model, layer))
    return tuple(found)


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
