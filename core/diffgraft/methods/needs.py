"""Fetching and checking what plugins need beside their knobs (an artefact, a second pipeline, published weights, a text encoder, a reward),
before anything is touched.

The kinds are registered in the entry-point group ``diffgraft.needs``: another package adds its own in the same way.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from diffgraft.installed.anatomy import Target
from diffgraft.installed.errors import BrokenPlugin, ConfigError, Unsupported
from diffgraft.installed.plugin import Need, Plugin
from diffgraft.installed.registry import find_family
from diffgraft.kernel.loading import read_pipeline
from diffgraft.kernel.modular import PIPELINES
from diffgraft.methods.artefacts import Artefact, Fingerprint
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.encoders import Encoder, follow, read_encoder
from diffgraft.methods.findings import Finding
from diffgraft.methods.layouts import Layout
from diffgraft.methods.predictions import prediction_kind
from diffgraft.methods.published import Weights, read_weights
from diffgraft.methods.rewards import find_reward

_log = logging.getLogger(__name__)


def fetch_artefact(plugin: Plugin, need: Need, value: Any, target: Target) -> Artefact:
    """An artefact or an inversion that was made for this model (what else it must fit is checked when a run begins)."""
    return fitting(value if isinstance(value, Artefact) else Artefact.load(value, plugin.name, need.kind), need, target)


def fetch_finding(plugin: Plugin, need: Need, value: Any, target: Target) -> Artefact:
    """What a search found for this model."""
    return fitting(value if isinstance(value, Artefact) else Finding.load(value, plugin.name, need.kind), need, target)


def fitting(artefact: Artefact, need: Need, target: Target) -> Artefact:
    """The artefact, if it was made for this model and holds what the plugin says."""
    artefact.ensure_model(target.pipe, target.denoisers, need.crosses)
    if need.holds is not None:
        artefact.ensure_holds(need.holds)
    return artefact


def fetch_reward(plugin: Plugin, need: Need, value: Any, target: Target) -> Any:
    """A reward: a callable, or the name of one."""
    return find_reward(f"plugin {plugin.name!r}: {need.knob}", value)


def layout_of(plugin: Plugin | type[Plugin], need: Need) -> Layout:
    """What a plugin says of published weights.

    Raises:
        BrokenPlugin: nothing.
    """
    if not isinstance(need.holds, Layout):
        raise BrokenPlugin(f"plugin {plugin.name!r}: Need('weights', {need.knob!r}) says no holds=Layout(...): its keys must be declared")
    return need.holds


def fetch_weights(plugin: Plugin, need: Need, value: Any, target: Target) -> Weights:
    """Weights that somebody else published, as their layout says; on the CPU, in the dtypes of the file."""
    layout = layout_of(plugin, need)
    if isinstance(value, Weights) and value.layout is layout:
        return value  # read before
    weights = read_weights(layout, value, plugin.name, need.knob)
    _log.info("%s: %s = %s loaded, %d tensors", plugin.name, need.knob, weights.source, len(weights.tensors))
    return weights


def fetch_encoder(plugin: Plugin, need: Need, value: Any, target: Target) -> Encoder:
    """A text encoder with its tokenizer, on the device and in the dtype of the pipeline (again in each run that finds these changed)."""
    if isinstance(value, (str, os.PathLike)):
        encoder = read_encoder(value, plugin.name, need.knob)
        _log.info("%s: %s = %s loaded", plugin.name, need.knob, value)
    elif isinstance(value, tuple) and len(value) == 2 and callable(value[0]) and isinstance(value[1], nn.Module):
        encoder = Encoder(*value)
    elif isinstance(value, Encoder):
        encoder = value
    else:
        raise ConfigError(
            f"plugin {plugin.name!r}: {need.knob} = {type(value).__name__}: give a folder, a Hub id, or (tokenizer, text encoder)"
        )
    follow(encoder, target.pipe._execution_device, target.pipe.dtype)
    return encoder


def fetch_pipelines(plugin: Plugin, need: Need, value: Any, target: Target) -> Any:
    """A second pipeline, or a list of them."""
    if isinstance(value, (list, tuple)):
        return [fetch_pipeline(plugin, need, one, target) for one in value]
    return fetch_pipeline(plugin, need, value, target)


def fetch_pipeline(plugin: Plugin, need: Need, value: Any, target: Target) -> Any:
    """A second pipeline on the device of the first: of the same family and latent space, and then in the dtype of the first, or of a family
    that the plugin names."""
    knob = need.knob
    if isinstance(value, (str, os.PathLike)):
        second = read_pipeline(value, dtype=target.pipe.dtype).to(target.pipe.device)
        second.set_progress_bar_config(disable=True)
        _log.info("%s: %s = %s loaded", plugin.name, knob, value)
    elif isinstance(value, PIPELINES):
        second = value
    else:
        raise ConfigError(
            f"plugin {plugin.name!r}: {knob} = {type(value).__name__}: give a bundled name, a folder, a Hub id or a live diffusers pipeline"
        )
    if differing := family_difference(need, target, second) if need.families else space_difference(target, second):
        raise Unsupported(f"{plugin.name}: {knob} = {value if isinstance(value, str) else type(value).__name__} does not fit: {differing}")
    return second


def family_difference(need: Need, target: Target, second: Any) -> str | None:
    """Why a second pipeline is not what a plugin with families for it asks for: one of these, whose latents become pixels, as the first's
    do; or None when it is."""
    try:
        family = find_family(type(second))
        if not family.is_among(need.families):
            return f"{type(second).__name__} is of the family {family.name!r}, and it takes {', '.join(need.families)}"
        ensure_decodes(target.pipe, target.family, float32=True)  # in which dtype is said where it is done
        ensure_decodes(second, family, float32=True)
    except Unsupported as error:
        return str(error)
    return None


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
