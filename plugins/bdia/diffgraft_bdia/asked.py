"""What a call asks for beside what a code holds: whether both go together is known before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffgraft import ConfigError, Family
from diffgraft.methods.conditioning import number_of_pictures, number_of_prompts
from diffgraft.methods.inputs import parameters
from torch import Tensor

SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""How many pixels or frames become one of the latents, by the names that pipelines have for it."""


def with_size_of(noise: Tensor, pipe: Any, family: Family, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The size that a call is to name so that the pipeline runs at that of ``noise`` [n, ...]: what the call leaves out; packed latents do
    not tell it.

    Raises:
        ConfigError: the call names, or by itself has, another size. Pipelines that are given latents look at neither.
    """
    if adjusts(pipe, arguments):
        return {}
    names = [name for name in ("num_frames", "height", "width") if name in parameters(pipe)]
    if family.latents == "packed":
        lengths = [length(pipe, name, asked(pipe, name, arguments), packed=True) for name in names]
        tokens = math.prod(lengths)
        if tokens != noise.shape[1]:
            sizes = ", ".join(f"{name} = {asked(pipe, name, arguments)}" for name in names)
            refuse(sizes, f"{tokens} tokens", f"{noise.shape[1]}", "give the size of the inversion")
        return {}
    found = {}
    for name, axis in {"num_frames": -3, "height": -2, "width": -1}.items():
        there, given = noise.shape[axis], arguments.get(name)
        if name in names and isinstance(given, int) and length(pipe, name, given) != there:
            has = f"{there} ({name} = {pixels(pipe, name, there)})"
            refuse(f"{name} = {given}", f"{length(pipe, name, given)} of the latents", has, f"leave {name} out, or invert at that size")
        if name in names and given is None:
            found[name] = pixels(pipe, name, there)
    return found


def refuse(asked: str, means: str, has: str, way: str) -> None:
    """Raises ConfigError of a size that is not the code's."""
    raise ConfigError(f"plugin 'bdia': {asked} means {means}, but start has {has}: a run from a code has the size of its inversion; {way}")


def adjusts(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline makes another size of the one asked for (PixArt's bins, Kontext's area), so that nothing can be said of it."""
    known = parameters(pipe)
    bins = "use_resolution_binning"
    return "max_area" in known or (bins in known and bool(arguments.get(bins, known[bins].default)))


def factor(pipe: Any, names: tuple[str, ...], patch: int) -> int:
    """Pixels (or frames) of one of the latents, or of one token."""
    return patch * next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)  # type: ignore[no-any-return]


def length(pipe: Any, name: str, size: int, packed: bool = False) -> int:
    """How long an axis of the latents is (in tokens, of packed ones) at a size in frames or pixels."""
    if name == "num_frames":
        return (size - 1) // factor(pipe, TEMPORAL, getattr(pipe, "transformer_temporal_patch_size", 1) if packed else 1) + 1
    return size // factor(pipe, SPATIAL, getattr(pipe, "transformer_spatial_patch_size", 2) if packed else 1)


def pixels(pipe: Any, name: str, there: int) -> int:
    """The least size at which an axis of unpacked latents is so long."""
    return (there - 1) * factor(pipe, TEMPORAL, 1) + 1 if name == "num_frames" else there * factor(pipe, SPATIAL, 1)


def asked(pipe: Any, name: str, arguments: Mapping[str, Any]) -> int:
    """The size that a pipeline of packed latents takes."""
    size = arguments.get(name) or parameters(pipe)[name].default
    return size or pipe.default_sample_size * factor(pipe, SPATIAL, 1)  # type: ignore[no-any-return]


def ensure_batch(noise: Tensor, family: Family, arguments: Mapping[str, Any]) -> int:
    """How many pictures a call makes.

    Raises:
        ConfigError: the code is that of several pictures, and of another number.
    """
    rows, prompts = number_of_pictures(arguments, family), number_of_prompts(arguments)
    if len(noise) not in (1, rows):
        raise ConfigError(
            f"plugin 'bdia': start is a code of {len(noise)} pictures, this call makes {rows} ({prompts} prompts, {rows // prompts} of "
            f"each); give it {len(noise)} prompts, or the code of one picture, which is taken for all"
        )
    return rows
