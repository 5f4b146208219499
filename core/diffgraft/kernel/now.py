"""Where the run in progress is, for modules that a plugin has put into a denoiser: they get tensors, and no call.

class Scaled(nn.Module):
    def forward(self, x):
        run = diffgraft.now()
        return self.inner(x) if run is None else self.inner(x) * run.shared("my_plugin").factors[run.step.index]
"""

from __future__ import annotations

from typing import Any

from diffgraft.installed.errors import PluginNotFound
from diffgraft.kernel.facts import Step
from diffgraft.kernel.onion import active_run
from diffgraft.kernel.run import Run


class Now:
    """The run that is in progress in this thread."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def step(self) -> Step:
        """The step, as hooks see it."""
        return self._run.step

    @property
    def branch(self) -> str | None:
        """The name of the denoiser call ("both", "cond"...; see `Guidance.together`); None between two."""
        return self._run.branch

    def state(self, plugin: str) -> Any:
        """A plugin's own state for this run and branch, by the plugin's name: what its hooks have as ``call.state``.

        Raises:
            PluginNotFound: it is not part of this run.
        """
        return self._of(plugin, self._run.branch)

    def shared(self, plugin: str) -> Any:
        """Its state for this run, shared by all branches: ``call.shared``."""
        return self._of(plugin, None)

    def _of(self, plugin: str, branch: str | None) -> Any:
        for entry in self._run.entries:
            if entry.name == plugin:
                return self._run.state(entry, branch)
        raise PluginNotFound(f"{plugin!r} is not part of this run; in it: {', '.join(entry.name for entry in self._run.entries)}")


def now() -> Now | None:
    """The run that is in progress in this thread, or None: outside, and in a user's callback."""
    run = active_run()
    return None if run is None else Now(run)
