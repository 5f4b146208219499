"""What a plugin needs beside its knobs (a calibration artefact, a second pipeline): fetched and checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffgraft.artefacts import Artefact, Fingerprint
from diffgraft.errors import ConfigError, Unsupported
from diffgraft.findings import Finding
from diffgraft.predictions import prediction_kind
from diffgraft.rewards import find_reward

if TYPE_CHECKING:
    from diffgraft.calls import Target
    from diffgraft.plugin import Need, Plugin


def fetch(plugin: Plugin, target: Target, known: Mapping[str, Any]) -> dict[str, Any]:
    """What ``plugin`` needs, by knob; checked against the pipeline that it will be put on.

    Args:
        known: what was fetched before and is still the one that the knob names.

    Raises:
        ConfigError: a name that leads nowhere.
        ArtefactMismatch, Unsupported: it does not fit this pipeline.
    """
    given: dict[str, Any] = {}
    for need in plugin.needs:
        value = known.get(need.knob, getattr(plugin.config, need.knob))
        if value is None:
            given[need.knob] = None
        elif need.kind == "reward":
            given[need.knob] = find_reward(f"plugin {plugin.name!r}: {need.knob}", value)
        elif need.kind != "pipeline":
            given[need.knob] = fetch_artefact(plugin, need, value, target)
        elif isinstance(value, (list, tuple)):
            given[need.knob] = [fetch_pipeline(plugin, need.knob, one, target) for one in value]
        else:
            given[need.knob] = fetch_pipeline(plugin, need.knob, value, target)
    return given


def fetch_artefact(plugin: Plugin, need: Need, value: Any, target: Target) -> Artefact:
    """An artefact that was made for this model (what else it must fit is checked when a run begins)."""
    read = Finding.load if need.kind == "search" else Artefact.load
    artefact = value if isinstance(value, Artefact) else read(value, plugin.name, need.kind)
    artefact.ensure_model(target.pipe, target.denoisers)
    return artefact


def fetch_pipeline(plugin: Plugin, knob: str, value: Any, target: Target) -> Any:
    """A second pipeline on the device and in the dtype of the first, of the same class and latent space."""
    from diffusers import DiffusionPipeline

    from diffgraft.loading import read_pipeline

    if isinstance(value, (str, os.PathLike)):
        second = read_pipeline(value, torch_dtype=target.pipe.dtype).to(target.pipe.device)
        second.set_progress_bar_config(disable=True)
    elif isinstance(value, DiffusionPipeline):
        second = value
    else:
        raise ConfigError(
            f"plugin {plugin.name!r}: {knob} = {type(value).__name__}: give a bundled name, a folder, a Hub id or a live diffusers pipeline"
        )
    if differing := space_difference(target, second):
        raise Unsupported(f"{plugin.name}: {knob} = {value if isinstance(value, str) else type(value).__name__} does not fit: {differing}")
    return second


def follow(second: Any, device: torch.device) -> None:
    """Move a second pipeline to the device on which the first one runs now."""
    if second.device != device and getattr(second, "_all_hooks", None) in (None, []):  # else accelerate moves its parts
        second.to(device)


def as_tuple(value: Any) -> Any:
    """A setting that a saved pipeline gives back as a list."""
    return tuple(value) if isinstance(value, list) else value


def space_difference(target: Target, second: Any) -> str | None:
    """Why the predictions of a second pipeline's denoiser are no stand-in for the first one's, or None when they are."""
    first, family = target.pipe, target.family
    if type(second).__name__ not in family.pipelines:
        return f"{type(second).__name__} is not of the family {family.name!r} ({', '.join(family.pipelines)})"
    mine, other = prediction_kind(family, first.scheduler), prediction_kind(family, second.scheduler)
    if mine != other:
        return f"its denoiser predicts {other}, this one {mine}"
    for name in family.denoisers:
        here, there = getattr(first, name, None), getattr(second, name, None)
        if here is None or there is None:
            continue
        for key in ("in_channels", "out_channels", "patch_size"):
            if as_tuple(here.config.get(key)) != as_tuple(there.config.get(key)):
                return f"{name}.{key} is {there.config.get(key)}, here {here.config.get(key)}"
    vae, second_vae = getattr(first, "vae", None), getattr(second, "vae", None)
    if isinstance(vae, nn.Module) and isinstance(second_vae, nn.Module) and vae is not second_vae:
        for key in ("scaling_factor", "shift_factor"):
            if vae.config.get(key) != second_vae.config.get(key):
                return f"its latent space is another one: vae.{key} is {second_vae.config.get(key)}, here {vae.config.get(key)}"
        if why := Fingerprint.of(vae).difference(Fingerprint.of(second_vae)):
            return f"its latent space is another one: the vae is {why}"
    return None
