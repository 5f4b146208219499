"""Tiny seeded random pipelines of every family, for tests: real diffusers objects, offline, fast."""

from __future__ import annotations

from importlib import import_module

from diffgraft import Tiny

from diffgraft_pipelines.families import FAMILIES


def make(class_name: str, seed: int = 0) -> Tiny:
    """The tiny pipeline of a diffusers class, with the arguments of a call.

    A variant follows the class name after ``@``: ``WanPipeline@2.2`` and ``WanImageToVideoPipeline@2.2`` (two
    transformers), ``StableDiffusionInpaintPipeline@9`` (inpainting U-Net with nine channels).
    """
    for family in FAMILIES:
        if class_name.partition("@")[0] in family.pipelines and family.tiny is not None:
            module, function = family.tiny.split(":")
            tiny: Tiny = getattr(import_module(module), function)(class_name, seed)
            return tiny
    known = ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
    raise KeyError(f"no tiny pipeline {class_name!r}; there are {known}")
