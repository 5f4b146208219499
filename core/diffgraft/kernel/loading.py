"""``load_pipeline``: a name, a folder, a Hub id or a live pipeline in; the same pipeline with plugins on it out."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from diffgraft.installed import registry
from diffgraft.installed.errors import BrokenPlugin, ConfigError, DiffgraftError, PipelineNotFound, Unsupported
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.unread import pickles_instead, why_not_loaded
from diffgraft.kernel.backends import use_attention_backend
from diffgraft.kernel.defaults import give_defaults
from diffgraft.kernel.modular import PIPELINES, family_of, read_modular
from diffgraft.kernel.stack import PluginStack, attach, stack_of
from diffgraft.stacks.asked import Plugins, build

if TYPE_CHECKING:

    class GraftedPipeline(DiffusionPipeline):
        """What ``load_pipeline`` gives, for annotations: at run time a pipeline is of its own class, a standard diffusers one."""

        @property
        def plugins(self) -> PluginStack: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


OWN = ("plugins", "attention_backend")
"""Keywords that are ours and not diffusers'."""
ALIAS = {"backend": "attention_backend", "plug": "plugins", "stack": "plugins"}
"""What a keyword has in it when one of ours is meant, however far its spelling is; nothing of diffusers is called so."""


@overload
def load_pipeline(
    pipeline: str | os.PathLike[str], plugins: Plugins = (), *, attention_backend: str | None = None, **from_pretrained: Any
) -> GraftedPipeline: ...
@overload
def load_pipeline(
    pipeline: DiffusionPipeline | ModularPipeline, plugins: Plugins = (), *, attention_backend: str | None = None
) -> GraftedPipeline: ...
def load_pipeline(
    pipeline: str | os.PathLike[str] | DiffusionPipeline | ModularPipeline,
    plugins: Plugins = (),
    *,
    attention_backend: str | None = None,
    **from_pretrained: Any,
) -> Any:
    """Load a diffusers pipeline and graft plugins onto it.

    Args:
        pipeline: a bundled name ("emoji-sd"), a folder, a Hub id, or a live pipeline. A bundled pipeline brings its own size, steps and
            guidance: its calls take them for what they do not name, and its signature shows them.
        plugins: names, ``(name, {knob: value})`` pairs, a ``{name: {knob: value}}`` mapping, plugin classes or instances;
            the first is outermost. ``{name: "preset"}`` takes the knobs of one of its presets. A stack file: a path, ``"stack.yaml"``,
            ``"owner/name"`` on the Hub. ``True``: the stack that ``save_pretrained(..., plugins=True)`` wrote with this pipeline.
        attention_backend: a name of diffusers' attention dispatcher ("native", "xformers", "flash"...); undone by ``unload``.
        from_pretrained: handed to ``DiffusionPipeline.from_pretrained`` (``dtype=...``, ``variant=...``). Weights are read from
            safetensors; ``use_safetensors=None`` also reads pickles, which run code of whoever made them.

    Returns:
        The pipeline: a standard diffusers object of its own class, with ``pipe.plugins``.

    Raises:
        PluginNotFound, BrokenPlugin, ConfigError, Conflict: before anything is loaded.
        ArtefactMismatch: a file that a stack file names is not the one that it was saved with; likewise.
        PipelineNotFound: no such bundled name, or the folder or Hub id cannot be read, with the reason.
        Unsupported: the pipeline's family is not known or a plugin cannot work on it; the pipeline is as it was.
    """
    refuse_near_misses(from_pretrained)
    asked = build(plugins, pipeline)
    plan([Part.of(plugin) for plugin in asked.enabled]).ensure()
    if isinstance(pipeline, (str, os.PathLike)):
        pipe = read_pipeline(pipeline, **from_pretrained)
    elif from_pretrained:
        raise ConfigError(f"{', '.join(from_pretrained)}: only for a name or folder; a live pipeline is loaded already")
    elif isinstance(pipeline, PIPELINES):
        pipe = pipeline
    else:
        raise Unsupported(f"{type(pipeline).__name__} is no diffusers pipeline: give a name, a folder, a Hub id or a DiffusionPipeline")
    fresh = stack_of(pipe) is None
    asked.ensure_for(family_of(pipe), type(pipe).__name__)
    stack = attach(pipe, asked.plugins, asked.disabled)
    if attention_backend is not None:
        try:
            stack.on_clear(use_attention_backend(pipe, stack.family, attention_backend))
        except DiffgraftError:
            stack.clear() if fresh else stack.remove(*asked.plugins)
            raise
    return pipe


def unload(pipe: Any) -> Any:
    """Take all plugins off a pipeline and give it back as it was loaded (a bundled one keeps its own defaults). Does nothing to a pipeline
    that has nothing on it."""
    stack = stack_of(pipe)
    if stack is not None:
        stack.clear()
    return pipe


def read_pipeline(name: str | os.PathLike[str], **from_pretrained: Any) -> Any:
    """The plain pipeline behind a bundled name, folder or Hub id; a bundled one comes with its LoRA, scheduler and defaults.

    Raises:
        PipelineNotFound: it cannot be read, with the reason and the way out.
        BrokenPlugin: a bundled pipeline says arguments that it does not take.
        Unsupported: its weights are pickles, and ``use_safetensors=None`` was not said.
    """
    folder, bundled = registry.resolve(name), registry.bundled_of(name)
    if bundled is not None and bundled.lora is not None and importlib.util.find_spec("peft") is None:
        raise Unsupported(f"{name} is a LoRA, and diffusers loads none without peft, which is not installed: `pip install peft`")
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model_index.json")):
        if os.path.isfile(os.path.join(folder, ModularPipeline.config_name)):
            return read_modular(folder, from_pretrained)
        raise PipelineNotFound(
            f"{os.fspath(name)!r} is a folder without model_index.json, so no pipeline: give the folder that `save_pretrained` wrote"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **{"use_safetensors": True, **from_pretrained})
    except (OSError, HFValidationError, SafetensorError) as error:
        if not (pickles := pickles_instead(folder, error)):
            raise PipelineNotFound(f"{os.fspath(name)!r} cannot be loaded: {why_not_loaded(error)}") from error
        raise Unsupported(
            f"{name}: its weights are pickles ({', '.join(pickles)}), which run code of whoever made them. Convert them (`save_pretrained` "
            "writes safetensors), or say use_safetensors=None if you trust that person"
        ) from error
    if bundled is None:
        return pipe
    if bundled.lora is not None:
        config = type(pipe.scheduler).load_config(bundled.lora, subfolder="scheduler")
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        pipe.load_lora_weights(bundled.lora, use_safetensors=True, adapter_name=os.fspath(name).replace("-", "_"))
    try:
        give_defaults(pipe, bundled.defaults)
    except ConfigError as error:
        raise BrokenPlugin(f"bundled pipeline {name!r}: {error}") from error
    return pipe


def refuse_near_misses(keywords: Iterable[str]) -> None:
    """diffusers swallows keywords that it does not know: one of ours that is misspelt would silently do nothing.

    Raises:
        ConfigError: a keyword that is near one of ours.
    """
    for word in keywords:
        meant = difflib.get_close_matches(word.lower(), OWN, n=1, cutoff=0.75)
        meant = meant or [own for part, own in ALIAS.items() if part in word.lower()]
        if meant:
            raise ConfigError(f"{word}= is no keyword of load_pipeline; did you mean {meant[0]}=?")
