"""Tiny pipelines of a family, made ready for a setting: scheduler, processors, IP-Adapter, LoRA."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.family import Family
from diffgraft.kernel.modular import family_of
from diffgraft.methods.extras import imported
from diffgraft.methods.inputs import parameters
from diffgraft.testing.setting import Setting

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM++Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "EDMEuler": ("EDMEulerScheduler", {}),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""Short name -> class and options. They are asked for only where the plain pipeline runs with them."""


NO_LATENTS = ("StableDiffusionLDM3DPipeline", "QwenImageLayeredPipeline")
"""Of those that know the output type "latent", those that fail with it."""


@dataclass(frozen=True)
class Facts:
    """What a tiny pipeline offers, read once."""

    arguments: frozenset[str]
    kwargs: Mapping[str, Any]
    callback_inputs: tuple[str, ...]
    has_lora: bool
    has_processors: bool
    has_ip_adapter: bool
    has_offload: bool
    has_stop: bool
    has_from_pipe: bool
    gives_latents: bool
    """Else its pictures are compared."""
    components: tuple[str, ...]


@functools.cache
def facts(family: Family, class_name: str) -> Facts:
    """Facts of one tiny pipeline."""
    made = tiny(family, class_name)
    pipe: Any = made.pipe
    return Facts(
        arguments=frozenset(parameters(pipe)),
        kwargs=dict(made.kwargs),
        callback_inputs=tuple(getattr(pipe, "_callback_tensor_inputs", ())),
        has_lora=has_peft() and all(hasattr(model, "add_adapter") for model in denoisers(pipe, family)),
        has_processors=bool(attention_layers(pipe, family)),
        has_ip_adapter=all(type(model).__name__ == "UNet2DConditionModel" for model in denoisers(pipe, family))
        and "ip_adapter_image_embeds" in parameters(pipe),
        has_stop=hasattr(type(pipe), "interrupt"),
        has_from_pipe=hasattr(type(pipe), "from_pipe"),
        gives_latents=family.latents != "pixels" and class_name not in NO_LATENTS and '"latent"' in inspect.getsource(type(pipe)),
        has_offload=getattr(pipe, "model_cpu_offload_seq", None) is not None,
        components=tuple(name for name, part in pipe.components.items() if part is not None),
    )


def tiny(family: Family, class_name: str, seed: int = 0) -> Any:
    """A fresh tiny pipeline from the family's factory."""
    assert family.tiny is not None, f"family {family.name} has no tiny pipeline"
    module, _, function = family.tiny.partition(":")
    with quiet():
        return getattr(importlib.import_module(module), function)(class_name, seed)


@functools.cache
def as_run(family: Family, class_name: str) -> Family:
    """The family as pipelines of this class run it: a modular one's guidance is its guider's."""
    import diffusers

    cls = getattr(diffusers, class_name.partition("@")[0], object)
    return family_of(tiny(family, class_name).pipe) if diffusers.ModularPipeline in cls.__mro__ else family


def denoisers(pipe: Any, family: Family) -> list[nn.Module]:
    """The denoisers that the pipeline has."""
    return [model for name in family.denoisers if (model := getattr(pipe, name, None)) is not None]


def attention_layers(pipe: Any, family: Family) -> list[Any]:
    """All attention modules of the denoisers."""
    return [m for model in denoisers(pipe, family) for m in model.modules() if callable(getattr(m, "processor", None))]


def prepared(pipe: Any, family: Family, setting: Setting) -> Any:
    """Put on a plain pipeline what ``setting`` says."""
    if setting.scheduler is not None:
        pipe.scheduler = make_scheduler(setting.scheduler, pipe.scheduler)
    if setting.distinct:
        make_distinct(pipe.scheduler)
    if setting.processors:
        wrap_processors(pipe, family)
    if setting.ip_adapter:
        add_ip_adapter(pipe, family)
    if setting.lora:
        add_lora(pipe, family)
    return pipe


def make_scheduler(name: str, old: Any) -> Any:
    """A scheduler by its short name, from the old one's config."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    with quiet():
        return getattr(diffusers, class_name).from_config(old.config, **options)


def make_distinct(scheduler: Any) -> None:
    """Let repeated timesteps differ by rounding units: what is read from them hardly changes, what looks them up finds other places."""
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        t = scheduler.timesteps
        for i in range(1, len(t)):
            while (t[:i] == t[i]).any():
                t[i] = torch.nextafter(t[i], -torch.ones_like(t[i]))

    scheduler.set_timesteps = set_timesteps


class ForeignProcessor:
    """An attention processor of somebody else: calls the one that was there and changes its result (as an IP-Adapter's does)."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.calls = 0

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = self.inner(attn, hidden_states, *args, **kwargs)
        return tuple(x * 1.25 for x in result) if isinstance(result, tuple) else result * 1.25


def wrap_processors(pipe: Any, family: Family) -> None:
    """Give every attention layer a foreign processor. Its signature is the old one's: diffusers reads it to decide what to pass."""
    for layer in attention_layers(pipe, family):
        signature = inspect.signature(type(layer.processor).__call__)
        own = type("ForeignProcessor", (ForeignProcessor,), {"__call__": copy_of(ForeignProcessor.__call__, signature)})
        layer.processor = own(layer.processor)


def copy_of(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """``function`` under another signature."""

    def same(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    same.__signature__ = signature  # type: ignore[attr-defined]
    return same


EMBED = 16
"""Size of an IP-Adapter's picture embedding here."""


def add_ip_adapter(pipe: Any, family: Family) -> None:
    """Load an IP-Adapter with random weights through diffusers' own loader."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor
    from diffusers.models.embeddings import ImageProjection

    for unet in denoisers(pipe, family):
        width: Any = unet.config.cross_attention_dim  # type: ignore[union-attr]
        weights: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for number, name in enumerate(unet.attn_processors):  # type: ignore[arg-type]
                if name.endswith("attn2.processor"):
                    query = unet.get_submodule(name.removesuffix(".processor")).to_q
                    own = IPAdapterAttnProcessor(hidden_size=query.out_features, cross_attention_dim=width).state_dict()  # type: ignore[union-attr]
                    weights |= {f"{number}.to_{x}_ip.weight": own[f"to_{x}_ip.0.weight"] for x in "kv"}
            picture = ImageProjection(cross_attention_dim=width, image_embed_dim=EMBED, num_image_text_embeds=4).state_dict()
        projection = {key.replace("image_embeds", "proj"): value for key, value in picture.items()}
        with quiet():
            unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])  # type: ignore[operator]
        unet.eval().requires_grad_(False)


def has_peft() -> bool:
    """Whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def add_lora(pipe: Any, family: Family, seed: int = 7) -> None:
    """A LoRA with random weights on the attention projections of every denoiser."""
    peft = imported("peft", "a LoRA in the contract suite")
    for model in denoisers(pipe, family):
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()} & {"to_q", "to_k", "to_v"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=sorted(names)))  # type: ignore[operator]
        model.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars that diffusers and transformers give about tiny models."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, (level, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(level)
                if bars:
                    library.enable_progress_bar()
