"""A pipeline with one watcher on it: how a calibration, an inversion and a search see what a run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from diffgraft.installed.plugin import Plugin
from diffgraft.installed.registry import find_family
from diffgraft.kernel.calls import DenoiseCall, RunCall
from diffgraft.kernel.defaults import plain_class
from diffgraft.kernel.given import describe, ensure_family
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.stack import PluginStack, ensure_bare
from diffgraft.methods.artefacts import MadeFor


class Watcher(Plugin):
    """A plugin of its own, alone on the pipeline for one run: its hooks keep what they see in ``call.shared``, ``collect`` hands it over.

    It takes the knobs of the plugin that it works for.
    """

    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        result = next(call)
        call.record(self.collect(call))
        return result

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        """Here so that the report knows the denoiser calls and their shape."""
        return next(call)

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        """What one run showed."""
        raise NotImplementedError


class Calibrator(Watcher):
    """Measures what a plugin's artefact holds, one run a prompt."""

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) of the artefact; facts are plain JSON values.

        A second parameter, ``target``, gets the pipeline's ``Target``, with the modules that this calibrator has put in: what is
        reconstructed is reconstructed on them.
        """
        raise NotImplementedError


class Inverter(Watcher):
    """Walks from a picture's latents back to noise in one run; what it collects is the code from which the picture is made again."""


@contextmanager
def watching(pipe: Any, plugin: Plugin, watcher: Plugin, beside: Sequence[Plugin] = ()) -> Iterator[PluginStack]:
    """``watcher`` on ``pipe``, on behalf of ``plugin``, over the plugins that run ``beside`` it; afterwards the pipeline is as it was.

    Raises:
        Conflict: there are plugins on the pipeline.
        Unsupported: ``plugin`` or ``watcher`` does not work on it.
    """
    ensure_bare(pipe, f"what {plugin.name} looks at must be the plain pipeline")
    ensure_family(plugin, find_family(type(pipe)), plain_class(type(pipe)))  # before the watcher asks for parts that others lack
    stack = load_pipeline(pipe, [watcher, *beside]).plugins
    try:
        yield stack
    finally:
        stack.clear()


def made_for(plugin: Plugin, stack: PluginStack) -> MadeFor:
    """What an artefact of ``plugin`` fits that was found in the stack's last run."""
    report = stack.report()
    denoisers = describe(stack.pipe, stack.family).denoisers
    return MadeFor.describe(plugin.name, stack.pipe, stack.run_scheduler(), denoisers, report.steps, report.shape[1:])
