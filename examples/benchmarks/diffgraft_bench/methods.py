"""How a method gets on a pipeline. Each function changes the pipeline that it is given, which is the method's own copy."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from diffgraft import load_pipeline
from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.registry import find_bundled, find_family

from .cases import SCHEDULERS, Method
from .models import Model


def own_copy(pipe: Any, share_weights: bool = False) -> Any:
    """A pipeline with a denoiser and a scheduler of its own, the other parts shared; and the denoiser's tensors where one asks for it."""
    new = type(pipe)(**{name: pipe.components[name] for name in pipe.components}, **optional(pipe))
    for name in denoisers_of(pipe, find_family(type(pipe))):
        model = getattr(pipe, name)
        known = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share_weights else {}
        setattr(new, name, copy.deepcopy(model, known))
    new.scheduler = copy.deepcopy(pipe.scheduler)
    new.set_progress_bar_config(disable=True)
    return new


def optional(pipe: Any) -> dict[str, Any]:
    """Settings of a pipeline that are no components ("requires_safety_checker")."""
    known = inspect.signature(type(pipe).__init__).parameters
    names = {name for name, p in known.items() if p.default is not p.empty} - set(pipe.components)
    return {name: value for name, value in pipe.config.items() if name in names}


def put_on(method: Method, pipe: Any, model: Model) -> Callable[..., Any]:
    """Put a method on its copy of the pipeline; what then is called like a pipeline.

    Raises:
        Exception: whatever the method says against this pipeline. It goes into the report.
    """
    return PUT[method.kind](method, pipe, model)


def put_plain(method: Method, pipe: Any, model: Model) -> Any:
    return pipe


def put_diffgraft(method: Method, pipe: Any, model: Model) -> Any:
    if method.on:
        pipe.scheduler = made_scheduler(pipe, *SCHEDULERS[kind_of(pipe), method.on])
    stack = {name: fill(name, knobs, model, method) for name, knobs in method.knobs.items()}
    return load_pipeline(pipe, plugins=stack)


def fill(name: str, knobs: Mapping[str, Any], model: Model, method: Method) -> dict[str, Any]:
    """Knobs with what they only name: "calibrate" is an artefact made here, a path with {steps} one that was searched for."""
    found = dict(knobs)
    if found.get("model") == "half":
        found["model"] = model.half()
    if found.get("artefact") == "calibrate":
        plain = {knob: value for knob, value in found.items() if knob != "artefact"}
        found["artefact"] = model.artefact(name, plain, method.steps)
    elif "{steps}" in found.get("artefact", ""):
        found["artefact"] = str(model.root / found["artefact"].format(pipeline=model.name, on=method.on, steps=method.steps))
    return found


@dataclass(frozen=True)
class OtherModel:
    """Another bundled model with its own arguments, called with this one's prompts and seeds."""

    pipe: Any
    own: Mapping[str, Any]

    def __call__(self, **arguments: Any) -> Any:
        return self.pipe(**{**arguments, **self.own})


def put_bundled(method: Method, pipe: Any, model: Model) -> OtherModel:
    other = load_pipeline(method.name, plugins={name: dict(knobs) for name, knobs in method.knobs.items()}).to(pipe.device)
    other.set_progress_bar_config(disable=True)
    bundled = find_bundled(method.name)
    guidance = {} if bundled.guidance_scale is None else {"guidance_scale": bundled.guidance_scale}
    return OtherModel(other, {**bundled.call, **guidance})


def put_scheduler(method: Method, pipe: Any, model: Model) -> Any:
    pipe.scheduler = made_scheduler(pipe, method.name, method.knobs)
    return pipe


def made_scheduler(pipe: Any, name: str, options: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers with the pipeline's noise schedule."""
    old = pipe.scheduler.config
    return getattr(diffusers, name).from_config(old, **{key: old["shift"] if value == "shift" else value for key, value in options.items()})


def kind_of(pipe: Any) -> str:
    """Which of ``SCHEDULERS`` it takes."""
    return "flow" if find_family(type(pipe)).prediction == "flow" else "diffusion"


def put_cache(method: Method, pipe: Any, model: Model) -> Any:
    """One of diffusers' caches, with what it must be told about the run."""
    options: dict[str, Any] = dict(method.knobs)
    cls = getattr(diffusers, method.name)
    known = inspect.signature(cls).parameters
    if "taylor_factors_dtype" in known:
        options["taylor_factors_dtype"] = pipe.dtype
    if "current_timestep_callback" in known:
        options["current_timestep_callback"] = lambda: pipe.current_timestep
    if method.name == "MagCacheConfig":
        options["mag_ratios"] = model.mag_ratios()
    if method.name == "FasterCacheConfig":
        options["attention_weight_callback"] = lambda module: 0.5  # the documentation's
    pipe.transformer.enable_cache(cls(**options))
    return pipe


def put_peer(method: Method, pipe: Any, model: Model) -> Any:
    return PEER[method.name](pipe, dict(method.knobs))


def deepcache(pipe: Any, knobs: dict[str, Any]) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=knobs["interval"], cache_branch_id=0)
    helper.enable()
    return pipe


def tomesd(pipe: Any, knobs: dict[str, Any]) -> Any:
    import tomesd as package

    return package.apply_patch(pipe, ratio=knobs["ratio"])


def tgate(pipe: Any, knobs: dict[str, Any]) -> Any:
    from tgate import TgateSDLoader

    loaded = TgateSDLoader(pipe)

    def call(**arguments: Any) -> Any:
        return loaded.tgate(gate_step=knobs["gate_step"], **arguments)

    return call


def cache_dit(pipe: Any, knobs: dict[str, Any]) -> Any:
    import cache_dit as package

    # its defaults are for models with more blocks than these; one block in front is also what FirstBlockCache computes
    more = {"max_warmup_steps": knobs["warmup"]} if "warmup" in knobs else {}
    config = package.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=knobs["threshold"], **more)
    package.enable_cache(pipe, cache_config=config)
    return pipe


def para_attn(pipe: Any, knobs: dict[str, Any]) -> Any:
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe

    return apply_cache_on_pipe(pipe, residual_diff_threshold=knobs["threshold"])


def pruna(pipe: Any, knobs: dict[str, Any]) -> Any:
    from pruna import SmashConfig, smash

    return smash(pipe, SmashConfig({"deepcache": {"interval": knobs["interval"]}}, device=str(pipe.device)))


PUT: dict[str, Callable[[Method, Any, Model], Any]] = {
    "plain": put_plain,
    "diffgraft": put_diffgraft,
    "scheduler": put_scheduler,
    "cache": put_cache,
    "peer": put_peer,
    "bundled": put_bundled,
    "fitted": put_bundled,
}
PEER: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "DeepCache": deepcache,
    "tomesd": tomesd,
    "tgate": tgate,
    "cache-dit": cache_dit,
    "para-attn": para_attn,
    "pruna": pruna,
}
