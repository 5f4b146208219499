"""Hooks on compiled denoisers: as a whole, in place, block by block, which are the ways that diffusers' guides name."""

from __future__ import annotations

import logging

import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.kernel.wiring import context_of
from probes import Probe, generate, tiny

FLUX, PIXART = "FluxPipeline", "PixArtAlphaPipeline"


class Around(Probe):
    """A hook around the denoiser."""

    name = "around"

    def denoise(self, call, next):
        return next(call) * 1.5


class Between(Probe):
    """Hooks on two blocks."""

    name = "between"

    def select_blocks(self, blocks):
        outer = [block for block in blocks if not block.is_layer]
        return outer[1:3]

    def block(self, call, next):
        out = next(call)
        return tuple(x * 1.1 if isinstance(x, torch.Tensor) else x for x in out) if isinstance(out, tuple) else out * 1.1


class Within(Probe):
    """A hook on every attention layer."""

    name = "within"

    def attention(self, call, next):
        return next(call)


class Mind(Between):
    """Remembers nothing between its hooks but what a plugin usually does with Python: a count, a note."""

    name = "mind"

    def block(self, call, next):
        call.count("seen")
        call.shared.last = call.step.index
        return super().block(call, next)

    class State:
        last: int = 0


@pytest.fixture(autouse=True)
def fresh_dynamo():
    tracing = logging.getLogger("torch.__trace")  # under pytest it formats a record for every node
    torch._dynamo.reset()
    tracing.disabled = True
    yield
    tracing.disabled = False
    torch._dynamo.reset()


def compile_denoiser(pipe, way, backend, fullgraph):
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    module = getattr(pipe, name)
    if way == "whole":
        setattr(pipe, name, torch.compile(module, backend=backend, fullgraph=fullgraph))
    elif way == "in place":
        module.compile(backend=backend, fullgraph=fullgraph)
    else:
        module.compile_repeated_blocks(backend=backend, fullgraph=fullgraph)


def counting(graphs):
    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    return backend


def run_compiled(cls, plugins, way, fullgraph):
    """(eager, compiled, compiled again, graphs, new graphs of the second run)."""
    torch._dynamo.reset()
    pipe, kwargs = tiny(cls)
    load_pipeline(pipe, plugins=plugins)
    eager = generate(pipe, kwargs)
    fired = {name: part.fired for name, part in pipe.plugins.report().plugins.items()}
    graphs = []
    compile_denoiser(pipe, way, counting(graphs), fullgraph)
    first = generate(pipe, kwargs)
    count = len(graphs)
    second = generate(pipe, kwargs)
    assert {name: part.fired for name, part in pipe.plugins.report().plugins.items()} == fired
    return eager, first, second, count, len(graphs) - count


WAYS = ["whole", "in place", "blocks"]


@pytest.mark.parametrize("way", WAYS)
def test_hooks_around_the_denoiser_cost_no_break(way):
    plain = run_compiled(FLUX, [], way, True)
    eager, first, second, graphs, new = run_compiled(FLUX, [Around()], way, True)
    torch.testing.assert_close(first, eager, atol=1e-4, rtol=1e-3)
    assert torch.equal(first, second)
    assert (graphs, new) == (plain[3], 0)


@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_blocks_are_eager_between_compiled_parts(way):
    """Nothing of ours is compiled: as many graphs as blocks and pieces between them, none of them again, whatever the hooks do."""
    eager, first, second, graphs, new = run_compiled(FLUX, [Mind()], way, way == "blocks")
    torch.testing.assert_close(first, eager, atol=1e-4, rtol=1e-3)
    assert torch.equal(first, second)
    assert new == 0
    assert graphs <= 2 * 2 + 1, "two blocks and what lies before, between and behind them"


@pytest.mark.parametrize(
    ("way", "hooks"), [("whole", Between), ("in place", Between), ("whole", Within), ("in place", Within), ("blocks", Within)]
)
def test_hooks_inside_a_whole_graph_are_refused(way, hooks):
    """A hook there breaks the graph, which ``fullgraph=True`` forbids: refused before anything is opened, with the way out."""
    pipe, kwargs = tiny(FLUX)
    plain = generate(pipe, kwargs)
    compile_denoiser(pipe, way, "eager", True)
    load_pipeline(pipe, plugins=[hooks()])
    before = {path: dict(module.__dict__) for path, module in pipe.transformer.named_modules()}
    with pytest.raises(Unsupported, match=rf"{hooks.name} needs its (block|attention) hooks.*compile it without fullgraph"):
        generate(pipe, kwargs)
    assert {path: dict(module.__dict__) for path, module in pipe.transformer.named_modules()} == before, "something was opened"
    torch.testing.assert_close(generate(unload(pipe), kwargs), plain, atol=1e-4, rtol=1e-3)


def test_attention_hooks_are_compiled_once_for_all_layers():
    """Layers of one kind share one stand-in class, so that dynamo does not compile ``Attention.forward`` for each until it gives up."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # attention to itself, to the text
        eager, first, second, _, new = run_compiled(PIXART, [Within()], "whole", False)
    torch.testing.assert_close(first, eager, atol=1e-4, rtol=1e-3)
    assert torch.equal(first, second)
    assert new == 0


def test_what_compiled_a_module_is_read_in_every_form():
    """torch has no public way to it: a release that hides it shows here, and not as an error of dynamo's in somebody's run."""
    for module in (torch.compile(torch.nn.Linear(2, 2), fullgraph=True), torch.nn.Linear(2, 2)):
        if not hasattr(module, "_orig_mod"):
            assert context_of(module) is None
            module.compile(fullgraph=True)
        assert context_of(module).fullgraph is True
