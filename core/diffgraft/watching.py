"""A pipeline with one watcher on it: how a calibration, an inversion and a search see what a run does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffgraft.artefacts import MadeFor
from diffgraft.loading import load_pipeline
from diffgraft.plugin import Plugin, Watcher
from diffgraft.stack import PluginStack, describe, ensure_bare


@contextmanager
def watching(pipe: Any, plugin: Plugin, watcher: Watcher, beside: Sequence[Plugin] = ()) -> Iterator[PluginStack]:
    """``watcher`` on ``pipe``, on behalf of ``plugin``, over the plugins that run ``beside`` it; afterwards the pipeline is as it was.

    Raises:
        Conflict: there are plugins on the pipeline.
        Unsupported: ``plugin`` or ``watcher`` does not work on it.
    """
    ensure_bare(pipe, f"what {plugin.name} looks at must be the plain pipeline")
    stack = load_pipeline(pipe, [watcher, *beside]).plugins
    try:
        stack.refuse_family(plugin)
        yield stack
    finally:
        stack.clear()


def made_for(plugin: Plugin, stack: PluginStack) -> MadeFor:
    """What an artefact of ``plugin`` fits that was found in the stack's last run."""
    report = stack.report()
    denoisers = describe(stack.pipe, stack.family).denoisers
    return MadeFor.describe(plugin.name, stack.pipe, stack.run_scheduler(), denoisers, report.steps, report.shape[1:])
