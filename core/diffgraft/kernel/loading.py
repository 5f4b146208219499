"""``load_pipeline``: a name, a folder, a Hub id or a live pipeline in; the same pipeline with plugins on it out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from diffgraft.kernel import registry
from diffgraft.kernel.backends import use_attention_backend
from diffgraft.kernel.errors import ConfigError, DiffgraftError, Unsupported
from diffgraft.kernel.planner import Part, plan
from diffgraft.kernel.plugin import Plugin
from diffgraft.kernel.stack import attach, stack_of

Spec = str | tuple[str, Mapping[str, Any]] | type[Plugin] | Plugin


def load_pipeline(
    pipeline: str | os.PathLike[str] | DiffusionPipeline,
    plugins: Iterable[Spec] | Mapping[str, Mapping[str, Any] | None] | str = (),
    *,
    attention_backend: str | None = None,
    **from_pretrained: Any,
) -> Any:
    """Load a diffusers pipeline and graft plugins onto it.

    Args:
        pipeline: a bundled name ("emoji-sd"), a folder, a Hub id, or a live pipeline.
        plugins: names, ``(name, {knob: value})`` pairs, a ``{name: {knob: value}}`` mapping, plugin classes or instances;
            the first is outermost.
        attention_backend: a name of diffusers' attention dispatcher ("native", "xformers", "flash"...); undone by ``unload``.
        from_pretrained: handed to ``DiffusionPipeline.from_pretrained`` (``torch_dtype=...``, ``variant=...``). Weights are read from
            safetensors; ``use_safetensors=None`` also reads pickles, which run code of whoever made them.

    Returns:
        The pipeline: a standard diffusers object of its own class, with ``pipe.plugins``.

    Raises:
        PluginNotFound, BrokenPlugin, ConfigError, Conflict: before anything is loaded.
        PipelineNotFound: no such bundled name.
        Unsupported: the pipeline's family is not known or a plugin cannot work on it; the pipeline is as it was.
    """
    made = [build_plugin(spec) for spec in as_specs(plugins)]
    plan([Part(plugin.name, plugin.effects) for plugin in made]).ensure()
    if isinstance(pipeline, (str, os.PathLike)):
        pipe = read_pipeline(pipeline, **from_pretrained)
    elif from_pretrained:
        raise ConfigError(f"{', '.join(from_pretrained)}: only for a name or folder; a live pipeline is loaded already")
    elif isinstance(pipeline, DiffusionPipeline):
        pipe = pipeline
    else:
        raise Unsupported(f"{type(pipeline).__name__} is no diffusers pipeline: give a name, a folder, a Hub id or a DiffusionPipeline")
    fresh = stack_of(pipe) is None
    stack = attach(pipe, made)
    if attention_backend is not None:
        try:
            stack.on_clear(use_attention_backend(pipe, stack.family, attention_backend))
        except DiffgraftError:
            stack.clear() if fresh else stack.remove(*[plugin.name for plugin in made])
            raise
    return pipe


def unload(pipe: Any) -> Any:
    """Take everything of diffgraft off a pipeline and give it back as it was. Does nothing to a pipeline that has nothing on it."""
    stack = stack_of(pipe)
    if stack is not None:
        stack.clear()
    return pipe


def read_pipeline(name: str | os.PathLike[str], **from_pretrained: Any) -> Any:
    """The plain pipeline behind a bundled name, folder or Hub id; a bundled LoRA comes with its scheduler.

    Raises:
        Unsupported: its weights are pickles, and ``use_safetensors=None`` was not said.
    """
    folder = resolve(name)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **{"use_safetensors": True, **from_pretrained})
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise Unsupported(
            f"{name}: {error} Pickled weights run code of whoever made them. Convert them (`save_pretrained` writes safetensors), or say "
            "use_safetensors=None if you trust that person"
        ) from error
    text = os.fspath(name)
    lora = registry.find_bundled(text).lora if text in registry.bundled_names() and not os.path.isdir(name) else None
    if lora is not None:
        config = type(pipe.scheduler).load_config(lora, subfolder="scheduler")
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        pipe.load_lora_weights(lora, use_safetensors=True, adapter_name=text.replace("-", "_"))
    return pipe


def resolve(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder or Hub id behind a pipeline name: an existing folder, then a bundled name, then ``owner/name`` on the Hub."""
    if os.path.isdir(name):
        return name
    text = os.fspath(name)
    if text in registry.bundled_names():
        return registry.find_bundled(text).path
    if isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    return registry.find_bundled(text).path  # raises PipelineNotFound


def as_specs(plugins: Any) -> list[Spec]:
    """The accepted forms of ``plugins=`` as one list."""
    if isinstance(plugins, str):
        return [plugins]
    if isinstance(plugins, Mapping):
        return [(name, knobs or {}) for name, knobs in plugins.items()]
    return list(plugins)


def build_plugin(spec: Spec) -> Plugin:
    """One plugin from a name, a ``(name, knobs)`` pair, a class or an instance."""
    if isinstance(spec, Plugin):
        registry.check_class(type(spec), f"plugin {type(spec).__name__}")
        return spec
    if isinstance(spec, type):
        registry.check_class(spec, f"plugin {spec.__name__}")
        return spec()
    if isinstance(spec, str):
        return registry.find(spec)()
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], Mapping):
        return registry.find(spec[0])(**spec[1])
    raise ConfigError(f"plugins: {spec!r} is neither a name, a (name, {{knobs}}) pair, a plugin class nor an instance")
