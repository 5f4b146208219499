"""What a search found, in a small JSON file that fits only where it was searched: the sibling of a calibration's safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import Self

from diffgraft.installed.errors import ArtefactMismatch
from diffgraft.methods.artefacts import FORMAT, Artefact, check_size, checksum, find_file, make_again
from diffgraft.methods.files import write_json


@dataclass(frozen=True)
class Finding(Artefact):
    """The best genome of a search, and how it was found.

    ``facts``: "genome", "fitness" (what was minimised, its value and that of the start), "guidance_scale", "prompts" (number and SHA-256),
    "history" (an entry a generation), "searcher" and "plan" (settings), and of a searcher that ranks "ranking": every [genome,
    loss] that was judged, best first. There are no tensors.
    """

    kind: str = "search"

    @property
    def tells_apart(self) -> bool:
        """Whether the fitness told the genomes of a ranking apart; True where there is no ranking."""
        losses = [loss for _, loss in self.facts.get("ranking", ())]
        return len(losses) < 2 or losses[0] != losses[-1]

    @property
    def genome(self) -> Any:
        """The best genome, as the plugin's searcher wrote it."""
        return self.facts["genome"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: the whole of it, or nothing."""
        header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "made_for": asdict(self.made_for), "facts": self.facts}))
        header["checksum"] = checksum(header, {})
        write_json(path, header)

    @classmethod
    def load(cls, source: str | os.PathLike[str], plugin: str, kind: str = "search") -> Self:
        """The finding at a path, or at ``owner/name/file.json`` on the Hub.

        Raises:
            ConfigError: there is no such file.
            ArtefactMismatch: it is none, is damaged, or was made for another plugin.
        """
        path = find_file(source, plugin, kind)
        check_size(path, plugin, kind)
        try:
            written = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ArtefactMismatch(f"{source} cannot be read ({error}); {make_again(plugin, kind)}") from error
        return cls.checked(written, {}, source, plugin, kind)
