"""``load_pipeline``: a name, a folder, a Hub id or a live pipeline in; the same pipeline with plugins on it out."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from diffgraft.kernel import registry
from diffgraft.kernel.backends import use_attention_backend
from diffgraft.kernel.defaults import give_defaults
from diffgraft.kernel.errors import BrokenPlugin, ConfigError, DiffgraftError, PipelineNotFound, Unsupported
from diffgraft.kernel.planner import Part, plan
from diffgraft.kernel.specs import Specs, as_specs, build_plugin
from diffgraft.kernel.stack import attach, stack_of

OWN = ("plugins", "attention_backend")
"""Keywords that are ours and not diffusers'."""
ALIAS = {"backend": "attention_backend", "plug": "plugins"}
"""What a keyword has in it when one of ours is meant, however far its spelling is; nothing of diffusers is called so."""


def load_pipeline(
    pipeline: str | os.PathLike[str] | DiffusionPipeline,
    plugins: Specs = (),
    *,
    attention_backend: str | None = None,
    **from_pretrained: Any,
) -> Any:
    """Load a diffusers pipeline and graft plugins onto it.

    Args:
        pipeline: a bundled name ("emoji-sd"), a folder, a Hub id, or a live pipeline. A bundled pipeline brings its own size, steps and
            guidance: its calls take them for what they do not name, and its signature shows them.
        plugins: names, ``(name, {knob: value})`` pairs, a ``{name: {knob: value}}`` mapping, plugin classes or instances;
            the first is outermost.
        attention_backend: a name of diffusers' attention dispatcher ("native", "xformers", "flash"...); undone by ``unload``.
        from_pretrained: handed to ``DiffusionPipeline.from_pretrained`` (``torch_dtype=...``, ``variant=...``). Weights are read from
            safetensors; ``use_safetensors=None`` also reads pickles, which run code of whoever made them.

    Returns:
        The pipeline: a standard diffusers object of its own class, with ``pipe.plugins``.

    Raises:
        PluginNotFound, BrokenPlugin, ConfigError, Conflict: before anything is loaded.
        PipelineNotFound: no such bundled name, or the folder or Hub id cannot be read, with the reason.
        Unsupported: the pipeline's family is not known or a plugin cannot work on it; the pipeline is as it was.
    """
    refuse_near_misses(from_pretrained)
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
    folder, bundled = resolve(name), registry.bundled_of(name)
    if bundled is not None and bundled.lora is not None and importlib.util.find_spec("peft") is None:
        raise Unsupported(f"{name} is a LoRA, and diffusers loads none without peft, which is not installed: `pip install peft`")
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model_index.json")):
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


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def pickles_instead(folder: str | os.PathLike[str], error: BaseException) -> list[str]:
    """The pickled weights that are all there is where safetensors were looked for; none where the fault is another one.

    Of the part of a folder that the error names this is seen; of a Hub id diffusers lists the files that it found.
    """
    if "SafetensorError" in kinds_of(error):
        return []  # a file was there, and is damaged
    if not os.path.isdir(folder):
        listed = str(error).partition("safetensors` weights in")[2]
        return sorted(word for word in re.findall(r"'([^']+)'", listed) if word.endswith(PICKLES))
    found = []
    for part in Path(folder).iterdir():
        names = [path.name for path in part.iterdir()] if part.is_dir() and f"{part}." in str(error) else []
        if not any(name.endswith(".safetensors") for name in names):
            found += [f"{part.name}/{name}" for name in sorted(names) if name.endswith(PICKLES)]
    return found


def kinds_of(error: BaseException | None) -> set[str]:
    """Class names of an error and of those behind it: diffusers tells of a cache miss, and not of what happened on the way there."""
    kinds: set[str] = set()
    while error is not None:
        kinds |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return kinds


def why_not_loaded(error: BaseException) -> str:
    """What kept diffusers from reading a pipeline, and the way out."""
    first, kinds = str(error).strip().partition("\n")[0], kinds_of(error)
    if "SafetensorError" in kinds:
        return f"a file of weights is damaged, or not what its name says ({first}): fetch or save it again"
    if "GatedRepoError" in kinds:
        return "it is gated: accept its licence on its page on the Hub, then `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "the Hub has no such repository, or it is private: check the spelling, or `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "the repository has no such revision: check revision=..."
    if kinds & {"EntryNotFoundError", "RemoteEntryNotFoundError"}:
        return "the repository has no model_index.json, so it is no diffusers pipeline"
    if "HFValidationError" in kinds:
        return f"that is no Hub id: {first}"
    if "OfflineModeIsEnabled" in kinds:
        return "it is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or give a folder"
    if kinds & {"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "gaierror"}:
        return "it is not in the local cache, and the Hub cannot be reached: go online once, or give a folder"
    if "LocalEntryNotFoundError" in kinds:
        return "it is not in the local cache, and local_files_only=True forbids to fetch it"
    return first or type(error).__name__


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


def resolve(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder or Hub id behind a pipeline name: an existing folder, then a bundled name, then ``owner/name`` on the Hub."""
    if os.path.isdir(name):
        return name
    if (bundled := registry.bundled_of(name)) is not None:
        return bundled.path
    text = os.fspath(name)
    if isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    return registry.find_bundled(text).path  # raises PipelineNotFound
