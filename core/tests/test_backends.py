"""Attention backends: undone, refused without their package, refused where they would do nothing."""

from __future__ import annotations

import pytest
from diffgraft import (
    Unsupported,
    load_pipeline,
    unload,
)
from probes import Everything, generate, tiny, trace


def test_attention_backend_is_undone(sd):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as dispatcher

    pipe, kwargs = tiny("FluxPipeline")
    before = dispatcher._active_backend, [p._attention_backend for p in pipe.transformer.attn_processors.values()]
    load_pipeline(pipe, plugins=[], attention_backend="_native_math")
    assert {p._attention_backend.value for p in pipe.transformer.attn_processors.values()} == {"_native_math"}
    generate(pipe, kwargs)
    unload(pipe)
    assert (dispatcher._active_backend, [p._attention_backend for p in pipe.transformer.attn_processors.values()]) == before


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline"])
def test_attention_backend_without_its_package_shows_the_pip_command(name):
    try:
        import xformers  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("xformers is installed here; the error is for machines without it")
    pipe, _ = tiny(name)
    seen = trace(pipe)
    with pytest.raises(Unsupported, match=r"pip install 'diffgraft\[xformers\]'"):
        load_pipeline(pipe, plugins=[Everything], attention_backend="xformers")
    assert trace(pipe) == seen
    with pytest.raises(Unsupported, match="did you mean 'xformers'"):
        load_pipeline(pipe, attention_backend="xformer")
    assert trace(pipe) == seen


def test_attention_backend_that_would_do_nothing_is_refused():
    pipe, _ = tiny("StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="silently do nothing"):
        load_pipeline(pipe, attention_backend="_native_math")
    assert not hasattr(pipe, "plugins")
