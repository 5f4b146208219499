"""``attention_backend=``: diffusers' own dispatcher, undone completely (diffusers changes it process-wide)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.errors import Unsupported, choices
from diffgraft.installed.family import Family
from diffgraft.kernel.slots import write_global

PIP = {"xformers": "pip install 'diffgraft[xformers]'", "flash": "pip install flash-attn", "sage": "pip install sageattention"}


def use_attention_backend(pipe: Any, family: Family, backend: str) -> Callable[[], None]:
    """Set ``backend`` on every denoiser; returns the function that puts back what was there.

    Raises:
        Unsupported: unknown backend, package missing (with the pip command), or no layer of this denoiser listens to the dispatcher.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = [item.value for item in AttentionBackendName]
    if backend not in known:
        raise Unsupported(f"attention_backend={backend!r} is unknown{choices(backend, known, 'Known')}")
    denoisers = list(denoisers_of(pipe, family).values())
    processors = [
        processor
        for denoiser in denoisers
        for module in denoiser.modules()
        if (processor := getattr(module, "processor", None)) is not None and hasattr(processor, "_attention_backend")
    ]
    classic = {id(d): dict(d.attn_processors) for d in denoisers if hasattr(d, "attn_processors")}
    before: list[tuple[Any, Any]] = [(processor, processor._attention_backend) for processor in processors]
    active = _AttentionBackendRegistry._active_backend

    def undo() -> None:
        write_global(_AttentionBackendRegistry, "_active_backend", active)
        for processor, old in before:
            write_global(processor, "_attention_backend", old)
        for denoiser in denoisers:
            if backend == "xformers" and not processors and id(denoiser) in classic:
                denoiser.set_attn_processor(classic[id(denoiser)])

    try:
        for denoiser in denoisers:
            if processors:
                denoiser.set_attention_backend(backend)  # type: ignore[operator]
            elif backend == "xformers":
                denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            elif backend != "native":
                raise Unsupported(
                    f"attention_backend={backend!r}: no attention layer of {type(denoiser).__name__} goes through diffusers' "
                    "dispatcher, so it would silently do nothing; use 'xformers' or 'native'"
                )
    except (ImportError, RuntimeError, ModuleNotFoundError, ValueError) as error:
        undo()
        root = backend.lstrip("_").split("_")[0]
        hint = f"; `{PIP[root]}`" if root in PIP else ""
        raise Unsupported(f"attention_backend={backend!r} cannot be used here: {error}{hint}") from error
    except Unsupported:
        undo()
        raise
    return undo
