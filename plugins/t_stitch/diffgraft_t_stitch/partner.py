"""The small pipeline beside the large one: whether it fits, which of its parts run, and what its denoiser is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffgraft import Family, Unsupported
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.methods.conditioning import Conditioning, join, own_conditioning, takes_pictures
from diffgraft.methods.inputs import parameters
from torch import nn

NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
"""Scheduler settings that say how noisy the samples of a timestep were in training (where set: a default says nothing)."""
SIZES = ("time_ids",)
"""Parts of SDXL's ``added_cond_kwargs`` that say how large the picture is: facts of the running call, whatever the text encoders."""
PICTURES = ("ip_adapter_image", "ip_adapter_image_embeds")
GUIDANCE = {"guidance": "guidance_embeds", "timestep_cond": "time_cond_proj_dim"}
"""Inputs that hold the guidance scale, and the setting of a denoiser that takes it (Flux; latent consistency models)."""


def denoiser_of(small: Any, name: str, family: Family) -> nn.Module:
    """The small pipeline's part for the denoiser called ``name``; its only one, where the large pipeline has two (Wan 2.2)."""
    found: nn.Module | None = getattr(small, name, None)
    return found if found is not None else getattr(small, family.denoisers[0])  # type: ignore[no-any-return]


def ensure_fits(pipe: Any, family: Family, small: Any) -> None:
    """Refuse a small pipeline whose denoiser cannot take over (the core has compared class, latent space and prediction type).

    Raises:
        Unsupported: with every reason.
    """
    if reasons := misfits(pipe, family, small):
        raise Unsupported(f"t_stitch: model = {type(small).__name__} does not fit: {'; '.join(reasons)}")


def misfits(pipe: Any, family: Family, small: Any) -> list[str]:
    """Every reason why ``small``'s denoiser cannot take over from this pipeline's."""
    reasons = []
    for name in family.denoisers:
        large, own = getattr(pipe, name, None), getattr(small, name, None)
        if large is None:
            if own is not None:
                reasons.append(f"it has a {name} and this pipeline has none, so that part of it would never run")
            continue
        model = denoiser_of(small, name, family)
        if model.dtype != large.dtype:
            reasons.append(f"its {name} is {model.dtype}, this one {large.dtype}; convert it with .to({large.dtype})")
        mine, other = large.config.get("time_cond_proj_dim"), model.config.get("time_cond_proj_dim")
        if other and mine != other:
            reasons.append(f"its {name} has time_cond_proj_dim = {other}, this one {mine}: it would not be given the guidance scale")
        if takes_pictures(model) and not takes_pictures(large):
            reasons.append(f"its {name} has an IP-Adapter and this one none; load it on both or unload it there")
    reasons += control_misfits(getattr(pipe, "controlnet", None), getattr(small, "controlnet", None), pipe, family, small)
    if family.prediction != "flow":
        settings = pipe.scheduler.config, small.scheduler.config
        for key in NOISE:
            mine, other = (None if key in config.get("_use_default_values", ()) else config.get(key) for config in settings)
            if None not in (mine, other) and mine != other:
                reasons.append(f"its scheduler's {key} is {other}, here {mine}: its timesteps mean another noise level")
    return reasons


def control_misfits(control: Any, own: Any, pipe: Any, family: Family, small: Any) -> list[str]:
    """A ControlNet's residuals fit one U-Net layout: the small pipeline brings its own, or its U-Net has the large one's layout."""
    if control is None:
        return []
    if own is not None:
        here, there = ((type(net).__name__, len(getattr(net, "nets", "1"))) for net in (control, own))
        return [f"it has {there[1]} {there[0]}, this pipeline {here[1]} {here[0]}"] if here != there else []
    name = family.denoisers[0]
    for key in ("block_out_channels", "layers_per_block"):
        mine, other = (list_of(getattr(p, name).config, key) for p in (pipe, small))
        if mine != other:
            return [
                f"the ControlNet's residuals do not fit its {name} ({key} = {other}, here {mine}); "
                "give a small pipeline with a ControlNet of its own"
            ]
    return []


def list_of(config: Mapping[str, Any], key: str) -> list[Any]:
    """A setting of a U-Net that is one number or one a level."""
    value = config[key]
    return list(value) if isinstance(value, (list, tuple)) else [value] * len(config["block_out_channels"])


def needs_own(pipe: Any, small: Any, family: Family) -> bool:
    """Whether the small pipeline's denoiser must be given what its own encoders make of the prompt.

    An encoder that the small pipeline does not have is the large one's.
    """
    names = [name for name in pipe.components if name.startswith(("text_encoder", "image_encoder"))]
    pairs = [(getattr(pipe, name), getattr(small, name, None)) for name in names]
    if any(other is not None and differs(mine, other) for mine, other in pairs):
        return True
    models = getattr(pipe, family.denoisers[0]), denoiser_of(small, family.denoisers[0], family)
    mine, other = (bool(model.config.get("guidance_embeds")) for model in models)
    return other and not mine  # its guidance scale is an input that the large one does not have


def differs(one: Any, other: Any) -> bool:
    """Whether two encoders are not the same weights."""
    return one is not other and (one is None or Fingerprint.of(one).difference(Fingerprint.of(other)) is not None)


def ask(small: Any, pipe: Any, arguments: Mapping[str, Any], family: Family) -> Conditioning:
    """What the small pipeline hands to its denoiser when it is called as the large one is.

    Raises:
        Unsupported: the prompt was given as embeddings.
    """
    given = {p.name: p.default for p in parameters(pipe).values() if p.default is not p.empty} | dict(arguments)
    pictures = takes_pictures(denoiser_of(small, family.denoisers[0], family))
    left_out = {*(() if pictures else PICTURES), family.guidance.second_scale}
    return own_conditioning(small, {name: value for name, value in given.items() if name not in left_out})


def conditions(own: Conditioning, branches: Sequence[str], family: Family) -> dict[str, Any]:
    """The small pipeline's own conditioning as denoiser arguments for a call that holds ``branches``; None: it gives none.

    Raises:
        Unsupported: it was not asked for one of them.
    """
    if missing := [branch for branch in branches if branch not in own.of_branch]:
        raise Unsupported(f"t_stitch: the small pipeline is called with other guidance: it made no conditioning for {missing}")
    parts = [own.of_branch[branch] for branch in branches]
    return {name: join([part[name] for part in parts]) if name in parts[0] else None for name in family.conditioning}


def fitted(call: Any, model: nn.Module, own: Mapping[str, Any] | None) -> Any:
    """``call`` (of a denoiser or a ControlNet) with what the small pipeline's would be given: ``own`` conditioning, no unknown inputs."""
    changes: dict[str, Any] = {}
    for name, value in (own or {}).items():
        if value is not None or call.get(name) is not None:
            changes[name] = with_sizes(value, call.get(name))
    config = getattr(model, "config", {})
    changes |= {name: None for name, setting in GUIDANCE.items() if call.get(name) is not None and not config.get(setting, True)}
    extra = call.get("joint_attention_kwargs")
    if extra and PICTURES[1] in extra and not takes_pictures(model):
        changes["joint_attention_kwargs"] = {name: value for name, value in extra.items() if name != PICTURES[1]}
    return call.replace(**changes) if changes else call


def with_sizes(value: Any, running: Any) -> Any:
    """The small pipeline's dict of conditions, with what the running call alone knows."""
    if isinstance(value, dict) and isinstance(running, dict):
        return {**running, **{name: item for name, item in value.items() if name not in SIZES}}
    return value
