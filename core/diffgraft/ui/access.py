"""What a browser may name: whoever can open the page must not read the disk by it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, PipelineNotFound, nearest
from diffgraft.installed.foreign import brief

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``, and nothing that leads elsewhere on this machine."""
READ = (".safetensors", ".npz", ".npy", ".json", ".yaml", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that a knob may name."""
MOST = 500
"""Files that are offered."""


@dataclass(frozen=True)
class Access:
    """What the command line allowed.

    pipelines  folders and Hub ids that it named
    folders    whose files knobs may name
    hub        whether visitors may name anything else on the Hub, which downloads it
    """

    pipelines: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    hub: bool = True
    bundled: tuple[str, ...] = field(default_factory=lambda: tuple(registry.bundled_names()))

    @property
    def offered(self) -> list[str]:
        """Pipelines to pick from: those that were named come first."""
        return list(dict.fromkeys([*self.pipelines, *self.bundled]))

    def pipeline(self, name: object) -> str:
        """The name of a pipeline that may be loaded.

        Raises:
            PipelineNotFound: it is neither offered nor, where that is allowed, a Hub id.
        """
        text = name.strip() if isinstance(name, str) else ""
        if text in self.offered:
            return text
        if self.hub and HUB_ID.fullmatch(text) and not os.path.exists(text):  # a folder of that name would go first
            return text
        also = "A Hub id is written owner/name. " if self.hub else ""
        raise PipelineNotFound(
            f"{brief(text or name)} is no pipeline of this playground{nearest(text, self.offered)} {also}"
            f"Here: {', '.join(self.offered) or 'none'}. Folders are named where it is started: diffgraft ui FOLDER"
        )

    def files(self) -> list[str]:
        """The files in the allowed folders that a knob may name."""
        found = (path for folder in self.folders for path in walk(folder) if path.suffix in READ)
        return [str(path) for path, _ in zip(found, range(MOST), strict=False)]

    def inside(self, text: str) -> bool:
        """Whether a path leads to something in an allowed folder, also by a link."""
        try:
            real = Path(text).expanduser().resolve()
        except (OSError, ValueError, RuntimeError):  # no path at all
            return False
        return any(real.is_relative_to(folder.resolve()) for folder in self.folders)

    def ensure(self, plugin: str, knob: str, value: Any, named: bool) -> Any:
        """A knob's value, if no text in it leads to a file that was not allowed.

        Args:
            named: the knob names a file, a folder, a pipeline or a Hub id; else its texts are only looked at.

        Raises:
            ConfigError: it does.
        """
        for text in texts(value):
            given = self.inside(text) or text in self.offered or (self.hub and bool(HUB_ID.fullmatch(text)) and not os.path.exists(text))
            if not given and (named or leads_away(text)):
                raise ConfigError(
                    f"plugin {plugin!r}: {knob} = {brief(text)}: this playground reads nothing there. Files are offered from folders that "
                    "are allowed where it is started: diffgraft ui --allow FOLDER"
                )
        return value


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, in order; links that lead out of it are left out."""
    for root, dirs, names in os.walk(folder):
        dirs.sort()
        yield from (path for name in sorted(names) if (path := Path(root, name)).resolve().is_relative_to(folder.resolve()))


def texts(value: Any) -> Iterator[str]:
    """The texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (*texts(key), *texts(each))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts(each)


def leads_away(text: str) -> bool:
    """Whether a text reads as a path, or is one that is there."""
    if text.startswith(("/", "~", "./", "../", "\\", "file:")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    return len(text) < 256 and "\0" not in text and os.path.exists(text)
